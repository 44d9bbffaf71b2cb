"""The cost of a model in FLOPs and bytes, computed from the shapes of its modules; a model on the meta device suffices.

A multiply-accumulate counts 2 FLOPs. Matrix products, attention, routers and head are counted; everything else is 0 by
convention (docs/cost.md). Of a block, kv_tokens is the number of tokens whose keys and values are computed, and
query_tokens the number of those that get an update (core/counts.py). With H heads of size E and S stored keys, one
block takes

    2 (kv_tokens (K + V) + query_tokens (Q + O))   attention, linear; a capital is the size of the weight
    4 H E query_tokens (S + kv_tokens)             attention, scores and weighted values; not halved for causality
                                                   (with a window see `_score_pairs`)
    2 query_tokens MLP                             with experts: 2 (choices that are computed) (size of one expert)

plus what its routers and other mechanisms compute.

`measure/flops.py` counts the same while operations execute; a test over all mechanisms holds both equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction

from skipstone.core.counts import Amount, TokenCounts
from skipstone.core.ragged_store import entries_held
from skipstone.core.routing_module import RoutingModule
from skipstone.core.strict import unknown
from skipstone.core.weights import compute_dtype, parameter_count, warn_of_uncounted, weights_multiplied
from skipstone.model.build import SEGMENT, Attention, Block, pairs
from skipstone.model.kept import DecoderLike as DecoderLike
from skipstone.model.kept import Kept as Kept
from skipstone.model.kept import ModelLike as ModelLike
from skipstone.model.kept import Weighted as Weighted
from skipstone.model.kept import kept_from_records as kept_from_records

SLOT_BYTES = 8  # one int64 slot for each pair of key and value
ID_BYTES = 16  # of a token that some mechanism's decision reads, in the cache: int64 id and slot


ROUTINGS = ("oracle", "causal", "forced")


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs by kind of operation; a multiply-accumulate counts 2.

    attention_linear: the projections of queries, keys, values and outputs. attention_score: products of queries and
    keys, and of attention weights and values. mlp: the MLP's matrices. router: what mechanisms compute themselves,
    PolyGLU's router included. head: the output head.
    """

    attention_linear: float = 0
    attention_score: float = 0
    mlp: float = 0
    router: float = 0
    head: float = 0

    @property
    def linear(self) -> float:
        """The FLOPs of the blocks' weight matrices: attention projections and MLPs."""
        return self.attention_linear + self.mlp

    @property
    def total(self) -> float:
        """The sum of all kinds of FLOPs."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: Flops) -> Flops:
        return Flops(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)})

    def __mul__(self, factor: float) -> Flops:
        return Flops(**{field.name: getattr(self, field.name) * factor for field in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """The numbers of parameters of a model and of its parts.

    total: all parameters of the model. embedding: parameters of token and position embeddings (a tied head adds none).
    mechanism: parameters of mechanisms such as routers, included in total; the router of a mixture of experts is a part
    of its MLP and does not count. active: total without the experts that a token does not choose; equal to total if
    there are no experts.
    """

    total: int
    embedding: int
    mechanism: int
    active: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one call of a model with `batch` rows of `tokens` tokens, after `past` cached tokens.

    routing: how decisions are made: "oracle" (as in training), "causal" (without later tokens, as in generation) or
    "forced" (causal, but imposed by the caller). parameters: the model's parameter counts. forward: FLOPs of the call.
    training: FLOPs of a forward and backward pass over the same rows without past, with the decisions of training;
    activation recomputation is not counted. kv_bytes_per_token: bytes of cached keys, values and int64 token indices,
    divided by all tokens of a row, skipped ones included. state_bytes_per_token: bytes of the mechanisms' own cached
    state, divided by the same number. dense: the cost of the same model without mechanisms; None in the dense model's
    own cost.
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
    def forward_per_token(self) -> Flops:
        """The FLOPs of the call divided by its number of tokens, batch * tokens."""
        return self.forward * (1 / (self.batch * self.tokens))

    @property
    def ratio(self) -> float:
        """The forward FLOPs of the call divided by those of the model without mechanisms; 1 if `dense` is None."""
        return 1.0 if self.dense is None else self.forward.total / self.dense.forward.total


def cost(
    model: ModelLike,
    tokens: int = 1024,
    past: int = 0,
    batch: int = 1,
    kept: Kept | None = None,
    stored: Mapping[int, float] | None = None,
    routing: str = "causal",
    logits_to_keep: int = 0,
) -> Cost:
    """Return the FLOPs, parameters and cache bytes of one call of a model with `batch` rows of `tokens` tokens.

    past: cached tokens per row before the call. kept: how many tokens of a row each mechanism keeps, as {layer: {name:
    count}}, measured (`kept_from_records`) or assumed. None means the configured capacity: for Mixture-of-Depths
    floor(capacity * tokens) in training and capacity * tokens on average in generation; all tokens for gates without a
    capacity. stored: keys cached in each layer before the call (`cache.layers[i].kv.width`; if rows differ, the longest
    row that has a query); None means what `past` tokens leave there if mechanisms keep their configured capacity.
    routing: "oracle" (decisions of training), "causal" (made without later tokens, as in generation), or "forced"
    (causal, but imposed by the caller, so that no predictor runs). logits_to_keep: number of last tokens whose logits
    are computed; 0 means all tokens. Raises ValueError for invalid sizes, and for layers in `kept` or `stored` that the
    model does not have.
    """
    if tokens < 1 or batch < 1 or past < 0:
        raise ValueError(f"cost needs tokens >= 1, batch >= 1, past >= 0; got {tokens=}, {batch=}, {past=}")
    if routing not in ROUTINGS:
        raise ValueError(unknown("routing", routing, ROUTINGS))
    blocks = len(model.decoder.layers)
    for layer in {**(kept or {}), **(stored or {})}:
        if layer not in range(blocks):
            raise ValueError(f"kept or stored names block {layer}, but the model has blocks 0 to {blocks - 1}")
    call = _Call(tokens, past, batch, routing, min(tokens, logits_to_keep or tokens), kept or {}, stored or {})
    warn_of_uncounted(model.decoder.layers)
    dense = _cost(model, replace(call, kept={}, stored={}, mechanisms=False))
    return replace(_cost(model, call), dense=dense)


def forward_flops(model: ModelLike, tokens: int, kept: Kept | None = None, mechanisms: bool = True) -> Flops:
    """Return the forward FLOPs of a call of a model with one row of `tokens` tokens and no cache.

    Decisions are made without later tokens, as in generation. This function is faster than `cost`, because it computes
    no parameter counts, cache bytes or training FLOPs, and is meant for searches over thresholds. kept: how many tokens
    of the row each mechanism keeps, as {layer: {name: count}}; None means the configured capacity, or all tokens for
    gates without a capacity. mechanisms: whether mechanisms act; False gives the FLOPs of the same model without them.
    Layers in `kept` that the model does not have are not noticed.
    """
    call = _Call(tokens, 0, 1, "causal", tokens, kept or {}, {}, mechanisms)
    blocks = (_executed(block, call, i)[-1] for i, block in enumerate(model.decoder.layers))
    return _whole(sum(blocks, _head(model, tokens)))


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
    """The work of one block for one row.

    attention, mlp: mean numbers of tokens that these sub-layers work on. mechanisms: each routing module with the mean
    number of tokens that reach it. passes: how many tokens' products with the whole MLP, or with one of its experts,
    are computed; a fraction if neurons are left out.
    """

    attention: TokenCounts
    mlp: TokenCounts
    mechanisms: list[tuple[RoutingModule, float]]
    passes: float | Fraction


def _cost(model: ModelLike, call: _Call) -> Cost:
    forward = _step_head(model) if call.mechanisms and call.tokens == call.batch == 1 else None
    forward = _head(model, call.logits) if forward is None else forward
    training = _head(model, call.tokens) * 3
    kv = state = 0.0
    for i, block in enumerate(model.decoder.layers):
        before, work, stored, flops = _executed(block, call, i)
        forward += flops
        kept = call.kept.get(i, {})
        trained = [_work(block, call.tokens, which, True, call.mechanisms) for which in (kept, _unpadded(kept))]
        training += _training(block, *trained)
        held = entries_held(stored + work.attention.kv_tokens, block.self_attn.window)
        kv += held * _entry_bytes(block.self_attn)
        state += _state_bytes(before) + _state_bytes(work)
    if call.mechanisms and any(m.reads_ids for block in model.decoder.layers for m in block.mechanisms.values()):
        state += (call.past + call.tokens) * ID_BYTES
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


def _executed(block: Block, call: _Call, layer: int) -> tuple[_Work, _Work, float, Flops]:
    """Return a block's work for the cached tokens and for those of the call, the number of cached keys, and FLOPs.

    The FLOPs are those of the call's forward pass, for one row. layer: the index of the block.
    """
    oracle, kept = call.routing == "oracle", call.kept.get(layer, {})
    single_token = call.tokens == call.batch == 1 and not oracle
    before = _work(block, call.past, {}, False, call.mechanisms)
    work, seen = (
        _work(block, call.tokens, which, oracle, call.mechanisms, single_token) for which in (kept, _unpadded(kept))
    )
    stored = call.stored.get(layer, entries_held(before.attention.kv_tokens, block.self_attn.window))
    return before, work, stored, _flops(block, work, seen, stored, call.routing)


def _unpadded(kept: Mapping[str, Amount]) -> dict[str, Amount]:
    """Return the counts for projections and MLP, which may leave out padding, by mechanism.

    kept: the counts for attention, each with the others in its field `unpadded` if they differ.
    """
    return {
        name: counts.unpadded or counts if isinstance(counts, TokenCounts) else counts for name, counts in kept.items()
    }


def _whole(flops: Flops) -> Flops:
    """Return the FLOPs with exact fractions converted to floats."""
    return replace(flops, **{field.name: float(getattr(flops, field.name)) for field in fields(flops)})


def _work(
    block: Block, tokens: int, kept: Mapping[str, Amount], oracle: bool, mechanisms: bool, single_token: bool = False
) -> _Work:
    """Return the work of a block for a row of `tokens` tokens.

    kept: the tokens that each mechanism keeps, by name; the configuration decides for others. oracle: whether decisions
    are those of training. mechanisms: False for the dense model. single_token: whether it is a call of one token
    without gradients.
    """
    ran: list[tuple[RoutingModule, float]] = []

    def inside(site: str, counts: TokenCounts) -> TokenCounts:
        for name in block.sites[site] if mechanisms else ():
            mechanism = block.mechanism(name)
            if name in block.mechanisms:  # the mechanism around a segment runs once, in its first block
                ran.append((mechanism, counts.given))
            counts = mechanism.counts_inside(counts, _restriction(kept.get(name)), oracle)
        return counts

    outer = inside("block", inside(SEGMENT, TokenCounts(kv_tokens=tokens, query_tokens=tokens)))
    attention, mlp = inside("attention", outer), inside("mlp", outer)
    asked = mlp.query_tokens if mlp.rows == 1 else mlp.query_tokens * mlp.rows
    ran += [(part, asked) for part in block.mlp.routing_modules().values() if mechanisms or part.built_in]
    passes = block.mlp.passes(asked, kept, single_token) if mechanisms else block.mlp.dense_passes(asked)
    return _Work(attention, mlp, ran, passes)


def _restriction(kept: Amount | None) -> TokenCounts | float | None:
    return float(kept) if isinstance(kept, Fraction) else kept


def _flops(block: Block, work: _Work, unpadded: _Work, stored: float, routing: str) -> Flops:
    """Return the forward FLOPs of a block for a row.

    work: the numbers of tokens for attention scores. unpadded: those for projections and MLP, which may leave out
    padding. stored: cached keys. routing is as in `cost`.
    """
    attention, counts, each = block.self_attn, work.attention, unpadded.attention
    given = weights_multiplied(attention.k_proj) + weights_multiplied(attention.v_proj)
    asked = weights_multiplied(attention.q_proj) + weights_multiplied(attention.o_proj)
    pairs_of_row = _score_pairs(counts, stored, attention.window) * counts.rows
    return Flops(
        attention_linear=2 * (each.kv_tokens * given + each.query_tokens * asked) * each.rows,
        attention_score=4 * pairs_of_row * attention.q_proj.weight.shape[0],
        mlp=2 * unpadded.passes * block.mlp.weights_per_pass(),
        router=sum(mechanism.flops(tokens, routing) for mechanism, tokens in work.mechanisms),
    )


def _score_pairs(counts: TokenCounts, stored: float, window: int | None) -> float:
    """Return the number of pairs of query and key in a row whose scores are computed.

    stored: the number of cached keys. With a window of W slots, of the cached keys at most the newest W - 1 count, and
    of this call's own pairs only those in bands of W queries and 2 W keys if that is fewer.
    """
    own = max(counts.kv_tokens, 1)  # a mean below one token, as in decoding: a query sees itself in full
    if stored or counts.query_tokens != own:
        before = stored if window is None else min(stored, window - 1)
        return counts.query_tokens * (before + own)
    return pairs(own, window)


def _training(block: Block, work: _Work, unpadded: _Work) -> Flops:
    """Return the FLOPs of a forward and backward pass of a block for a row, three times the forward ones.

    Each product has two gradients that cost as much as itself; mechanisms state their own. work and unpadded are as in
    `_flops`.
    """
    forward = _flops(block, work, unpadded, 0, "oracle")
    backward = sum(mechanism.backward_flops(tokens) for mechanism, tokens in work.mechanisms)
    return replace(forward * 3, router=forward.router + backward)


def _head(model: ModelLike, tokens: int) -> Flops:
    head = model.get_output_embeddings()
    return Flops() if head is None else Flops(head=2 * tokens * weights_multiplied(head))


def _step_head(model: ModelLike) -> Flops | None:
    """Return the FLOPs of the output head in a step of one token if it has a preview, else None.

    Such a step computes the preview for all tokens and exact logits for some candidates alone.
    """
    preview = getattr(model, "head_preview", None)
    return Flops(head=preview.flops()) if preview is not None and preview.fits(model.get_output_embeddings()) else None


def _entry_bytes(attention: Attention) -> int:
    """Return how many bytes of cache one token takes in a block: key, value and slot.

    Key and value have the model's dtype, or 16 bits if `cache_format` says so.
    """
    size = compute_dtype(attention.k_proj).itemsize
    return 2 * attention.k_proj.weight.shape[0] * (min(size, 2) if attention.halves else size) + SLOT_BYTES


def _state_bytes(work: _Work) -> float:
    return sum(mechanism.cache_bytes(tokens) for mechanism, tokens in work.mechanisms)


def _parameters(model: ModelLike, mechanisms: bool) -> Parameters:
    decoder, blocks = model.decoder, list(model.decoder.layers)
    own = sum(_numel(m) for block in blocks for m in block.routing_modules().values() if not m.built_in)
    embedding = _numel(decoder.embed_tokens) + _numel(decoder.positions)
    total = _numel(model)
    own, total = (own, total) if mechanisms else (0, total - own)
    left_out = sum(block.mlp.inactive_weights() for block in blocks)
    return Parameters(total=total, embedding=embedding, mechanism=own, active=total - left_out)


def _numel(module: Weighted) -> int:
    return parameter_count(module.parameters())
