"""Where a decoding step goes when rows disagree: forced decisions at several shares, beside the dense model.

    python benchmarks/decode_batches.py [--rows 8] [--width 256] [--blocks 6]

Every other block routes; each row keeps its token with the given share, drawn anew each step. Milliseconds a step, the
median of turns taken by all cases in one process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import DynamicCache

from skipstone import SkipstoneConfig, SkipstoneForCausalLM

SHARES = (0.0, 0.125, 0.5, 1.0)
PROMPT, STEPS, TURNS = 64, 48, 9


def model_of(width: int, blocks: int, routed: bool) -> SkipstoneForCausalLM:
    mechanisms = [{"name": "mixture_of_depths", "layers": "1::2", "decision": "forced"}] if routed else []
    return SkipstoneForCausalLM(
        SkipstoneConfig(
            vocab_size=256,
            hidden_size=width,
            num_hidden_layers=blocks,
            num_attention_heads=width // 64,
            mechanisms=mechanisms,
        )
    ).eval()


def decoding(model: SkipstoneForCausalLM, rows: int, share: float | None) -> Callable[[], float]:
    """A turn: seconds a step after a prompt, at one share of kept tokens; None for a model without routing."""
    ids = torch.randint(0, 256, (rows, PROMPT), generator=torch.Generator().manual_seed(0))
    routed = [i for i, block in enumerate(model.model.layers) if block.mechanisms]

    @torch.inference_mode()
    def turn() -> float:
        draw = torch.Generator().manual_seed(1)

        def decisions(length: int) -> dict[int, torch.Tensor]:
            return {i: torch.rand(rows, length, generator=draw) < (share or 0.0) for i in routed}

        cache = DynamicCache(config=model.config)
        token = model(ids, past_key_values=cache, routing=decisions(PROMPT)).logits[:, -1:].argmax(-1)
        each = [decisions(1) for _ in range(STEPS)]
        start = time.perf_counter()
        for routing in each:
            token = model(token, past_key_values=cache, routing=routing).logits[:, -1:].argmax(-1)
        return (time.perf_counter() - start) / STEPS

    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=6)
    size = parser.parse_args()
    dense, routed = (model_of(size.width, size.blocks, kind) for kind in (False, True))
    cases = {"dense": decoding(dense, size.rows, None)}
    cases |= {f"keeps {share:.1%}": decoding(routed, size.rows, share) for share in SHARES}
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(TURNS):
        for name, turn in cases.items():
            taken[name].append(turn())
    middle = {name: statistics.median(times) for name, times in taken.items()}
    print(f"| {size.rows} rows, d {size.width}, {size.blocks} blocks | ms a step | x dense speed |\n|---|---:|---:|")
    for name, seconds in middle.items():
        print(f"| {name} | {1e3 * seconds:.2f} | {middle['dense'] / seconds:.2f} |")


if __name__ == "__main__":
    main()
