#!/usr/bin/env bash
# Package: torch 2.13.0 (CPU).
# Behaviour: with ties, torch.topk takes neither the lowest indices first, nor nested ones: the indices of the best k are
#   not always among those of the best k + 1. A routine that raises a budget token by token can therefore swap tokens
#   where scores tie. A stable sort does neither.
# Output seen on 2026-11-29:
#   k with indices that are not among those of k + 1: 64 of 16320
#   lowest index first among equals: False
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch

torch.set_num_threads(1)
swaps = steps = 0
for seed in range(64):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (256,), generator=generator).float()
    kept = [set(scores.topk(k).indices.tolist()) for k in range(1, 257)]
    steps += len(kept) - 1
    swaps += sum(not fewer <= more for fewer, more in zip(kept, kept[1:]))
lowest_first = torch.zeros(64).topk(8).indices.tolist() == list(range(8))
print(f"k with indices that are not among those of k + 1: {swaps} of {steps}")
print(f"lowest index first among equals: {lowest_first}")
assert steps == 16320
assert swaps > 0, "the behaviour has changed: the best k are always among the best k + 1"
assert not lowest_first, "the behaviour has changed: the lowest index comes first"
PY
