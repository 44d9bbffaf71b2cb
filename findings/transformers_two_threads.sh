#!/usr/bin/env bash
# Package: transformers 5.23.0 with torch 2.13.0.
# Behaviour: `from transformers import AutoModelForCausalLM` fails in one of two threads that import the package for the
#   first time at once: "module 'transformers' has no attribute ...". The package replaces itself in sys.modules by a
#   lazy module at the end of its import, and the thread that has waited for the other one goes on with the module that
#   was replaced. A server that imports the library in its worker threads needs one import before it starts them.
# Output seen on 2026-11-30:
#   processes in which a thread failed: 2 of 5 (the number varies)
#   processes in which a thread failed, imported once before: 0 of 5
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cat > "$folder/both.py" <<'PY'
import sys
import threading

import torch  # it takes most of the time of the import, and is not the point

if sys.argv[1:] == ["before"]:
    import transformers
together, failed = threading.Barrier(2), []


def use():
    together.wait()
    try:
        from transformers import AutoModelForCausalLM  # noqa: F401
    except (ImportError, AttributeError) as error:
        failed.append(error)


threads = [threading.Thread(target=use) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
if failed:
    print(type(failed[0]).__name__, str(failed[0]).splitlines()[0][:100], file=sys.stderr)
sys.exit(len(failed))
PY
count() {
    local failed=0
    for _ in 1 2 3 4 5; do
        "$folder/venv/bin/python" "$folder/both.py" "$@" || failed=$((failed + 1))
    done
    echo "$failed"
}
first="$(count)"
later="$(count before)"
echo "processes in which a thread failed: $first of 5"
echo "processes in which a thread failed, imported once before: $later of 5"
if [ "$first" -eq 0 ] || [ "$later" -ne 0 ]; then
    echo "the behaviour has changed" >&2
    exit 1
fi
