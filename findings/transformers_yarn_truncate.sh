#!/usr/bin/env bash
# Package: transformers 5.23.0 with torch 2.13.0.
# Behaviour: YaRN's setting "truncate" is documented beside "factor" and read there for models with one RoPE. For models with
#   RoPE parameters for each type of attention (OLMo 3, Gemma 3), all other settings of YaRN are read from the parameters
#   of the type, but "truncate" from the dict around them, so that the documented place has no effect, without a warning.
# Output seen on 2026-11-30:
#   Llama: truncate=False changes the frequencies
#   OLMo 3: truncate=False does not change the frequencies
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cat > "$folder/truncate.py" <<'PY'
import torch
from transformers import LlamaConfig, Olmo3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
SIZES = {"vocab_size": 50, "hidden_size": 128, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 4096}


def llama(**more):
    return ROPE_INIT_FUNCTIONS["yarn"](LlamaConfig(**SIZES, rope_parameters={**YARN, **more}), "cpu")[0]


def olmo3(**more):
    ropes = {"full_attention": {**YARN, **more}, "sliding_attention": PLAIN}
    types = ["sliding_attention", "full_attention"]
    config = Olmo3Config(**SIZES, layer_types=types, rope_parameters=ropes)
    return ROPE_INIT_FUNCTIONS["yarn"](config, "cpu", layer_type="full_attention")[0]


for name, frequencies in (("Llama", llama), ("OLMo 3", olmo3)):
    same = torch.equal(frequencies(), frequencies(truncate=False))
    print(f"{name}: truncate=False {'does not change' if same else 'changes'} the frequencies")
PY
found="$("$folder/venv/bin/python" "$folder/truncate.py" 2>/dev/null)"
echo "$found"
[ "$found" = "$(printf 'Llama: truncate=False changes the frequencies\nOLMo 3: truncate=False does not change the frequencies')" ] ||
    { echo "the behaviour has changed" >&2; exit 1; }
