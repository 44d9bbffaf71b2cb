"""A family that is registered from outside: StableLM. docs/add-a-family.md explains it step by step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig, StableLmConfig

from pages import Page, unformatted
from skipstone.adapt.export import export_dense
from skipstone.core.strict import choose
from skipstone.model.config import SkipstoneConfig
from skipstone.model.families import FAMILIES, register
from skipstone.model.families.base import ACTIVATIONS, Family, Options, rope_back, shared
from skipstone.model.pretrained import convert, load_model, load_pretrained
from skipstone_studies.speed import parity


def read(theirs: PreTrainedConfig) -> Options:
    return {
        **shared(theirs),
        "intermediate_size": theirs.intermediate_size,
        "num_key_value_heads": theirs.num_key_value_heads,
        "norm": "layernorm",
        "norm_eps": theirs.layer_norm_eps,
        "norm_placement": "shared" if theirs.use_parallel_residual else "before",
        "parallel_residual": theirs.use_parallel_residual,
        "rope_parameters": dict(theirs.rope_parameters),
        "attention_bias": theirs.use_qkv_bias,
        "activation": choose("hidden_act", theirs.hidden_act, ACTIVATIONS),
        "attention_dropout": theirs.attention_dropout,
        "mlp_dropout": theirs.hidden_dropout,
    }


def write(config: SkipstoneConfig, activation: str) -> Options:
    return {
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_key_value_heads,
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel_residual,
        "rope_parameters": {"partial_rotary_factor": 1.0, **rope_back(config)},
        "use_qkv_bias": config.attention_bias,
        "hidden_act": activation,
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": config.mlp_dropout or 0.0,
    }


STABLELM = Family(read=read, write=write, only={"qk_layernorm": (False,)})
CASES = {
    "parallel": StableLmConfig(**parity.SIZE, use_parallel_residual=True, rope_parameters=parity.PARTIAL),
    "sequential": StableLmConfig(
        **parity.SIZE, use_qkv_bias=True, tie_word_embeddings=True, rope_parameters=parity.PARTIAL
    ),
}


@pytest.fixture
def registered() -> Iterator[None]:
    register("stablelm", STABLELM)
    yield
    del FAMILIES["stablelm"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("registered")
def test_both_directions(case: str, tmp_path: Path) -> None:
    parity.save_random(CASES[case], tmp_path / "source")
    found = parity.measure(tmp_path / "source", length=20, tokens=6)
    assert found.fp32 < 1e-5
    assert found.generation
    convert(tmp_path / "source", tmp_path / "ours")
    assert load_model(tmp_path / "ours").config.family == "stablelm"
    export_dense(tmp_path / "ours", tmp_path / "back")
    a, b = (parity.theirs(tmp_path / name) for name in ("source", "back"))
    assert type(a) is type(b)
    assert all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


@pytest.mark.usefixtures("registered")
def test_a_setting_that_is_not_computed_and_a_name_that_is_taken(tmp_path: Path) -> None:
    StableLmConfig(**parity.SIZE, qk_layernorm=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"qk_layernorm=True is not supported \(only False\)"):
        load_pretrained(tmp_path)
    with pytest.raises(ValueError, match="architecture 'stablelm' is registered already"):
        register("stablelm", STABLELM)


def test_the_page_has_the_code_of_this_file() -> None:
    blocks = Page("docs/add-a-family.md").blocks()
    assert len(blocks) >= 3
    code = unformatted(Path(__file__).read_text(encoding="utf-8"))
    assert all(unformatted(block) in code for block in blocks)
