"""PolyGLU's feed-forward network beside the SwiGLU of the same matrices, and a hardened one beside SwiGLU in decoding.

    OMP_NUM_THREADS=1 python benchmarks/polyglu.py [--widths 256 512] [--tokens 2048] [--rounds 15] [--out FOLDER]

Training: forward and backward of one MLP, Gumbel noise on and off, in fp32 and under bf16 autocast, with the logits of
a model that begins (tau 1) and with some nats between them at the tau where training ends (.1). Saved: bytes that
autograd keeps for the backward pass, parameters left out. Decoding: one token of one row through a whole model with a
cache. Everything in turns, SwiGLU and the other; medians of the ratios.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from publish import closing, keep, middle, ratios_in_turns, surroundings
from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.adapt.harden import harden
from skipstone.core.tokens import PassMode, Tokens
from skipstone.mechanisms import PolyGLU
from skipstone.nn.mlp import FixedActivation, GatedMLP

ROWS = 8
STEPS = 20  # decoded tokens a round
TAUS = (1.0, 0.1)  # of routers as they start, and as if trained


def mlps(width: int) -> tuple[GatedMLP, GatedMLP]:
    """PolyGLU and SwiGLU, with equal matrices."""
    neurons = -(-8 * width // 96) * 32
    ours = GatedMLP(width, neurons, PolyGLU(width, neurons))
    theirs = GatedMLP(width, neurons, FixedActivation("silu"))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    return ours, theirs


def step(mlp: GatedMLP, x_BTD: Tensor, tokens: Tokens, bf16: bool) -> Callable[[], None]:
    def run() -> None:
        mlp.zero_grad(set_to_none=True)
        x_BTD.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y_BTD, _ = mlp(x_BTD, tokens)
        y_BTD.square().sum().backward()

    return run


def saved_bytes(mlp: GatedMLP, x_BTD: Tensor, tokens: Tokens, bf16: bool) -> int:
    """Distinct memory that the forward pass keeps, without parameters and their copies in bf16."""
    seen: dict[int, int] = {}
    weights = {p.numel() for p in mlp.parameters()}

    def pack(x: Tensor) -> Tensor:
        if x.numel() not in weights:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        kept = mlp(x_BTD, tokens)
    del kept
    return sum(seen.values())


@torch.no_grad()
def as_if_trained(activation: PolyGLU) -> None:
    """Some five nats between the logits of a token, a third of a nat between those of neurons; tau at its end."""
    for weight, spread in ((activation.context_weight, 0.3), (activation.mix_weight, 1.0)):
        nn.init.normal_(weight, 0.0, spread)
    nn.init.normal_(activation.preference_bias, 0.0, 0.3)
    activation.tau.fill_(TAUS[1])


def training(width: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    rows = []
    x_BTD = torch.randn(ROWS, tokens // ROWS, width, requires_grad=True)
    slot = torch.arange(tokens // ROWS)[None]
    for tau, bf16, noise in itertools.product(TAUS, (False, True), (False, True)):
        ours, theirs = mlps(width)
        if tau < 1:
            as_if_trained(ours.activation)  # type: ignore[arg-type]
        given = Tokens(slot_BT=slot, position_BT=slot, mode=PassMode(noise=noise))
        ratios = ratios_in_turns(step(ours, x_BTD, given, bf16), step(theirs, x_BTD, given, bf16), rounds)
        saved = [saved_bytes(mlp, x_BTD, given, bf16) for mlp in (ours, theirs)]
        named = {"width": width, "precision": "bf16" if bf16 else "fp32", "noise": noise, "tau": tau}
        rows.append({**named, "time": middle(ratios), "saved": saved[0] / saved[1]})
    return rows


def decoding(width: int, rounds: int) -> dict[str, Any]:
    """A hardened model with a quarter of the neurons for each activation, and SwiGLU."""
    values = {"vocab_size": 256, "hidden_size": width, "num_hidden_layers": 6, "num_attention_heads": width // 64}
    routed = SkipstoneForCausalLM(SkipstoneConfig(**values, activation={"name": "polyglu"})).eval()
    for mechanism in routed.routing_modules():
        nn.init.normal_(mechanism.preference_bias)
    theirs = SkipstoneForCausalLM(SkipstoneConfig(**values)).eval()
    return {"width": width, "time": middle(ratios_in_turns(decode(harden(routed)), decode(theirs), rounds))}


def decode(model: SkipstoneForCausalLM) -> Callable[[], None]:
    cache, token_B1 = DynamicCache(config=model.config), torch.zeros(1, 1, dtype=torch.long)

    @torch.no_grad()
    def run() -> None:
        for _ in range(STEPS):
            model(token_B1, past_key_values=cache)
        cache.crop(-STEPS)

    return run


def page(figures: dict[str, Any]) -> str:
    lines = ["| width | precision | tau | noise | time / SwiGLU | least to greatest | saved bytes / SwiGLU |"]
    lines.append("|---|---|---:|---|---:|---:|---:|")
    for row in figures["training"]:
        time, noise = row["time"], "on" if row["noise"] else "off"
        spread = f"{time['min']:.2f} to {time['max']:.2f}"
        shown = f"| {time['median']:.2f} | {spread} | {row['saved']:.2f} |"
        lines.append(f"| {row['width']} | {row['precision']} | {row['tau']:g} | {noise} {shown}")
    lines += ["", "| width | decoding, hardened / SwiGLU | least to greatest |", "|---|---:|---:|"]
    for row in figures["decoding"]:
        time = row["time"]
        lines.append(f"| {row['width']} | {time['median']:.3f} | {time['min']:.3f} to {time['max']:.3f} |")
    return "\n".join([*lines, "", closing("python benchmarks/polyglu.py", figures["environment"]), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="folder to publish in, such as results")
    given = parser.parse_args()
    torch.manual_seed(0)
    figures = {
        "training": [row for width in given.widths for row in training(width, given.tokens, given.rounds)],
        "decoding": [decoding(width, given.rounds) for width in given.widths],
        "environment": surroundings(),
    }
    keep(given.out, "polyglu_cost", "PolyGLU beside SwiGLU: cost", figures, page(figures))


if __name__ == "__main__":
    main()
