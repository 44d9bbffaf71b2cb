"""Published ways to read fewer weights for a token: small inputs or neurons left out, fewer blocks, few exact logits.

Where inputs, neurons or candidates are chosen anew for every token (TEAL, CATS, the head whose exact logits are few),
this implementation multiplies all weights and only counts those that a kernel would have to read, so these ways show
what the choice costs in quality and are not timed. They return a `Way`: a function that maps T token ids, int64 [1, T],
to logits [T, V] over a vocabulary of V tokens, and one that, called after it, returns the mean number of weights read
per token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone_studies.quality.teal import Site
from skipstone_studies.speed.rivals.source import Logits, calibration, source

MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
SHRINK = 0.1  # of the second moments towards equal ones, because the calibration text is short
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
Way = tuple[Logits, Callable[[], float]]  # the second is asked after the first has run: weights read a token


def weights(model: SkipstoneForCausalLM) -> int:
    """Return the number of weights that `model` reads to decode a token; an untied embedding table does not count."""
    table = 0 if model.head_is_tied else model.model.embed_tokens.weight.numel()
    return sum(p.numel() for p in model.parameters()) - table


def whole(model: SkipstoneForCausalLM) -> Logits:
    """Return a function that computes the logits of `model` for token ids in one pass without a cache.

    The function takes T token ids, int64 [1, T], and returns [T, V] over the V tokens of the vocabulary.
    """

    def logits(ids_1T: Tensor) -> Tensor:
        return model(ids_1T, use_cache=False).logits[0]  # type: ignore[no-any-return]

    return logits


@contextmanager
def _during(model: SkipstoneForCausalLM, sites: dict[nn.Module, Any], after: bool) -> Iterator[None]:
    hooks = [m.register_forward_hook(s) if after else m.register_forward_pre_hook(s) for m, s in sites.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _chosen(name: str, sites: dict[object, Site], sparsity: float, given: dict[Any, Any], after: bool) -> Logits:
    """Set thresholds on the calibration text, and return a function that computes logits with them.

    name: the name of the source model. sites: hooks that set small values to 0, by module. sparsity: share of the
    values that fall below a hook's threshold on the calibration text. given: the functions to register for these
    modules. after: whether they change a module's output instead of its input.
    """
    model = source(name)
    with torch.inference_mode(), _during(model, given, after):
        model(calibration(name), use_cache=False)
    for site in sites.values():
        site.settle(sparsity)

    def logits(ids_1T: Tensor) -> Tensor:
        with _during(model, given, after):
            return model(ids_1T, use_cache=False).logits[0]  # type: ignore[no-any-return]

    return logits


def teal(name: str, sparsity: float) -> Way:
    """Set to 0 those inputs of each matrix that are below its threshold in magnitude (TEAL, arXiv 2408.14690).

    The weights that they multiply need not be read. name: the name of the source model (the checkpoint that is
    decoded). sparsity: share of a matrix's inputs that lie below its threshold on the calibration text, the same for
    all matrices. Returns a function that maps token ids, int64 [1, T], to logits [T, V], and one that, called after it,
    returns the mean number of weights that would be read per token.
    """
    model = source(name)
    sites = {block.get_submodule(path): Site() for block in model.model.layers for path in (*MATRICES, *MLP)}

    def read() -> float:
        spared = (m.weight.numel() * s.zeros / s.inputs for m, s in sites.items())  # type: ignore[union-attr,operator]
        return weights(model) - sum(spared)

    return _chosen(name, sites, sparsity, dict(sites), after=False), read


def cats(name: str, sparsity: float) -> Way:
    """Set to 0 neurons whose activation is below a threshold of their block in magnitude (CATS, arXiv 2404.08763).

    name: the name of the source model (the checkpoint that is decoded). sparsity: share of a block's activations that
    lie below its threshold on the calibration text. Returns a function that maps token ids, int64 [1, T], to logits [T,
    V], and one that, called after it, returns the mean number of weights that would be read per token.
    """
    model = source(name)
    blocks: Any = model.model.layers
    sites = {block.mlp.activation: Site() for block in blocks}

    def hook(site: Site) -> Callable[..., object]:
        def after(module: nn.Module, arguments: object, out: tuple[Tensor, object]) -> tuple[Tensor, object] | None:
            changed = site(module, (out[0],))
            return None if changed is None else (changed[0], out[1])

        return after

    def read() -> float:
        each = 2 * blocks[0].mlp.up_proj.weight.numel()
        return weights(model) - sum(each * site.zeros / site.inputs for site in sites.values())

    return _chosen(name, sites, sparsity, {m: hook(site) for m, site in sites.items()}, after=True), read


@torch.inference_mode()
def narrower(name: str, share: float) -> SkipstoneForCausalLM:
    """Return a copy of the source model without those neurons of every MLP that contribute least.

    A neuron's contribution is the mean magnitude of its input to the down projection, on the calibration text, times
    the norm of its column there. name: the name of the source model (the checkpoint that is decoded). share: share of
    the neurons that is removed.
    """
    model, means = copy.deepcopy(source(name)), {}
    blocks: Any = model.model.layers

    def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        means[module] = arguments[0].abs().mean((0, 1)) * module.weight.norm(dim=0)  # type: ignore[operator,union-attr]

    with _during(model, {block.mlp.down_proj: note for block in blocks}, after=False):
        model(calibration(name), use_cache=False)
    for block in blocks:
        mlp = block.mlp
        kept = (
            means[mlp.down_proj]
            .argsort(descending=True)[: round(len(means[mlp.down_proj]) * (1 - share))]
            .sort()
            .values
        )
        for matrix, axis in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
            matrix.weight = nn.Parameter(matrix.weight.index_select(axis, kept), requires_grad=False)
    return model


@torch.inference_mode()
def shorter(name: str, blocks: int) -> SkipstoneForCausalLM:
    """Return a copy of the source model without the blocks that turn the residual stream least (ShortGPT).

    The measure is block influence (arXiv 2403.03853), from the cosine between a block's input and output on the
    calibration text; the first and the last block stay. name: the name of the source model (the checkpoint that is
    decoded). blocks: number of blocks that are left out.
    """
    model = copy.deepcopy(source(name))
    streams = model.model(calibration(name)[:4], use_cache=False, output_hidden_states=True).hidden_states
    near = [float(torch.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairwise(streams)]
    out = sorted(range(1, len(near) - 1), key=lambda i: -near[i])[:blocks]
    decoder: Any = model.model
    decoder.layers = nn.ModuleList(block for i, block in enumerate(model.model.layers) if i not in out)
    model.config.num_hidden_layers = len(model.model.layers)
    for i, block in enumerate(model.model.layers):
        block.self_attn.layer_idx = i
    return model


@torch.inference_mode()
def previewed(name: str, directions: int, exact: int) -> Way:
    """Compute exact logits for a few candidates only, chosen by a low-rank preview (SVD-softmax, NeurIPS 2017).

    Other tokens keep their previewed logits. name: the name of the source model (the checkpoint that is decoded).
    directions: number of directions of the hidden state that give the preview; they carry most of the logits' variance
    on the calibration text. exact: number of tokens with the highest preview, whose logits are computed in full.
    Returns a function that maps token ids, int64 [1, T], to logits [T, V], and one that returns the number of weights
    that would be read per token.
    """
    model = source(name)
    head, V = model.lm_head.weight.double(), model.lm_head.weight.shape[0]
    states = model.model(calibration(name, 16), use_cache=False).last_hidden_state.flatten(0, 1).double()  # type: ignore[union-attr]
    moment = states.t() @ states / len(states)
    even = moment.trace() / len(moment) * torch.eye(len(moment)).double()
    value, vector = torch.linalg.eigh((1 - SHRINK) * moment + SHRINK * even)
    spread = vector * value.sqrt()  # the states' second moments are spread spread^T
    turn = torch.linalg.eigh(spread.t() @ (head.t() @ head) @ spread)[1].flip(1)
    into = torch.linalg.solve(spread @ turn, torch.eye(len(value)).double()).float()
    rotated = (head @ spread @ turn).float()
    rest_V = rotated[:, directions:].square().sum(1) / 2  # E exp(x) = exp(variance / 2) of what a preview leaves out

    def logits(ids_1T: Tensor) -> Tensor:
        state_TD = model.model(ids_1T, use_cache=False).last_hidden_state[0] @ into.t()  # type: ignore[index]
        preview_TV = state_TD[:, :directions] @ rotated[:, :directions].t() + rest_V
        best_TK = preview_TV.topk(exact).indices
        return preview_TV.scatter(1, best_TK, (state_TD @ rotated.t()).gather(1, best_TK))

    rest = weights(model) - head.numel()
    return logits, lambda: rest + V * directions + exact * (head.shape[1] - directions)
