#!/usr/bin/env bash
# Package: torch 2.13.0 (CPU).
# Behaviour: torch.utils.flop_counter.FlopCounterMode reports 0 FLOPs for scaled_dot_product_attention on a CPU, and for
#   matrix-vector products (torch.mv), without a warning. The same attention written as two matrix products is counted.
#   A model's count therefore depends on which kernel its attention happens to use.
# Output seen on 2026-11-29:
#   scaled_dot_product_attention: 0
#   the same by two products: 1048576
#   mv: 0, the same by mm: 8192
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch
from torch.utils.flop_counter import FlopCounterMode


def counted(work):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops()


q, k, v = (torch.randn(1, 2, 64, 32) for _ in range(3))
matrix, vector = torch.randn(64, 64), torch.randn(64)
fused = counted(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
plain = counted(lambda: (q @ k.transpose(-2, -1)).softmax(-1) @ v)
mv, mm = counted(lambda: matrix.mv(vector)), counted(lambda: matrix @ vector[:, None])
print(f"scaled_dot_product_attention: {fused}\nthe same by two products: {plain}\nmv: {mv}, the same by mm: {mm}")
assert plain == 4 * 2 * 64 * 64 * 32 and mm == 2 * 64 * 64
assert fused == 0, "the behaviour has changed: attention is counted"
assert mv == 0, "the behaviour has changed: mv is counted"
PY
