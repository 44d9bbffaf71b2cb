"""Modules imported with placeholders are forgotten, and what they said is what the real ones say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from skipstone.train.setup import model_mistakes

SRC = Path(__file__).resolve().parents[2] / "src"
WRONG: list[dict[str, Any]] = [
    {"mechanisms": [{"name": "mixture_of_depths", "capacity": 1.5}, {"name": "tsa"}]},
    {"mechanisms": [{"name": "segment", "layers": [1, 3]}], "hidden_size": "wide"},
    {"mechanisms": [{"name": "token_selective", "layers": "9:", "capacty": 1}], "mlp": "gatd", "dtype": "float32"},
    {"mlp": "experts", "experts": {"top_k": 9}, "hidden_size": 20, "num_attention_heads": 2, "head_dim": 8},
    {"preset": "tiny", "neuron_groups": {"decision": "magnitude", "chunk_size": 4}},
    {"rope_parameters": {"rope_type": "yarn"}, "weight_format": "int8"},
    {"activation": {"name": "fixed_mix", "groups": {"selu": 3}}},
]
LIGHT = f"""
import json, sys
sys.path.insert(0, {str(SRC)!r})
import skipstone.train.early
from skipstone.core.placeholders import HEAVY, checked_lightly
modules = {{*sys.modules}}
models = [*{WRONG!r}, {{"hidden_size": 64}}]
light = [checked_lightly("skipstone.train.setup", "model_mistakes", {{"model": model}}) for model in models]
assert not any(name in sys.modules for name in HEAVY)
assert not [name for name in {{*sys.modules}} - modules if name.startswith("skipstone")]
kept = [vars(module).values() for name, module in {{**sys.modules}}.items() if name != "__main__"]
assert "skipstone.core.placeholders" not in {{type(value).__module__ for values in kept for value in values}}
print(json.dumps(light))
"""
HEAVY = """
from skipstone.train.setup import model_mistakes
assert light == [model_mistakes({"model": model}) for model in models]
from skipstone.model.causal_lm import SkipstoneForCausalLM
from transformers import AutoConfig, PreTrainedModel
assert AutoConfig.for_model("skipstone").model_type == "skipstone"
assert issubclass(SkipstoneForCausalLM, PreTrainedModel)
"""


@pytest.mark.parametrize("then", ["", pytest.param(HEAVY, marks=pytest.mark.slow)], ids=["alone", "before the real"])
def test_mistakes_are_those_that_the_model_would_report(then: str) -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT + then], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *light, sound = json.loads(done.stdout)
    assert all(light)
    assert sound == []
    assert light == [model_mistakes({"model": model}) for model in WRONG]
