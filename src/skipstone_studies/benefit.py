"""How much a block's update of a token lowers the loss of the token's prediction, and how much of it a router can know.

    benefit_i = loss_i without the update of token i - loss_i with it

is measured on a trained dense model by passes that skip random halves of the tokens in one unit (a block, or several
that are skipped together), each token once kept and once skipped. Then the model is run with only a share of the tokens
kept, chosen by different scores. The benefit itself looks at the labels, so it is an upper bound; its regression on the
residual stream that enters the unit, fitted on other rows, bounds what a causal router can reach without training the
model further. If that is no better than random, no router will help this model. Skipped tokens still give keys and
values.

Shape letters: B rows, T tokens, N tokens of all rows, D width, F features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from skipstone.core.strict import PlainDict
from skipstone.data.rows import IGNORE, Row
from skipstone.measure.losses import token_nats
from skipstone.measure.passes import inputs_of, targets
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig
from skipstone.ops.reference import normalised

SHARES = (0.125, 0.25, 0.5)
ORACLE, CAUSAL, RANDOM = "benefit", "regression on the stream", "random"
SCORES = (ORACLE, CAUSAL, "entropy", "gradient norm", "surprise", RANDOM)
ROWS = 8  # of a pass
FEATURES = 512  # random ones, beside the stream itself
RIDGES = (1e-2, 1e-1, 1.0, 10.0)  # as shares of the mean square of a feature
HELD_OUT = 4  # every fourth token chooses the ridge

Unit = tuple[int, ...]  # blocks that are skipped together


def maskable(model: SkipstoneForCausalLM) -> SkipstoneForCausalLM:
    """Return a copy of a dense model whose blocks skip the tokens that `forward(routing=...)` tells them to skip.

    The copy is fp32 and has no gradients. Skipped tokens still provide keys and values. Raises ValueError for a model
    that has depth mechanisms (which choose the tokens that a block updates) already.
    """
    if any(len(block.mechanisms) for block in model.decoder.layers):
        raise ValueError("the benefit of blocks is measured on a dense model, and this one has depth mechanisms")
    entry = {"name": "mixture_of_depths", "layers": "0::1", "capacity": 1.0, "decision": "forced", "kv": "full"}
    built = SkipstoneForCausalLM(SkipstoneConfig(**{**model.config.to_dict(), "mechanisms": [entry]}))
    missing, unexpected = built.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert all(".mechanisms." in name for name in missing)
    return built.to(dtype=torch.float32).eval().requires_grad_(False)  # type: ignore[no-any-return]


@dataclass(kw_only=True)
class Traced:
    """The figures of each of N tokens in one pass of the whole model, from which routers' scores are derived.

    A unit is a group of blocks that are skipped together. nats: fp32 [N], loss of predicting the next token, 0 where
    there is no label. predicted: bool [N], where there is a label. entropy: fp32 [N], entropy of the prediction in
    nats. surprise: fp32 [N], loss of predicting the token itself, 0 for the first token of a row. gradient: for each
    unit, fp32 [N], the norm of the loss's gradient at the output of the unit's last block. stream: for each unit, fp32
    [N, D], the residual stream that enters its first block, divided by its root mean square.
    """

    nats: Tensor
    predicted: Tensor
    entropy: Tensor
    surprise: Tensor
    gradient: dict[Unit, Tensor]
    stream: dict[Unit, Tensor]


@dataclass(kw_only=True)
class _Seen:
    inputs: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)


def trace(model: SkipstoneForCausalLM, rows: Sequence[Row], units: Sequence[Unit]) -> Traced:
    """Run the whole model over rows and return the figures of each of their N tokens, as `Traced` describes them.

    model: a model that `maskable` returned. rows: dicts of input tensors [T] by name, with labels, of equal length.
    units: tuples of indices of blocks that are skipped together.
    """
    parts: list[Traced] = []
    for batch in _batches(rows):
        with _watched(model) as seen, torch.enable_grad():
            logits_BTV = model(**inputs_of(batch, model.device), use_cache=False).logits
            nats_BT = token_nats(logits_BTV, targets(batch))
            pulls = torch.autograd.grad(nats_BT.sum(), [seen.outputs[unit[-1]] for unit in units])
        log_p_BTV = logits_BTV.detach().float().log_softmax(-1)
        surprise_BT = torch.cat([torch.zeros_like(nats_BT[:, :1]), nats_BT.detach()[:, :-1]], 1)
        norms = (torch.linalg.vector_norm(pull, dim=-1).flatten() for pull in pulls)
        streams = (normalised(seen.inputs[unit[0]].detach().float()).flatten(0, 1) for unit in units)
        parts.append(
            Traced(
                nats=nats_BT.detach().flatten(),
                predicted=(targets(batch) != IGNORE).flatten(),
                entropy=-(log_p_BTV.exp() * log_p_BTV).sum(-1).flatten(),
                surprise=surprise_BT.flatten(),
                gradient=dict(zip(units, norms, strict=True)),
                stream=dict(zip(units, streams, strict=True)),
            )
        )
    return Traced(
        nats=torch.cat([part.nats for part in parts]),
        predicted=torch.cat([part.predicted for part in parts]),
        entropy=torch.cat([part.entropy for part in parts]),
        surprise=torch.cat([part.surprise for part in parts]),
        gradient={unit: torch.cat([part.gradient[unit] for part in parts]) for unit in units},
        stream={unit: torch.cat([part.stream[unit] for part in parts]) for unit in units},
    )


class _watched:
    """A context in which the inputs and outputs of all blocks of a model are kept, together with autograd's graph.

    The graph begins at the input of block 0, so gradients with respect to any of them can be taken.
    """

    def __init__(self, model: SkipstoneForCausalLM) -> None:
        self.blocks = model.decoder.layers
        self.seen = _Seen()

    def __enter__(self) -> _Seen:
        seen = self.seen
        self.hooks = [self.blocks[0].register_forward_pre_hook(lambda _, args: (args[0].requires_grad_(), *args[1:]))]
        for i, block in enumerate(self.blocks):
            self.hooks += [
                block.register_forward_pre_hook(lambda _, args, i=i: seen.inputs.__setitem__(i, args[0])),
                block.register_forward_hook(lambda _, args, out, i=i: seen.outputs.__setitem__(i, out[0])),
            ]
        return seen

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def nats_with(model: SkipstoneForCausalLM, rows: Sequence[Row], unit: Unit, kept_N: Tensor) -> Tensor:
    """Return the loss in nats of predicting the token after each of N tokens if some blocks update only some tokens.

    model: a model that `maskable` returned. The result is fp32 [N], 0 where there is no label. rows: dicts of input
    tensors [T] by name, with labels, of equal length. unit: indices of the blocks. kept_N: bool, the tokens that these
    blocks update, over all rows in order.
    """
    found, at = [], 0
    for batch in _batches(rows):
        shape = batch["input_ids"].shape
        kept_BT = kept_N[at : at + shape.numel()].view(shape)
        at += shape.numel()
        routing = dict.fromkeys(unit, kept_BT.to(model.device))
        out = model(**inputs_of(batch, model.device), routing=routing, use_cache=False)
        found.append(token_nats(out.logits, targets(batch)).flatten())
    return torch.cat(found)


def measured_benefit(
    model: SkipstoneForCausalLM, rows: Sequence[Row], unit: Unit, repeats: int, generator: torch.Generator
) -> Tensor:
    """Return by how many nats the update of a token by some blocks lowers the loss of its prediction, fp32 [N].

    It is the loss without the update minus the loss with it, each measured while these blocks skip a random half of all
    tokens. model: a model that `maskable` returned. rows: dicts of input tensors [T] by name, with labels, of equal
    length; N counts their tokens. unit: indices of the blocks, which are skipped together. repeats: number of random
    halves to average over, each followed by its complement. generator: the source of the halves.
    """
    count = sum(row["input_ids"].numel() for row in rows)
    total_N = torch.zeros(count)
    for _ in range(repeats):
        half_N = torch.rand(count, generator=generator) < 0.5
        one_N, other_N = nats_with(model, rows, unit, half_N), nats_with(model, rows, unit, ~half_N)
        total_N += torch.where(half_N, other_N - one_N, one_N - other_N)
    return total_N / repeats


class Regression:
    """A ridge regression that predicts the benefit of a unit for a token from what a router sees as it decides.

    A unit is a group of blocks that are skipped together; its benefit is the number of nats by which these blocks lower
    the token's loss. Inputs are the residual stream, random rectified features of it, and the token's surprise. Calling
    it with a stream [N, D] and surprises [N] returns the predicted benefits in nats, fp32 [N]. stream_ND: fp32, the
    normalised stream of the N tokens to fit. surprise_N: fp32, the loss of predicting the token itself, in nats.
    benefit_N: fp32, the targets. generator: the source of the random features. Of several ridge strengths, it takes the
    one that, fitted to the other tokens, predicts every fourth token best.
    """

    def __init__(self, stream_ND: Tensor, surprise_N: Tensor, benefit_N: Tensor, generator: torch.Generator) -> None:
        width = stream_ND.shape[1]
        self.turn_DF = torch.randn(width, FEATURES, generator=generator) / math.sqrt(width)
        x_NF, y_N = self._features(stream_ND, surprise_N), benefit_N.double()
        held = torch.arange(len(y_N)) % HELD_OUT == 0
        fits = {ridge: _solve(x_NF[~held], y_N[~held], ridge) for ridge in RIDGES}
        self.ridge = min(fits, key=lambda ridge: float((x_NF[held] @ fits[ridge] - y_N[held]).square().mean()))
        self.weight_F = _solve(x_NF, y_N, self.ridge)

    def _features(self, stream_ND: Tensor, surprise_N: Tensor) -> Tensor:
        turned_NF = (stream_ND @ self.turn_DF).relu()
        own = [torch.ones(len(stream_ND), 1), surprise_N[:, None].log1p(), stream_ND, turned_NF]
        return torch.cat(own, 1).double()

    def __call__(self, stream_ND: Tensor, surprise_N: Tensor) -> Tensor:
        """Return the predicted benefit in nats, fp32 [N], for inputs as the class describes them."""
        return (self._features(stream_ND, surprise_N) @ self.weight_F).float()


def _solve(x_NF: Tensor, y_N: Tensor, ridge: float) -> Tensor:
    square_FF = x_NF.T @ x_NF
    square_FF.diagonal()[1:].add_(ridge * square_FF.diagonal().mean())  # the constant is not shrunk
    return torch.linalg.solve(square_FF, x_NF.T @ y_N)


def top(score_N: Tensor, share: float) -> Tensor:
    """Return a bool mask [N] of the tokens with the highest scores.

    score_N: the scores. share: the number of chosen tokens divided by N, from 0 to 1; the number is rounded.
    """
    count = round(share * len(score_N))
    kept_N = torch.zeros(len(score_N), dtype=torch.bool)
    kept_N[score_N.topk(count).indices] = True
    return kept_N


def oracle(
    model: SkipstoneForCausalLM,
    fit: Sequence[Row],
    held_out: Sequence[Row],
    units: Sequence[Unit],
    *,
    repeats: int = 2,
    seed: int = 0,
    marked: Mapping[str, Tensor] | None = None,
) -> PlainDict:
    """Measure how much blocks of a dense model lower each token's loss, and how well scores find the tokens that gain.

    model: the dense model. fit: rows (dicts of tensors [T] with labels) to which a regression of this benefit is
    fitted. held_out: rows on which everything else is measured. units: tuples of indices of blocks that are skipped
    together. repeats: number of random halves of the tokens over which the benefit is averaged. seed: the seed of all
    random choices. marked: further ways to choose tokens, by name: a bool mask [N] over the tokens of `held_out`, where
    marked tokens rank before all others and chance ranks within both groups. Returns plain values, to be stored as
    figures of the run: `loss` of the whole model in nats per prediction; `predictions` and `fit_predictions`, the
    numbers of labels in both sets of rows; `repeats`; and `units`, with these keys for each: `blocks`; `removed`, the
    loss without them; `mean_benefit` in nats; `explained`, the share of the benefit's variance that the regression
    predicts; `correlation` of each score with the benefit, by the score's name; `kept`, the loss if the blocks update
    only the tokens with the highest scores, {share of tokens as text: {score: loss}}. Losses are in nats per
    prediction. Scores are "benefit", "regression on the stream", "entropy", "gradient norm", "surprise", "random" and
    the names in `marked`.
    """
    plain, generator = maskable(model), torch.Generator().manual_seed(seed)
    first, second = trace(plain, fit, units), trace(plain, held_out, units)
    found = []
    for unit in units:
        learned_N = measured_benefit(plain, fit, unit, repeats, generator)
        true_N = measured_benefit(plain, held_out, unit, repeats, generator)
        known = first.predicted
        predict = Regression(first.stream[unit][known], first.surprise[known], learned_N[known], generator)
        scores = {
            ORACLE: true_N,
            CAUSAL: predict(second.stream[unit], second.surprise),
            "entropy": second.entropy,
            "gradient norm": second.gradient[unit],
            "surprise": second.surprise,
            RANDOM: torch.rand(len(true_N), generator=generator),
        }
        for name, marked_N in (marked or {}).items():
            scores[name] = marked_N + torch.rand(len(true_N), generator=generator)
        found.append(_of_unit(plain, held_out, unit, scores, second.predicted))
    return {
        "loss": float(second.nats[second.predicted].double().mean()),
        "predictions": int(second.predicted.sum()),
        "fit_predictions": int(first.predicted.sum()),
        "repeats": repeats,
        "units": found,
    }


def _of_unit(
    model: SkipstoneForCausalLM, rows: Sequence[Row], unit: Unit, scores: Mapping[str, Tensor], predicted_N: Tensor
) -> PlainDict:
    def loss(kept_N: Tensor) -> float:
        return float(nats_with(model, rows, unit, kept_N)[predicted_N].double().mean())

    true_N, guess_N = (scores[name][predicted_N].double() for name in (ORACLE, CAUSAL))
    unexplained = (true_N - guess_N).square().mean() / true_N.var(unbiased=False).clamp(min=1e-30)
    return {
        "blocks": list(unit),
        "removed": loss(torch.zeros_like(predicted_N)),
        "mean_benefit": float(true_N.mean()),
        "explained": float(1 - unexplained),
        "correlation": {name: _correlation(score_N[predicted_N], true_N) for name, score_N in scores.items()},
        "kept": {
            f"{share:g}": {name: loss(top(score_N, share)) for name, score_N in scores.items()} for share in SHARES
        },
    }


def _correlation(a_N: Tensor, b_N: Tensor) -> float:
    value = float(torch.corrcoef(torch.stack([a_N.double(), b_N.double()]))[0, 1])
    return value if math.isfinite(value) else 0.0


def _batches(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield rows of equal length, `ROWS` at a time."""
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        yield {name: torch.stack([row[name] for row in part]) for name in part[0]}
