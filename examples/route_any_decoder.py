"""Route tokens around the blocks of a decoder that Skipstone has no code for: a small mixture of experts.

Run it with `python examples/route_any_decoder.py`. It trains a byte-level Qwen3-MoE of transformers on the Python
sources of the standard library, puts Mixture-of-Depths around every second block in place, and trains on. It prints
losses, the FLOPs that execute, and what the model writes with its own cache and without.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import skipstone
from skipstone.measure.flops import count_flops

CONTEXT, ROWS = 128, 8
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 100


def decoder() -> Qwen3MoeForCausalLM:
    """Return a decoder that reads bytes and predicts the next byte."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=24,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, max_position_embeddings=CONTEXT,
        pad_token_id=None, bos_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def corpus() -> Tensor:
    """Return the Python files of the standard library as one tensor of bytes."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:60])
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def train(model: Qwen3MoeForCausalLM, text: Tensor, after: Callable[[float], None]) -> float:
    """Train for `STEPS` steps and return the mean loss of the last ten in nats per byte.

    after: called after each step with the progress, from 0 to 1.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    draw = torch.Generator().manual_seed(0)
    losses = []
    for step in range(STEPS):
        begins = torch.randint(len(text) - CONTEXT, (ROWS,), generator=draw)
        rows = torch.stack([text[begin : begin + CONTEXT] for begin in begins.tolist()])
        loss = model.train()(rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after((step + 1) / STEPS)
        losses.append(loss.item())
    return sum(losses[-10:]) / len(losses[-10:])


@torch.no_grad()
def report(name: str, model: Qwen3MoeForCausalLM, text: Tensor) -> None:
    """Print the loss on rows that were not used in training, and FLOPs per token."""
    rows = text[-ROWS * CONTEXT :].view(ROWS, CONTEXT)
    loss = model.eval()(rows, labels=rows).loss
    flops = count_flops(lambda: model(rows)).total / rows.numel()
    print(f"{name:<8} loss {loss:.3f} nats a byte, {flops:,.0f} FLOPs a token")


def main() -> None:
    """Train, route, train further, generate."""
    text = corpus()
    model = decoder()
    train(model, text[: -ROWS * CONTEXT], after=lambda progress: None)
    report("dense", model, text)

    mechanisms = [{"name": "mixture_of_depths", "layers": "1::2", "capacity": 0.25}]
    routed = skipstone.route(model, mechanisms, dense_start=True)  # computes what the dense model computes, at first
    train(model, text[: -ROWS * CONTEXT], after=routed.advance)  # the capacity falls, thresholds follow the scores
    report("routed", model, text)
    print(f"tokens times blocks that were computed: {routed.kept_share():.0%}")

    prompt = torch.tensor([list(b"def forward(self")])
    write = {"max_new_tokens": 24, "do_sample": False}
    with_cache, without = (model.generate(prompt, use_cache=cached, **write) for cached in (True, False))
    print(bytes(with_cache[0].tolist()).decode(errors="replace"))
    print("the same without a cache:", torch.equal(with_cache, without))


if __name__ == "__main__":
    main()
