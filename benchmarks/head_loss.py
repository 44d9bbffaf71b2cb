"""The loss of a large vocabulary with all logits at once, in chunks, and by PyTorch's own chunked function.

    OMP_NUM_THREADS=1 python benchmarks/head_loss.py [--vocabulary 151936] [--tokens 2048] [--width 1024]
                                                     [--chunks 256 1024] [--precision fp32 bf16] [--turns 3] [--torch]

Forward and backward of head and loss alone, from a hidden state that needs a gradient. For its memory each case runs in
a process of its own: the most that it ever held beyond weight and hidden states (VmHWM, gradients included). Times are
medians of turns that all cases take one after the other in one process: CPU time, which other programs disturb less,
and wall clock. bf16 is autocast over fp32 weights, as `skipstone train` does it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from skipstone.ops.head_loss import linear_cross_entropy, plain_linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(chunks: list[int], torchs: bool = False) -> dict[str, Loss]:
    found: dict[str, Loss] = {"all logits": plain_linear_cross_entropy}
    for chunk in chunks:
        found[f"chunks of {chunk}"] = lambda x, w, t, chunk=chunk: linear_cross_entropy(x, w, t, chunk)
    theirs = getattr(F, "linear_cross_entropy", None)
    if torchs and theirs is not None:  # torch 2.13 and later
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch's"] = lambda x, w, t: theirs(x, w, t, reduction="sum", options=options)
    return found


def inputs(size: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weight = torch.empty(size.vocabulary, size.width).normal_(0, 0.02).requires_grad_()
    x = torch.randn(size.tokens, size.width).requires_grad_()
    return x, weight, torch.randint(size.vocabulary, (size.tokens,))


def step(loss: Loss, given: tuple[Tensor, Tensor, Tensor], precision: str) -> float:
    for tensor in given[:2]:
        tensor.grad = None
    with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
        found = loss(*given)
    found.backward()
    return found.item()


def peak() -> int:
    """The most memory that this process ever held, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def memory(name: str, size: argparse.Namespace, precision: str) -> float:
    """GiB, from a process of its own."""
    words = [sys.executable, __file__, "--only", name, "--precision", precision]
    for option in ("vocabulary", "tokens", "width"):
        words += [f"--{option}", str(getattr(size, option))]
    words += ["--chunks", *map(str, size.chunks), *(["--torch"] if size.torch else [])]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--chunks", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--torch", action="store_true", help="PyTorch's function too, which takes minutes on a CPU")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    size = parser.parse_args()
    given, losses = inputs(size), cases(size.chunks, size.torch)
    if size.only:
        before = peak()
        step(losses[size.only], given, size.precision[0])
        print((peak() - before) / 2**30)
        return
    print(
        f"{size.tokens} tokens, vocabulary {size.vocabulary}, width {size.width}, {torch.get_num_threads()} thread(s)"
    )
    print(f"{'':>18} {'loss':>10} {'GiB':>6} {'CPU s':>7} {'wall s':>7}")
    for precision in size.precision:
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in losses}
        values = {name: step(loss, given, precision) for name, loss in losses.items()}  # warm
        for _ in range(size.turns):
            for name, loss in losses.items():
                cpu, wall = time.process_time(), time.perf_counter()
                step(loss, given, precision)
                times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
        for name in losses:
            cpu, wall = (statistics.median(column) for column in zip(*times[name], strict=True))
            gib = memory(name, size, precision)
            print(
                f"{name:>13} {precision} {values[name] / size.tokens:10.6f} {gib:6.2f} {cpu:7.2f} {wall:7.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
