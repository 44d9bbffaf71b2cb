#!/usr/bin/env bash
# Package: accelerate 1.15.0 with torch 2.13.0.
# Behaviour: `accelerate launch --cpu --num_processes 2` runs the script in one process and exits with 0; with --multi_gpu
#   in place of --cpu there are two processes, on a machine that has no GPU.
# Output seen on 2026-11-29:
#   --cpu: 1 process
#   --multi_gpu: 2 processes
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 accelerate==1.15.0
cat > "$folder/count.py" <<'PY'
from pathlib import Path

from accelerate import Accelerator

process = Accelerator(cpu=True).process_index
(Path(__file__).parent / f"process-{process}").touch()
PY
count() {
    rm -f "$folder"/process-*
    "$folder/venv/bin/accelerate" launch "$1" --num_processes 2 --num_machines 1 --mixed_precision no \
        --dynamo_backend no --main_process_port 0 "$folder/count.py" >/dev/null 2>&1
    find "$folder" -name 'process-*' | wc -l
}
cpu="$(count --cpu)" multi="$(count --multi_gpu)"
echo "--cpu: $cpu process"
echo "--multi_gpu: $multi processes"
[ "$cpu" = 1 ] && [ "$multi" = 2 ] || { echo "the behaviour has changed" >&2; exit 1; }
