"""The configuration: derived defaults, and one clear line for invalid values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from skipstone import SkipstoneConfig, SkipstoneForCausalLM

MOD = "mixture_of_depths"


def test_defaults_that_follow_from_others() -> None:
    config = SkipstoneConfig(hidden_size=96, num_attention_heads=3)
    assert (config.intermediate_size, config.head_dim, config.num_key_value_heads) == (256, 32, 3)
    assert SkipstoneConfig(hidden_size=96, num_attention_heads=3, mlp="plain").intermediate_size == 384
    assert config.mechanisms == []
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"mechanisms": [{"name": "mixture_of_dephts"}]},
            r"unknown mechanisms\[0\].name 'mixture_of_dephts'; did you mean",
        ),
        ({"mechanisms": [{"capacity": 0.5}]}, r"unknown mechanisms\[0\].name None"),
        (
            {"mechanisms": [{"name": MOD, "capcity": 0.5}]},
            r"unknown key in mechanisms\[0\] 'capcity'; did you mean 'capacity'",
        ),
        ({"mechanisms": [{"name": MOD, "capacity": 2}]}, r"mechanisms\[0\]: capacity must be in \(0, 1\], got 2"),
        ({"mechanisms": [{"name": MOD, "capacity": "x"}]}, r"mechanisms\[0\].capacity must be float, got 'x'"),
        ({"mechanisms": [{"name": MOD, "on": "mpl"}]}, r"unknown mechanisms\[0\].on 'mpl'; did you mean 'mlp'"),
        (
            {"mechanisms": [{"name": MOD, "layers": "9:"}]},
            r"mechanisms\[0\].layers '9:' matches none of the model's 6 blocks",
        ),
        ({"mechanisms": [{"name": MOD, "layers": [9]}]}, r"mechanisms\[0\].layers names block 9"),
        (
            {"mechanisms": [{"name": MOD}, {"name": MOD}]},
            r"mechanisms\[1\]: mixture_of_depths sits twice on the same block",
        ),
        ({"mechanisms": [MOD]}, "mechanisms"),
        ({"mechanisms": {"name": MOD}}, "mechanisms"),
        ({"norm": "rsmnorm"}, "unknown norm 'rsmnorm'; did you mean 'rmsnorm'"),
        ({"mlp": "gatde"}, "unknown mlp 'gatde'; did you mean 'gated'"),
        ({"positions": "roep"}, "unknown positions 'roep'; did you mean 'rope'"),
        ({"activation": "silo"}, "unknown activation 'silo'; did you mean 'silu'"),
        ({"activation": {"nam": "silu"}}, "unknown activation None"),
        ({"activation": {"name": "silu", "tau": 1}}, "unknown key in activation 'silu' 'tau'"),
        (
            {"activation": {"name": "polyglu", "tua_end": 0.1}},
            "unknown key in activation 'tua_end'; did you mean 'tau_end'",
        ),
        ({"activation": {"name": "polyglu", "tau_end": 0}}, r"activation: tau_end must be in"),
        ({"activation": "polyglu", "mlp": "plain"}, "activation 'polyglu' needs mlp 'gated', got 'plain'"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}},
            "rope_type 'dynamic' changes its frequencies",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.5}},
            r"partial_rotary_factor must be in \(0, 1\], got 1.5",
        ),
        (
            {"rope_parameters": {"rope_type": "yran", "rope_theta": 1e4}},
            "unknown rope_type 'yran'; did you mean 'yarn'",
        ),
        ({"attention_window": 0}, "attention_window must be at least 1 slot, got 0"),
        ({"window_layers": "::2"}, "window_layers is set, but attention_window is not"),
        ({"attention_window": 4, "window_layers": [9]}, "window_layers names block 9"),
        ({"attention_window": 4, "window_rope_parameters": {}}, "window_rope_parameters.rope_theta is missing"),
        ({"positions": "learned", "rope_layers": [0]}, "rope_layers needs positions 'rope'"),
        ({"norm_placement": "shared"}, "norm_placement 'shared' needs parallel_residual"),
        ({"norm_placement": "afer"}, "unknown norm_placement 'afer'; did you mean 'after'"),
        ({"logit_soft_cap": -1.0}, "logit_soft_cap must be above 0, got -1.0"),
        ({"format_version": 7}, "format_version 7 is not known to this release, which reads 1"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1, got 0"),
        ({"vocab_size": -1}, "vocab_size must be at least 1, got -1"),
        ({"hidden_size": 60, "num_attention_heads": 4}, "head_dim must be even with positions 'rope'"),
        ({"attention_dropout": 1.5}, r"attention_dropout must be in \[0, 1\), got 1.5"),
        (
            {"hidden_size": 33, "num_attention_heads": 8},
            r"hidden_size \(33\) must be a multiple of",
        ),
        ({"initializer_range": 0}, "initializer_range must be above 0, got 0"),
        ({"head_dim": 1}, "head_dim must be even"),
        ({"pad_token_id": 1000}, "pad_token_id must be"),
        ({"eos_token_id": [3, -5]}, "eos_token_id must be .* got -5"),
        ({"num_hidden_layers": 2**31}, "num_hidden_layers must be at most 65,536"),
        ({"hidden_size": 10**9}, "TiB in fp32"),
        ({"vocab_size": 10**12}, "TiB in fp32"),
        ({"mlp": "experts", "experts": {"count": 10**11}}, "TiB in fp32"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta must be a number, got 'x'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "rope_parameters.factor must be a number above 0"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": math.nan}}, "factor must be a number above 0, got nan"),
        ({"rope_parameters": {"rope_theta": math.inf}}, "rope_theta must be a number above 0, got inf"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            r"low_freq_factor \(4\) must be below high_freq_factor \(4\)",
        ),
        ({"norm_eps": -1.0}, "norm_eps must be above 0, got -1.0"),
        ({"hiden_size": 64}, "unknown key in model 'hiden_size'; did you mean 'hidden_size'"),
    ],
    ids=str,
)
def test_recipes_that_cannot_be_built(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        SkipstoneConfig.from_plain(values)
    assert "\n" not in str(error.value)


def test_the_same_mechanism_may_sit_on_several_sites_and_on_other_blocks() -> None:
    config = SkipstoneConfig(
        hidden_size=32,
        mechanisms=[
            {"name": MOD, "layers": "0::2"},
            {"name": MOD, "layers": "1::2", "capacity": 0.5},
            {"name": MOD, "on": "mlp", "layers": [0]},
        ],
    )
    blocks = SkipstoneForCausalLM(config).model.layers
    assert [list(b.mechanisms) for b in blocks[:2]] == [[MOD, f"{MOD}_on_mlp"], [MOD]]
    assert [b.mechanisms[MOD].capacity for b in blocks] == [0.125, 0.5] * 3
    assert [b.mechanisms[MOD].placement.index for b in blocks] == [0, 0, 1, 1, 2, 2]
    assert all(b.mechanisms[MOD].placement.count == 3 for b in blocks)


def test_defaults_of_layers() -> None:
    config = SkipstoneConfig(hidden_size=32, mechanisms=[{"name": MOD}, {"name": "token_selective"}])
    blocks = SkipstoneForCausalLM(config).model.layers
    assert [list(b.mechanisms) for b in blocks[:3]] == [[], [MOD, "token_selective"], ["token_selective"]]


def test_configuration_is_plain_json_and_comes_back(tmp_path: Path) -> None:
    values = {"hidden_size": 32, "mechanisms": [{"name": MOD, "layers": "1::2", "capacity": 0.5}]}
    config = SkipstoneConfig(**values, activation={"name": "polyglu", "tau_end": 0.2})
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["mechanisms"] == values["mechanisms"]
    assert stored["activation"] == {"name": "polyglu", "tau_end": 0.2}
    assert stored["format_version"] == 1
    again = SkipstoneConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()


def test_the_callers_dicts_are_not_touched() -> None:
    entry = {"name": MOD, "capacity": 0.5}
    config = SkipstoneConfig(hidden_size=32, mechanisms=[entry])
    with pytest.raises(TypeError):
        config.mechanisms[0]["capacity"] = 1.0
    entry["capacity"] = 0.25
    assert config.mechanisms == [{"name": MOD, "capacity": 0.5}]
    config.mechanisms[0].plain()["capacity"] = 1.0
    assert config.mechanisms == [{"name": MOD, "capacity": 0.5}]


def test_fields_are_known_without_transformers() -> None:
    from transformers import PreTrainedConfig

    from skipstone.model.fields import FOREIGN, TYPES

    theirs = {name for name in PreTrainedConfig.__dataclass_fields__ if not name.startswith("_")}
    assert {*FOREIGN} <= theirs
    assert not {*FOREIGN} & {*TYPES}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hiden_size": 8}, "unknown key 'hiden_size'; did you mean 'hidden_size'"),
        ({"mechanism": []}, "unknown key 'mechanism'; did you mean 'mechanisms'"),
        ({"dtype": "float7"}, "dtype must be a type of torch, such as 'bfloat16', got 'float7'"),
    ],
)
def test_mistyped_keys_do_not_leave_the_default(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkipstoneConfig(**given)


def test_keys_of_other_families_are_kept_as_transformers_does() -> None:
    config = SkipstoneConfig(moe_intermediate_size=3, my_own="x")
    assert (config.moe_intermediate_size, config.my_own) == (3, "x")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"mechanisms": [{"name": "early_exit", "start_bias": float("nan")}]},
            r"mechanisms\[0\].*start_bias must be finite",
        ),
        (
            {"mechanisms": [{"name": "mixture_of_depths", "z_loss": float("inf")}]},
            r"mechanisms\[0\].*z_loss must be finite",
        ),
        ({"activation": {"name": "polyglu", "price": float("inf")}}, "price must be"),
    ],
)
def test_options_are_finite(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkipstoneConfig(**given)
