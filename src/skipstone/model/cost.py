"""What a model costs, from the shapes of its modules alone: no forward pass, and a model on the meta device will do.

A multiply-accumulate counts 2 FLOPs. Counted: matrix products, attention, routers, head. Everything else is 0 by
convention (docs/cost.md). With the kv tokens and query tokens of core/counts.py and S keys stored before, in one block:

    2 (kv_tokens (K + V) + query_tokens (Q + O))   attention, linear; a capital is the size of the weight
    4 H E query_tokens (S + kv_tokens)             attention, scores and their mean of values; not halved for causality
    2 query_tokens MLP                             and the routers' own; of experts, the choices computed instead

`measure/flops.py` counts the same while operations execute; a law holds both equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import nn

from skipstone.core.counts import TokenCounts
from skipstone.core.records import DepthRecord, ExpertsRecord, NeuronGroupsRecord, Records
from skipstone.core.strict import unknown
from skipstone.core.unpad import pays

Amount = TokenCounts | float | Fraction  # a fraction where the mean over rows must be exact
Kept = Mapping[int, Mapping[str, Amount]]
SLOT_BYTES = 8  # int64, one for each pair of key and value

ROUTINGS = ("oracle", "causal", "forced")


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs by kind. mlp: its matrices; router: all that mechanisms compute themselves, PolyGLU's gate included."""

    attention_linear: float = 0
    attention_score: float = 0
    mlp: float = 0
    router: float = 0
    head: float = 0

    @property
    def linear(self) -> float:
        """The blocks' weight matrices."""
        return self.attention_linear + self.mlp

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: Flops) -> Flops:
        return Flops(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)})

    def __mul__(self, factor: float) -> Flops:
        return Flops(**{field.name: getattr(self, field.name) * factor for field in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of parameters. embedding: of tokens and positions (a tied head is the same); mechanism: part of total.

    active: without the experts that a token does not choose; total where every MLP is dense.
    """

    total: int
    embedding: int
    mechanism: int
    active: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One call with `batch` rows of `tokens` tokens after `past`.

    forward: of the whole call, decided as `routing` says. training: forward and backward of the oracle form without
    past, recomputation excluded. kv_bytes_per_token: keys, values and slots that a token of a row leaves in the cache,
    skipped or not, in the mean; state_bytes_per_token: what mechanisms keep beside them. dense: the same model without
    mechanisms and with no choice spent on a no-op; None in a dense cost itself.
    """

    tokens: int
    past: int
    batch: int
    routing: str
    parameters: Parameters
    forward: Flops
    training: Flops
    kv_bytes_per_token: float
    state_bytes_per_token: float
    dense: Cost | None = None

    @property
    def forward_per_row(self) -> Flops:
        return self.forward * (1 / self.batch)

    @property
    def forward_per_token(self) -> Flops:
        return self.forward * (1 / (self.batch * self.tokens))

    @property
    def training_per_token(self) -> Flops:
        return self.training * (1 / (self.batch * self.tokens))

    @property
    def ratio(self) -> float:
        """Forward FLOPs as a share of the dense model's."""
        return 1.0 if self.dense is None else self.forward.total / self.dense.forward.total


def cost(
    model: nn.Module,
    tokens: int = 1024,
    past: int = 0,
    batch: int = 1,
    kept: Kept | None = None,
    stored: Mapping[int, float] | None = None,
    routing: str = "causal",
    logits_to_keep: int = 0,
) -> Cost:
    """Cost of one call.

    kept: what each mechanism keeps of a row, by layer and name, from `kept_from_records` or as plain numbers; without
    it an oracle Mixture-of-Depths keeps floor(capacity * tokens), a causal one capacity * tokens in the mean, and gates
    keep all. routing: "forced" is a causal pass whose decisions the caller imposes, so that no predictor runs.
    stored: keys in the cache of each layer (`cache.layers[i].kv.width`; where rows differ, of the longest that asks);
    without it what `past` tokens leave there by the same promise. logits_to_keep: as in forward, 0 for every token.
    Raises ValueError for sizes that make no call.
    """
    if tokens < 1 or batch < 1 or past < 0:
        raise ValueError(f"cost needs tokens >= 1, batch >= 1, past >= 0; got {tokens=}, {batch=}, {past=}")
    if routing not in ROUTINGS:
        raise ValueError(unknown("routing", routing, ROUTINGS))
    call = _Call(tokens, past, batch, routing, min(tokens, logits_to_keep or tokens), kept or {}, stored or {})
    dense = _cost(model, replace(call, kept={}, stored={}, mechanisms=False))
    return replace(_cost(model, call), dense=dense)


def kept_from_records(model: nn.Module, records: Sequence[Records], rows: Literal["widest", "mean"] = "widest") -> Kept:
    """What mechanisms kept in a forward pass, as `cost` wants it.

    A gathered batch has as many columns as its row with most tokens: `widest` is what was executed, `mean` what was
    useful. Attention computes all columns; projections and MLP leave out the padding where it is much. With one token a
    row, as in decoding, only rows that keep it are computed, and both are the mean.
    Padding is never kept.
    """
    kept: dict[int, dict[str, Amount]] = {}
    for i, (block, decided) in enumerate(zip(_blocks(model), records, strict=True)):
        outer = list(block.sites["block"])
        paths = [outer, *([*outer, *block.sites[site]] for site in ("attention", "mlp"))]
        kept[i] = {name: counts for path in paths for name, counts in _along(path, decided, rows)}
        kept[i] |= {n: _choices(block.mlp, r) for n, r in decided.items() if isinstance(r, ExpertsRecord)}
        kept[i] |= {
            n: _share_on(r) for n, r in decided.items() if isinstance(r, NeuronGroupsRecord) and r.reached_BT.any()
        }
    return kept


def _choices(experts: Any, record: ExpertsRecord) -> Fraction:
    """Of a row, in the mean, without no-ops: experts compute nothing to fill up shorter rows."""
    chosen_BTX = record.chosen_BTX[..., : experts.config.count]
    return Fraction(int(chosen_BTX.sum()), len(chosen_BTX))


def _share_on(record: NeuronGroupsRecord) -> Fraction:
    """Of the groups, the same for every token; where more are tried than kept, the mean of both."""
    on = int(record.kept_BTG.sum()) + int(record.tried_BTG.sum())
    return Fraction(on, 2 * int(record.reached_BT.sum()) * record.kept_BTG.shape[-1])


def _along(path: Sequence[str], decided: Records, rows: str) -> Iterator[tuple[str, TokenCounts]]:
    """Tokens kept by each mechanism from the outside in; asked for are those that all outer ones keep, too."""

    reached_BT = None
    for name in path:
        record = decided.get(name)
        if isinstance(record, DepthRecord):  # missing where an outer mechanism kept nothing at all
            reached_BT = record.kept_BT if reached_BT is None else reached_BT & record.kept_BT
            yield name, _counts(record.kept_BT, reached_BT, rows)


def _counts(given_BT: torch.Tensor, reached_BT: torch.Tensor, rows: str) -> TokenCounts:
    def mean(kept_BT: torch.Tensor) -> float:
        return Fraction(int(kept_BT.sum()), len(kept_BT))  # type: ignore[return-value]

    def columns(kept_BT: torch.Tensor) -> int:
        return int(kept_BT.sum(1).max())

    def computed(kept_BT: torch.Tensor) -> float:
        packs = pays(int(kept_BT.sum()), len(kept_BT) * columns(kept_BT))
        return mean(kept_BT) if packs else columns(kept_BT)

    if rows == "mean" or given_BT.shape[1] == 1:
        return TokenCounts(kv_tokens=mean(given_BT), query_tokens=mean(reached_BT))
    unpadded = TokenCounts(kv_tokens=computed(given_BT), query_tokens=computed(reached_BT))
    return TokenCounts(kv_tokens=columns(given_BT), query_tokens=columns(reached_BT), unpadded=unpadded)


@dataclass(frozen=True)
class _Call:
    tokens: int
    past: int
    batch: int
    routing: str
    logits: int
    kept: Kept
    stored: Mapping[int, float]
    mechanisms: bool = True


@dataclass(frozen=True)
class _Work:
    """What one block does for a row: counts of its sub-layers, and what decides with the tokens that each is given.

    passes: through the MLP, all of whose neurons are on, or through any one expert.
    """

    attention: TokenCounts
    mlp: TokenCounts
    mechanisms: list[tuple[Any, float]]
    passes: float | Fraction


def _cost(model: nn.Module, call: _Call) -> Cost:
    forward = _head(model, call.logits)
    training = _head(model, call.tokens) * 3
    kv = state = 0.0
    for i, block in enumerate(_blocks(model)):
        oracle, kept = call.routing == "oracle", call.kept.get(i, {})
        before = _work(block, call.past, {}, False, call.mechanisms)
        single_token = call.tokens == call.batch == 1 and not oracle
        work = _work(block, call.tokens, kept, oracle, call.mechanisms, single_token)
        stored = call.stored.get(i, before.attention.kv_tokens)
        unpadded = {
            name: counts.unpadded or counts if isinstance(counts, TokenCounts) else counts
            for name, counts in kept.items()
        }
        seen = _work(block, call.tokens, unpadded, oracle, call.mechanisms, single_token)
        forward += _flops(block, work, seen, stored, call.routing)
        trained = [_work(block, call.tokens, which, True, call.mechanisms) for which in (kept, unpadded)]
        training += _training(block, *trained)
        kv += (stored + work.attention.kv_tokens) * _entry_bytes(block.self_attn)
        state += _state_bytes(before) + _state_bytes(work)
    return Cost(
        tokens=call.tokens,
        past=call.past,
        batch=call.batch,
        routing=call.routing,
        parameters=_parameters(model, call.mechanisms),
        forward=_whole(forward * call.batch),
        training=_whole(training * call.batch),
        kv_bytes_per_token=kv / (call.past + call.tokens),
        state_bytes_per_token=state / (call.past + call.tokens),
    )


def _whole(flops: Flops) -> Flops:
    return replace(flops, **{field.name: float(getattr(flops, field.name)) for field in fields(flops)})


def _work(
    block: Any, tokens: int, kept: Mapping[str, Amount], oracle: bool, mechanisms: bool, single_token: bool = False
) -> _Work:
    """single_token: in a call of one token without gradients."""
    ran: list[tuple[Any, float]] = []

    def inside(site: str, counts: TokenCounts) -> TokenCounts:
        for name in block.sites[site] if mechanisms else ():
            ran.append((block.mechanisms[name], counts.kv_tokens))
            counts = block.mechanisms[name].counts_inside(counts, kept.get(name), oracle)
        return counts

    outer = inside("block", TokenCounts(kv_tokens=tokens, query_tokens=tokens))
    attention, mlp = inside("attention", outer), inside("mlp", outer)
    if mechanisms and hasattr(block.mlp.activation, "placement"):
        ran.append((block.mlp.activation, mlp.query_tokens))
    if not _is_experts(block.mlp):
        through = (
            _through_groups(block.mlp, mlp.query_tokens, kept, ran, single_token) if mechanisms else mlp.query_tokens
        )
        return _Work(attention, mlp, ran, through)
    ran.append((block.mlp, mlp.query_tokens))
    promised = block.mlp.promised_choices(mlp.query_tokens) if mechanisms else mlp.query_tokens * block.mlp.config.top_k
    passes = kept.get(block.mlp.placement.name, promised)
    return _Work(attention, mlp, ran, passes.query_tokens if isinstance(passes, TokenCounts) else passes)


def _through_groups(
    mlp: Any, asked: float, kept: Mapping[str, Amount], ran: list[tuple[Any, float]], single_token: bool
) -> float | Fraction:
    """Passes through the whole MLP that are as much as those through the groups of neurons that are on."""
    router = getattr(mlp, "router", None)
    if router is None:
        return asked
    ran.append((router, asked))
    share = kept.get(router.placement.name, router.share_on)
    on = Fraction(share.query_tokens if isinstance(share, TokenCounts) else share)
    return Fraction(asked) * mlp.multiplied(on, single_token)  # type: ignore[no-any-return]


def _flops(block: Any, work: _Work, unpadded: _Work, stored: float, routing: str) -> Flops:
    """unpadded: the work of what sees tokens one at a time, where that is less."""
    attention, counts, each = block.self_attn, work.attention, unpadded.attention
    given = attention.k_proj.weight.numel() + attention.v_proj.weight.numel()
    asked = attention.q_proj.weight.numel() + attention.o_proj.weight.numel()
    keys = stored + max(
        counts.kv_tokens, 1
    )  # a mean below one token, as in decoding: who asks at all sees itself in full
    return Flops(
        attention_linear=2 * (each.kv_tokens * given + each.query_tokens * asked),
        attention_score=4 * counts.query_tokens * keys * attention.q_proj.weight.shape[0],
        mlp=2 * unpadded.passes * mlp_weights(block.mlp),
        router=sum(mechanism.flops(tokens, routing) for mechanism, tokens in work.mechanisms),
    )


def _training(block: Any, work: _Work, unpadded: _Work) -> Flops:
    """Forward and backward: a product has two gradients of its own size; mechanisms know what they stop."""
    forward = _flops(block, work, unpadded, 0, "oracle")
    backward = sum(mechanism.backward_flops(tokens) for mechanism, tokens in work.mechanisms)
    return replace(forward * 3, router=forward.router + backward)


def _is_experts(mlp: Any) -> bool:
    return hasattr(mlp, "promised_choices")


def mlp_weights(mlp: Any) -> int:
    """Sizes of the matrices of an MLP, or of one of its experts."""
    if _is_experts(mlp):
        return (_numel(mlp) - _numel(mlp.router)) // mlp.config.count
    return sum(child.weight.numel() for name, child in mlp.named_children() if name.endswith("_proj"))


def _head(model: Any, tokens: int) -> Flops:
    head = getattr(model, "lm_head", None)
    return Flops() if head is None else Flops(head=2 * tokens * head.weight.numel())


def _entry_bytes(attention: Any) -> int:
    """Of one token: key, value and slot, in the type of the weights."""
    weight = attention.k_proj.weight
    return 2 * weight.shape[0] * weight.element_size() + SLOT_BYTES


def _state_bytes(work: _Work) -> float:
    return sum(mechanism.cache_bytes(tokens) for mechanism, tokens in work.mechanisms)


def _parameters(model: nn.Module, mechanisms: bool) -> Parameters:
    own = sum(_numel(m) for block in _blocks(model) for m in block.routing_modules().values() if m is not block.mlp)
    decoder: Any = getattr(model, "model", model)
    embedding = _numel(decoder.embed_tokens) + _numel(decoder.positions)
    total = _numel(model)
    own, total = (own, total) if mechanisms else (0, total - own)
    return Parameters(total=total, embedding=embedding, mechanism=own, active=total - _left_out(model))


def _left_out(model: nn.Module) -> int:
    """Parameters of the experts that a token which chooses no no-op does not choose."""
    mlps = [block.mlp for block in _blocks(model) if _is_experts(block.mlp)]
    return sum(mlp_weights(mlp) * max(mlp.config.count - mlp.config.top_k, 0) for mlp in mlps)


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _blocks(model: nn.Module) -> Any:
    return getattr(model, "model", model).layers
