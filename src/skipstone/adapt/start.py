"""Least-squares start of routers and skip paths, from the dense checkpoint's behaviour on calibration rows.

At step 0 every token is kept, so the model's first outputs are the checkpoint's whatever the fit. The fit sets only the
order in which routers skip tokens later, and what the skip path puts in place of a skipped token's update. Each depends
on the other: a skip path is fitted on the skipped tokens, and the best tokens to skip are those that it approximates
best. So the two are fitted in turns.

Shape letters: N tokens of all rows, D width, R rank of a skip path.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from skipstone.adapt.flop_budget import depth_mechanisms
from skipstone.adapt.influence import site_streams, token_influence
from skipstone.data.rows import Row
from skipstone.measure.passes import inputs_of, real_tokens
from skipstone.mechanisms import DepthMechanism
from skipstone.mechanisms.skip_path import LowRankSkip
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.nn.block import SEGMENT
from skipstone.nn.magnitude_mlp import MagnitudeMLP
from skipstone.ops.reference import normalised

RIDGE = 1e-2  # as a share of the mean square of a feature
ROUNDS = 3  # of skip path and router; SmolLM2 before training, rank 16: 4.14 nats fitted once each, 4.03 in turns
MEASURED_ROWS = 16
LEAST_SKIPPED = 0.1  # a skip path is fitted on at least this share of the tokens


@torch.no_grad()
def measure_neurons(model: SkipstoneForCausalLM, rows: Sequence[Row]) -> None:
    """Measure the typical size of each MLP neuron's up projection in `model`, by which neuron groups are chosen.

    Only layers that choose groups by magnitude (`MagnitudeMLP`) are measured: their `router.typical_F`, [F] for F
    neurons, becomes the root mean square of the up projection over the tokens of the first 16 batches of `rows`.
    """
    mlps = [module for module in model.modules() if isinstance(module, MagnitudeMLP)]
    squares = [torch.zeros(mlp.up_proj.out_features, dtype=torch.float64) for mlp in mlps]
    seen: list[Tensor] = []
    hooks = [mlp.up_proj.register_forward_hook(lambda module, args, out: seen.append(out)) for mlp in mlps]
    count, was_training = 0, model.training
    model.eval()
    for row in rows[:MEASURED_ROWS] if mlps else ():
        seen.clear()
        inputs = inputs_of(row, model.device)
        model(**inputs, use_cache=False, logits_to_keep=1)
        real_BT = real_tokens(inputs)
        for square_F, up in zip(squares, seen, strict=True):
            up_NF = up[real_BT] if up.shape[:2] == real_BT.shape else up[0]  # which is packed
            square_F += up_NF.double().square().sum(0).cpu()
        count += int(real_BT.sum())
    for hook in hooks:
        hook.remove()
    model.train(was_training)
    for mlp, square_F in zip(mlps, squares, strict=True):
        mlp.router.typical_F.copy_((square_F / count).sqrt())


@torch.no_grad()
def start_measured(model: SkipstoneForCausalLM, source: SkipstoneForCausalLM, rows: Sequence[Row]) -> None:
    """Fit every linear router and low-rank skip path of Mixture-of-Depths to the behaviour of the dense source.

    A router starts as the best linear estimate of the logarithm of how much its block changes a token beyond the skip
    path, scaled to variance 1; a skip path (a low-rank map that replaces the update of skipped tokens) starts as the
    best linear estimate of the update, fitted to the tokens that a perfect router would skip. model: changed in place.
    source: the dense model. rows: batches to measure on, each with its tensors by name. Raises ValueError if there is
    neither a router nor a skip path to fit.
    """
    mixtures = [m for m in depth_mechanisms(model) if any(part is not None for part in m.fitted_parts())]
    if not mixtures:
        raise ValueError(
            "adapt.start 'measured' has no effect: no mixture_of_depths has a linear router or a low-rank skip path"
        )
    places = [_place(model, mechanism) for mechanism in mixtures]
    streams = [
        {(first, last, site): (batch[first][site][0], batch[last][site][1]) for first, last, site in places}
        for batch in site_streams(source, rows)
    ]
    for mechanism, place in zip(mixtures, places, strict=True):
        before, after = (torch.cat([batch[place][side] for batch in streams]) for side in (0, 1))
        influence_N = token_influence(before, after)
        router, skip = mechanism.fitted_parts()
        if skip is not None:
            share = max(1 - (mechanism.capacity or 0.0), LEAST_SKIPPED)
            for _ in range(ROUNDS):
                skipped_N = influence_N <= influence_N.quantile(share)
                fit_skip(skip, before[skipped_N], (after - before)[skipped_N])
                influence_N = token_influence(before + skip.guess(before), after)
        if router is not None:
            seen_ND = normalised(before) if router.norm else before
            router.weight.copy_(guess_influence(seen_ND, influence_N)[None])


def _place(model: SkipstoneForCausalLM, mechanism: DepthMechanism) -> tuple[int, int, str]:
    """Return the first and the last block that a mechanism is around, and the site that it wraps.

    The site is a key of the result of `site_streams`: "block", also for segments, "attention" or "mlp".
    """
    layer, name = mechanism.placement.layer, mechanism.placement.name
    if name in model.decoder.layers[layer].sites[SEGMENT]:
        return layer, layer + model.decoder.layers[layer].span - 1, "block"
    return layer, layer, name.rpartition("_on_")[2] if "_on_" in name else "block"


def guess_influence(seen_ND: Tensor, influence_N: Tensor) -> Tensor:
    """Return router weights, fp32 [D], whose dot product with a token's input predicts the logarithm of its influence.

    The prediction is centred and scaled to variance 1. seen_ND: the router's inputs for N tokens, [N, D]. influence_N:
    [N], how much the block changes each token.
    """
    log_N = influence_N.clamp(min=1e-9).log()
    goal_N = (log_N - log_N.mean()) / log_N.std().clamp(min=1e-9)
    return _least_squares(seen_ND - seen_ND.mean(0), goal_N[:, None])[:, 0].float()


def fit_skip(skip: LowRankSkip, x_ND: Tensor, update_ND: Tensor) -> None:
    """Fit a low-rank skip path by reduced-rank regression, in place.

    The least-squares map from x_ND to update_ND, [N, D] each, is projected on the main directions of its output. Both
    are first divided by the norm of the token's x, because the first token of a row may be a hundred times larger than
    others. skip: its weights are replaced. x_ND: the residual stream before the block for N tokens. update_ND: what the
    block adds to it.
    """
    size_N1 = torch.linalg.vector_norm(x_ND.double(), dim=-1, keepdim=True).clamp(min=1e-9)
    x_ND, update_ND = x_ND / size_N1, update_ND / size_N1
    map_DD = _least_squares(x_ND, update_ND)
    # The main directions are eigenvectors of the squared outputs: a fraction of an SVD's time.
    given_DD = map_DD.T @ (x_ND.T @ x_ND) @ map_DD
    chosen_RD = torch.linalg.eigh(given_DD).eigenvectors.T.flip(0)[: skip.down_weight.shape[0]]
    skip.down_weight[: len(chosen_RD)] = (map_DD @ chosen_RD.T).T.to(skip.down_weight)
    skip.up_weight[:, : len(chosen_RD)] = chosen_RD.T.to(skip.up_weight)


def _least_squares(x_ND: Tensor, y_NK: Tensor) -> Tensor:
    """Return the matrix W [D, K], fp64, for which x_ND W is closest to y_NK, by ridge regression.

    The ridge keeps features that hardly vary from getting large weights.
    """
    x_ND, y_NK = x_ND.double(), y_NK.double()
    square_DD = x_ND.T @ x_ND
    square_DD.diagonal().add_(RIDGE * square_DD.diagonal().mean())
    return torch.linalg.solve(square_DD, x_ND.T @ y_NK)
