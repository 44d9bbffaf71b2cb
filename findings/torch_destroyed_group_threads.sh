#!/usr/bin/env bash
# Package: torch 2.13.0.
# Behaviour: `torch.distributed.destroy_process_group()` ends a gloo group's threads only if nobody refers to the group.
#   A `DeviceMesh` does, and DTensor's caches keep the mesh after the program has dropped every DTensor and the mesh. So
#   after a single product of DTensors, the threads of the destroyed group live on until the process ends, or until a
#   cache drops the mesh, which may happen in a forked process that does not have these threads.
# Output seen on 2026-11-30:
#   threads left after destroy_process_group: 0
#   threads left after destroy_process_group and a product of DTensors: 3
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/threads.py" <<'PY'
import gc
import os
import sys
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def threads():
    gc.collect()
    return len(os.listdir("/proc/self/task"))


def use_a_group(product):
    with tempfile.TemporaryDirectory() as store:
        dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=0, world_size=1)
        if product:
            weight = distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
            (weight @ weight).full_tensor()
        dist.destroy_process_group()


left = []
for product in (False, True):
    before = threads()
    use_a_group(product)
    left.append(threads() - before)
print("threads left after destroy_process_group:", left[0])
print("threads left after destroy_process_group and a product of DTensors:", left[1])
if left[0] or not left[1]:
    sys.exit("the behaviour has changed")
PY
"$folder/venv/bin/python" "$folder/threads.py"
