"""Part of the GPU study: fast forms of four functions compared with their references in results and gradients.

They are PolyGLU's mixture (Triton), a mixture of experts (grouped products), the chunked loss of the head, and routers'
scores. The mixture is timed as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skipstone.core.strict import PlainDict
from skipstone.ops import compile_friendly, grouped, head_loss, reference
from skipstone_studies.speed.gpu.bench import Bench, compared, in_turns

# Relative to the greatest number of a tensor. bf16 has 8 bits of precision; sums over tokens collect its rounding.
TOLERANCES = {torch.float32: 3e-5, torch.bfloat16: 2e-2}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
PLACES = ("result", "d gate", "d static", "d dynamic")


def measure(bench: Bench) -> None:
    """Compare each kernel with its reference, then time PolyGLU's mixture of activations in a large MLP.

    bench: gives the device and the sizes, and stores for each kernel its largest error, the tolerance and whether the
    error is within it, and the milliseconds of the mixture.
    """
    for dtype, static, dynamic in itertools.product(TOLERANCES, (1, "rows"), (1, "tokens")):
        name = f"PolyGLU mixture, {NAMES[dtype]}, static part per {'row' if static == 'rows' else 'model'}, "
        name += f"dynamic part per {'token' if dynamic == 'tokens' else 'row'}"
        bench.measure(name, mixture, dtype, static == "rows", dynamic == "tokens")
    for dtype in TOLERANCES:
        bench.measure(f"experts by grouped products, {NAMES[dtype]}", experts, dtype)
    bench.measure("chunked head loss, fp32", head)
    bench.measure("router scores, fp32", scores)
    bench.measure("PolyGLU mixture, times in bf16", times)


def triton_kernels() -> Any:
    """Return the module of Triton kernels.

    Raises ValueError if Triton is not installed.
    """
    if find_spec("triton") is None:
        raise ValueError("Triton is not installed")
    return import_module("skipstone.ops.fused")


def graded(run: Callable[..., Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """Return the output of `run` for the inputs `given`, followed by the gradient of each input.

    Gradients are those of a weighted sum of the output, with fixed weights between -1 and 1.
    """
    leaves = [x.detach().clone().requires_grad_() for x in given]
    out = run(*leaves)
    weight = torch.linspace(-1, 1, max(out.numel(), 1), device=out.device)[: out.numel()].view_as(out)
    return [out, *torch.autograd.grad((out.float() * weight).sum(), leaves)]


def mixture_inputs(bench: Bench, dtype: torch.dtype, per_row: bool, per_token: bool) -> list[Tensor]:
    """Return random inputs of PolyGLU's mixture of 4 activations: [gate, static, dynamic].

    gate: the values that the activations are applied to, [rows, tokens, neurons] in `dtype`. static: each neuron's
    logits, [rows or 1, neurons, 4] in fp32, different for every row if `per_row`. dynamic: logits that all neurons
    share, [rows, tokens or 1, 4] in fp32, different for every token if `per_token`. The sizes are those of `bench`.
    """
    rows, tokens, neurons = (bench.sizes[name] for name in ("rows", "tokens", "neurons"))
    gate = torch.randn(rows, tokens, neurons).to(bench.device, dtype)
    static = torch.randn(rows if per_row else 1, neurons, 4).to(bench.device)
    dynamic = 3 * torch.randn(rows, tokens if per_token else 1, 4).to(bench.device)
    return [gate, static, dynamic]


def mixture(bench: Bench, dtype: torch.dtype, per_row: bool, per_token: bool) -> PlainDict:
    """Compare the Triton kernel of PolyGLU's mixture with the reference in fp32, at temperature .5.

    bench: gives the device and the sizes. dtype: the dtype of the gate values. per_row: whether static logits differ
    between rows. per_token: whether dynamic logits differ between tokens. Keys of the result: `error` (the largest of
    the output and of every gradient, relative for large values), `tolerance`, `equal` (1 or 0) and `of` (all errors, as
    text). Raises ValueError without Triton.
    """
    given = mixture_inputs(bench, dtype, per_row, per_token)
    fused = triton_kernels()
    got = graded(lambda g, s, d: fused.mix_activations(g, s, d, 0.5), given)
    wanted = graded(lambda g, s, d: reference.mix_activations(g, s, d, 0.5), [x.float() for x in given])
    return compared(dict(zip(PLACES, zip(got, wanted, strict=True), strict=True)), TOLERANCES[dtype])


def experts(bench: Bench, dtype: torch.dtype) -> PlainDict:
    """Compare a mixture of experts by grouped products with the reference.

    Some choices of tokens are no-ops, and one expert is chosen by no token. bench: gives the device and the sizes.
    dtype: the dtype of inputs and matrices. Keys of the result: `error` (the largest of the output and of every
    gradient, relative for large values), `tolerance`, `equal` (1 or 0) and `of` (all errors, as text).
    """
    count, width, neurons, choices = 4, bench.sizes["width"], bench.sizes["neurons"], 2
    tokens = bench.sizes["rows"] * bench.sizes["tokens"]
    expert_NC = torch.rand(tokens, count - 1).argsort(1)[:, :choices].to(bench.device)
    idle_NC = (torch.rand(tokens, choices) < 0.3).to(bench.device)
    shapes = [(tokens, width), (count, neurons, width), (count, neurons, width), (count, width, neurons)]
    scales = [1.0, width**-0.5, width**-0.5, neurons**-0.5]
    x, *matrices = [(torch.randn(shape) * s).to(bench.device, dtype) for shape, s in zip(shapes, scales, strict=True)]
    weight_NC = torch.rand(tokens, choices).to(bench.device)

    def by(backend: Any) -> list[Tensor]:
        def run(x: Tensor, weight: Tensor, *of: Tensor) -> Tensor:
            return backend.apply_experts(x, expert_NC, weight, idle_NC, *of, F.silu)  # type: ignore[no-any-return]

        return graded(run, [x, weight_NC, *matrices])

    names = ("result", "d x", "d weights", "d gate", "d up", "d down")
    return compared(dict(zip(names, zip(by(grouped), by(reference), strict=True), strict=True)), TOLERANCES[dtype])


def head(bench: Bench) -> PlainDict:
    """Compare the cross-entropy of an output head, computed in chunks of tokens, with that from all logits at once.

    bench: gives the device and the sizes. Keys of the result: `error` (the largest of the loss and its gradients,
    relative for large values), `tolerance`, `equal` (1 or 0) and `of` (all errors, as text).
    """
    tokens, width, vocabulary = bench.sizes["rows"] * bench.sizes["tokens"], bench.sizes["width"], 8 * 61
    x = torch.randn(tokens, width).to(bench.device)
    weight = (torch.randn(vocabulary, width) * width**-0.5).to(bench.device)
    target = torch.randint(0, vocabulary, (tokens,)).to(bench.device)
    got = graded(lambda a, w: head_loss.linear_cross_entropy(a, w, target, max(tokens // 3, 1)), [x, weight])
    wanted = graded(lambda a, w: head_loss.plain_linear_cross_entropy(a, w, target), [x, weight])
    return compared(dict(zip(("loss", "d x", "d weight"), zip(got, wanted, strict=True), strict=True)), 1e-4)


def scores(bench: Bench) -> PlainDict:
    """Compare the routers' memory-saving score function with the reference, in scores and gradients.

    It keeps fewer bytes for the backward pass. bench: gives the device and the sizes. Keys of the result: `error` (the
    largest of the scores and their gradients, relative for large values), `tolerance`, `equal` (1 or 0) and `of` (all
    errors, as text).
    """
    width = bench.sizes["width"]
    x = torch.randn(bench.sizes["rows"], bench.sizes["tokens"], width).to(bench.device)
    weight = torch.randn(1, width).to(bench.device)
    memory_saving = import_module("skipstone.ops.score_linear")  # the package has a function of this name
    got, wanted = (
        graded(lambda a, w, m=module: m.score_linear(a, w, None, True), [x, weight])
        for module in (memory_saving, reference)
    )
    return compared(dict(zip(("score", "d x", "d weight"), zip(got, wanted, strict=True), strict=True)), 1e-4)


def times(bench: Bench) -> PlainDict:
    """Time forward and backward pass of PolyGLU's mixture of activations in bf16, in turns, by several implementations.

    bench: gives the device and the sizes. Keys of the result: milliseconds as `reference_ms`, `compiled_ms`
    (torch.compile) and, if "time_triton" is set in the sizes, `triton_ms`.
    """
    sizes = {**bench.sizes, **bench.sizes["timed"]}
    given = mixture_inputs(Bench(out=bench.out, device=bench.device, sizes=sizes), torch.bfloat16, False, True)
    leaves, weight = [x.requires_grad_() for x in given], torch.randn_like(given[0])
    compiled = torch.compile(compile_friendly.mix_activations, backend=bench.sizes["backend"])
    ways: dict[str, Callable[..., Tensor]] = {"reference": reference.mix_activations, "compiled": compiled}
    if bench.sizes["time_triton"]:
        ways["triton"] = triton_kernels().mix_activations
    runs = {name: (lambda w=way: torch.autograd.grad(w(*leaves, 0.5), leaves, weight)) for name, way in ways.items()}
    taken = in_turns(bench, runs, bench.sizes["rounds"])
    return {f"{name}_ms": found["ms"] for name, found in taken.items()}
