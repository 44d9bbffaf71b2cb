#!/usr/bin/env bash
# Package: transformers 5.23.0 with torch 2.13.0.
# Behaviour: AutoTokenizer of a saved model whose config.json has custom code for AutoConfig asks in a terminal whether to
#   run the code, and waits 15 seconds for an answer, although tokenizer_config.json names a class of transformers and the
#   tokenizer needs no code at all. Then it loads. It reads the model's configuration before tokenizer_config.json
#   (models/auto/tokenization_auto.py, `AutoTokenizer.from_pretrained`), so nothing in the tokenizer's files avoids the
#   question. `trust_remote_code=False` does, and so does an input that is closed.
# Output seen on 2026-11-29:
#   terminal: asked, waited, loaded TokenizersBackend
#   terminal, trust_remote_code=False: not asked, did not wait, loaded TokenizersBackend
#   closed input: asked, did not wait, loaded TokenizersBackend
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
mkdir "$folder/model"
cat > "$folder/model/config.json" <<'JSON'
{"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
JSON
cat > "$folder/load.py" <<'PY'
import sys
import time

from transformers import AutoTokenizer

began = time.monotonic()
given = {"trust_remote_code": False} if sys.argv[2:] else {}
found = type(AutoTokenizer.from_pretrained(sys.argv[1], **given)).__name__
print("waited" if time.monotonic() - began > 10 else "did not wait", "loaded " + found, sep=", ")
PY
cat > "$folder/all.py" <<'PY'
import os
import pty
import subprocess
import sys

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

folder, load = sys.argv[1:]
PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, []))).save_pretrained(folder)
for name, terminal, more in (
    ("terminal", True, []),
    ("terminal, trust_remote_code=False", True, ["False"]),
    ("closed input", False, []),
):
    leader, follower = pty.openpty() if terminal else (None, subprocess.DEVNULL)
    command = [sys.executable, load, folder, *more]
    done = subprocess.run(command, stdin=follower, capture_output=True, text=True, check=True)
    asked = "asked" if "Do you wish to run the custom code?" in done.stdout else "not asked"
    print(f"{name}: {asked}, {done.stdout.splitlines()[-1].split('[y/N] ')[-1]}")
    if leader is not None:
        os.close(leader)
PY
found="$("$folder/venv/bin/python" "$folder/all.py" "$folder/model" "$folder/load.py" 2>/dev/null)"
echo "$found"
[ "$found" = "$(sed -n '/^# Output seen/,/^set/s/^#   //p' "$0")" ] || { echo "the behaviour has changed" >&2; exit 1; }
