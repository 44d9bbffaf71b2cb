#!/usr/bin/env bash
# Package: transformers 5.23.0 with torch 2.13.0.
# Behaviour: a Mistral whose sliding_window is 1, so that each token attends to itself alone, gives other logits with its
#   cache than without: the cached pass goes on to attend to earlier tokens. From a window of 2 on both agree.
# Output seen on 2026-11-29:
#   window 1: the last logits differ
#   window 2: the last logits agree
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cat > "$folder/window.py" <<'PY'
import torch
from transformers import MistralConfig, MistralForCausalLM

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
for window in (1, 2):
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, num_attention_heads=2, num_key_value_heads=2, sliding_window=window)
    model = MistralForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    ids = torch.randint(0, 50, (1, 12))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[:, -1]
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        step = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    agree = torch.allclose(whole, step, atol=1e-3)
    print(f"window {window}: the last logits {'agree' if agree else 'differ'}")
PY
found="$("$folder/venv/bin/python" "$folder/window.py" 2>/dev/null)"
echo "$found"
[ "$found" = "$(printf 'window 1: the last logits differ\nwindow 2: the last logits agree')" ] ||
    { echo "the behaviour has changed" >&2; exit 1; }
