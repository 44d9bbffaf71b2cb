"""Watch which tokens skip: train a small routed model for a minute and print its depth map of a line of code.

Run it with `python examples/watch_who_skips.py`. A byte-level model with Mixture-of-Depths on every second block learns
from the Python sources of the standard library. Then each character of a line is printed with the blocks that computed
it, and the characters are sorted by how many blocks they received.
"""

from __future__ import annotations

import sys
import sysconfig
from collections import defaultdict
from pathlib import Path

import torch
from transformers import TrainingArguments

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.train import RoutingTrainer

CONTEXT, ROWS = 192, 8
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 80
LINE = "    def forward(self, hidden_states, mask=None):\n        return self.norm(x + 1)"


def rows(number: int) -> list[dict[str, torch.Tensor]]:
    """Return rows of bytes from the standard library; a causal model's labels are its inputs."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:60])
    draw = torch.Generator().manual_seed(0)
    begins = torch.randint(len(text) - CONTEXT, (number,), generator=draw).tolist()
    parts = [torch.tensor(list(text[begin : begin + CONTEXT])) for begin in begins]
    return [{"input_ids": part, "labels": part} for part in parts]


def trained() -> SkipstoneForCausalLM:
    """Train a model of four blocks, two of them routed. `RoutingTrainer` is a Trainer that also advances thresholds."""
    torch.manual_seed(0)
    routed = {"name": "mixture_of_depths", "layers": "1::2", "capacity": 0.3, "decision": "ema_threshold"}
    config = SkipstoneConfig(hidden_size=96, num_hidden_layers=4, mechanisms=[routed])
    arguments = TrainingArguments(
        "unused", max_steps=STEPS, per_device_train_batch_size=ROWS, learning_rate=3e-3, use_cpu=True,
        save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=max(1, STEPS // 4),
    )  # fmt: skip
    model = SkipstoneForCausalLM(config)
    RoutingTrainer(model=model, args=arguments, train_dataset=rows(STEPS * ROWS)).train()
    return model.eval()


@torch.no_grad()
def depths(model: SkipstoneForCausalLM, text: str) -> list[list[bool]]:
    """Return which characters each routed block computed, decided causally as in generation."""
    ids = torch.tensor([list(text.encode())])
    records = model(ids, routing="causal", output_records=True).records
    return [record.kept_BT[0].tolist() for layer in records for record in layer.values()]


def main() -> None:
    """Train, and print which characters were computed."""
    model = trained()
    kept = depths(model, LINE)
    print(f"\n{LINE}\n")
    for number, block in zip(range(1, 8, 2), kept, strict=False):
        shown = "".join("\n" if c == "\n" else c if keep else "·" for c, keep in zip(LINE, block, strict=True))
        print(f"computed by block {number} ({sum(block) / len(block):.0%} of the characters):\n{shown}\n")
    received: dict[int, list[str]] = defaultdict(list)
    for character, *keeps in zip(LINE, *kept, strict=True):
        received[sum(keeps)].append(character)
    for number in sorted(received, reverse=True):
        print(f"{number} of {len(kept)} routed blocks: {''.join(sorted(set(received[number]))).strip()}")
    promised, dense = model.cost(tokens=CONTEXT), model.cost(tokens=CONTEXT).dense
    assert dense is not None
    print(f"FLOPs a token: {promised.forward_per_token.total:,.0f}, {promised.ratio:.0%} of the dense model's")


if __name__ == "__main__":
    main()
