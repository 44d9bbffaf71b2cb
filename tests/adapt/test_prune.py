"""Pruning removes neuron groups that a calibration set never uses, without changing outputs on that set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from command import command
from generate.folders import text_data, write_run
from models import tiny_model
from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.adapt.export import export_dense
from skipstone.adapt.harden import harden
from skipstone.adapt.prune import prune, used_groups
from skipstone.measure.passes import PASSES

GROUPS: dict[str, Any] = {"group_size": 4, "capacity": 0.25, "chunk_size": 4}
IDS = torch.arange(40).view(2, 20) % 19
VARIANTS: list[dict[str, Any]] = [{}, {"activation": {"name": "polyglu"}, "balance_rate": 0.1}]


def model(balance_rate: float = 0.0, **more: Any) -> SkipstoneForCausalLM:
    sizes = {"vocab_size": 19, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    built = tiny_model(
        1, **sizes, initializer_range=0.3, neuron_groups={**GROUPS, "balance_rate": balance_rate}, **more
    )
    for mechanism in built.routing_modules():
        if hasattr(mechanism, "preference_bias"):
            mechanism.preference_bias.data.normal_()
        else:
            mechanism.score_bias.data[5:].sub_(3.0)  # some groups that nobody uses
    return built


@pytest.mark.parametrize("more", VARIANTS, ids=["plain", "polyglu, balanced"])
@torch.no_grad()
def test_equals_the_whole_model_on_the_calibration_set(more: dict[str, Any]) -> None:
    built = model(**more)
    used = used_groups(built, PASSES["executed"], [{"input_ids": IDS[:1]}, {"input_ids": IDS[1:]}])
    pruned = prune(built, used)
    left = pruned.config.neuron_groups["left"]
    assert left == [int(used_G.sum()) for used_G in used]
    assert all(3 <= count < 12 for count in left)
    torch.testing.assert_close(pruned(IDS).logits, built(IDS).logits)
    mlp: Any = pruned.model.layers[0].mlp
    assert mlp.gate_proj.weight.shape == mlp.up_proj.weight.shape == (4 * left[0], 32)
    assert mlp.down_proj.weight.shape == (32, 4 * left[0])
    assert pruned.num_parameters() < built.num_parameters()
    assert pruned.cost(20).forward.mlp == built.cost(20).forward.mlp


@torch.no_grad()
def test_a_layer_keeps_as_many_as_a_token_needs() -> None:
    built = model()
    pruned = prune(built, [torch.arange(12) == 7] * 3)
    assert pruned.config.neuron_groups["left"] == [3, 3, 3]
    expected = built.model.layers[0].mlp.gate_proj.weight.unflatten(0, (12, 4))[[0, 1, 7]].flatten(0, 1)
    assert torch.equal(pruned.model.layers[0].mlp.gate_proj.weight, expected)
    assert pruned(IDS).logits.isfinite().all()


@torch.no_grad()
def test_command_and_reload(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", text_data(tmp_path), [], neuron_groups=GROUPS)
    assert command("convert", run, tmp_path / "pruned", "--to", "pruned") == 0
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    built = AutoModelForCausalLM.from_pretrained(run / "model")
    tokens = torch.tensor([list("Ein Stück Text, für kle".encode())])
    torch.testing.assert_close(pruned(tokens).logits, built(tokens).logits)
    assert min(pruned.config.neuron_groups["left"]) >= 3


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = write_run(tmp_path / "plain", text_data(tmp_path), [])
    assert command("convert", plain, tmp_path / "out", "--to", "pruned") == 2
    assert "only models with neuron_groups can be pruned" in " ".join(capsys.readouterr().err.split())
    drawn = SkipstoneForCausalLM(SkipstoneConfig(intermediate_size=64, neuron_groups={"decision": "random", **GROUPS}))
    with pytest.raises(ValueError, match="decision 'random' use every group"):
        prune(drawn, [])
    with pytest.raises(ValueError, match="a model with neuron_groups cannot be hardened"):
        harden(model(activation={"name": "polyglu"}))
    model().save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="no dense family has neuron_groups"):
        export_dense(tmp_path / "saved", tmp_path / "dense")
