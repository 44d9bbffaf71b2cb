#!/usr/bin/env bash
# Package: transformers 5.23.0 with torch 2.13.0 and gguf 0.19.0.
# Behaviour: a GGUF file of a Llama whose header scales RoPE (llama.rope.scaling.type and .factor), or that holds the tensor
#   rope_freqs.weight, as those of Llama 3.1 and later do, is loaded with plain RoPE, without a warning: the reader leaves out
#   every key and tensor that it does not know. llama.cpp reads both.
# Output seen on 2026-11-30:
#   no scaling: rope_type default
#   linear scaling by 4: rope_type default
#   rope_freqs.weight: rope_type default
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate
cat > "$folder/scaling.py" <<'PY'
import sys

import gguf
import numpy as np
from transformers import AutoModelForCausalLM

SHAPES = {"attn_q": (32, 32), "attn_k": (32, 32), "attn_v": (32, 32), "attn_output": (32, 32)}
SHAPES |= {"ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48), "attn_norm": (32,), "ffn_norm": (32,)}


def loaded(change):
    writer = gguf.GGUFWriter(f"{sys.argv[1]}/a.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(50)
    change(writer)
    for name, shape in {**{f"blk.0.{name}": shape for name, shape in SHAPES.items()}, "token_embd": (50, 32),
                        "output": (50, 32), "output_norm": (32,)}.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file="a.gguf")


def linear(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def factors(writer):
    writer.add_tensor("rope_freqs.weight", np.full(8, 4.0, np.float32))


plain = loaded(lambda writer: None).model.rotary_emb.inv_freq
for name, change in (("no scaling", lambda writer: None), ("linear scaling by 4", linear), ("rope_freqs.weight", factors)):
    model = loaded(change)
    assert (model.model.rotary_emb.inv_freq == plain).all()
    print(f"{name}: rope_type {model.config.rope_parameters['rope_type']}")
PY
found="$("$folder/venv/bin/python" "$folder/scaling.py" "$folder" 2>/dev/null)"
echo "$found"
[ "$(echo "$found" | grep -c 'rope_type default$')" = 3 ] || { echo "the behaviour has changed" >&2; exit 1; }
