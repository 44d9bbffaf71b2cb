#!/usr/bin/env bash
# Package: transformers 5.23.0 with torch 2.13.0 and accelerate 1.15.0.
# Behaviour: with label smoothing, Trainer decides by the *name of the model's class* whether labels have to be shifted by
#   one token: it looks the name up in a list of transformers' own classes. A subclass of LlamaForCausalLM under another
#   name is trained to predict the token that it has just read, without a warning; its loss without smoothing is right.
# Output seen on 2026-11-29:
#   LlamaForCausalLM: loss shifted True
#   MyLlama: loss shifted False
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


class MyLlama(LlamaForCausalLM):
    pass


def shifted(kind):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model, ids = kind(config).eval(), torch.randint(0, 50, (2, 12))
    arguments = TrainingArguments("out", label_smoothing_factor=1e-9, use_cpu=True, report_to=[])
    smoothed = Trainer(model=model, args=arguments).compute_loss(model, {"input_ids": ids, "labels": ids})
    return bool(torch.isclose(smoothed, model(input_ids=ids, labels=ids).loss, atol=1e-4))


found = {kind.__name__: shifted(kind) for kind in (LlamaForCausalLM, MyLlama)}
for name, right in found.items():
    print(f"{name}: loss shifted {right}")
assert found == {"LlamaForCausalLM": True, "MyLlama": False}, "the behaviour has changed"
PY
