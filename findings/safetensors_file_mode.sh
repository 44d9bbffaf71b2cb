#!/usr/bin/env bash
# Package: safetensors 0.8.0.
# Behaviour: save_file creates its file with mode 0600, whatever the umask says, because it writes a temporary file and
#   renames it. An existing file that others may read is replaced by one that they may not. So does every library that
#   saves with it: on a shared disk, the configuration and the tokenizer of a saved model can be read by colleagues,
#   its weights cannot. The function serialize returns bytes, which Python writes with the usual mode.
# Output seen on 2026-11-30:
#   save_file: 600
#   save_file over a file of mode 644: 600
#   save and write_bytes: 644
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
umask 022
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.3.5
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys
from pathlib import Path

import numpy
from safetensors.numpy import save, save_file

folder, tensors = Path(sys.argv[1]), {"weight": numpy.zeros(2, dtype=numpy.float32)}


def mode(path):
    return f"{path.stat().st_mode & 0o777:o}"


new, old, plain = folder / "new.safetensors", folder / "old.safetensors", folder / "plain.safetensors"
save_file(tensors, new)
print("save_file:", mode(new))
old.write_bytes(b"")
before = mode(old)
save_file(tensors, old)
print(f"save_file over a file of mode {before}:", mode(old))
plain.write_bytes(save(tensors))
print("save and write_bytes:", mode(plain))
assert before == mode(plain) == "644"
assert mode(new) == mode(old) == "600", "the behaviour has changed: save_file follows the umask"
PY
