#!/usr/bin/env bash
# Package: transformers 5.23.0 with marimo 0.25.2.
# Behaviour: where marimo has been imported and IPython is not installed, `from transformers import Trainer` fails: it
#   takes a process that holds marimo for a notebook of IPython's. Without `import marimo`, the same import works.
# Output seen on 2026-11-29:
#   alone: Trainer
#   after marimo: Could not import module 'Trainer'. Are this object's requirements defined correctly?
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
    accelerate==1.15.0 marimo==0.25.2
alone="$("$folder/venv/bin/python" -c 'from transformers import Trainer; print(Trainer.__name__)')"
after="$("$folder/venv/bin/python" - <<'PY'
import marimo  # noqa: F401

try:
    from transformers import Trainer

    print(Trainer.__name__)
except ModuleNotFoundError as error:
    print(str(error).partition("?")[0] + "?")
PY
)"
echo "alone: $alone"
echo "after marimo: $after"
[ "$alone" = Trainer ] && [ "$after" != Trainer ] || { echo "the behaviour has changed" >&2; exit 1; }
