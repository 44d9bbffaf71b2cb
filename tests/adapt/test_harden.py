"""A hardened PolyGLU computes what its neurons' strongest activations compute, and has no router."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from generate.folders import MOD, text_data, write_run
from models import tiny_model
from skipstone import SkipstoneForCausalLM
from skipstone.adapt.export import export_dense
from skipstone.adapt.harden import harden, mean_logits
from skipstone.evaluate.evaluation import evaluate
from skipstone.generate.engine import generate
from skipstone.measure.losses import hard_mix
from skipstone.measure.passes import PASSES
from skipstone_cli.main import main

IDS = torch.arange(40).view(2, 20) % 19


def model(**more: Any) -> SkipstoneForCausalLM:
    """Every neuron has a preference of its own, every context adds the same."""
    sizes = {"vocab_size": 19, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    built = tiny_model(1, **{**sizes, "activation": {"name": "polyglu"}, "initializer_range": 0.3, **more})
    for mechanism in (m for m in built.routing_modules() if m.placement.name == "polyglu"):
        mechanism.preference_bias.data.normal_()
        mechanism.mix_weight.data.zero_()
        mechanism.mix_bias.data.normal_()
    return built


def dynamic(built: SkipstoneForCausalLM) -> list[torch.Tensor]:
    return mean_logits(built, PASSES["executed"], [{"input_ids": IDS[:1]}, {"input_ids": IDS[1:]}])


VARIANTS: list[dict[str, Any]] = [
    {},
    {"mlp_bias": True, "tie_word_embeddings": True},
    {"mechanisms": [{**MOD, "capacity": 0.5}], "activation": {"name": "polyglu", "preference_scale": 3.0}},
]


@pytest.mark.parametrize("more", VARIANTS, ids=["plain", "bias, tied", "mixture of depths"])
@torch.no_grad()
def test_equals_the_strongest_activations(more: dict[str, Any]) -> None:
    built = model(**more)
    hardened = harden(built, dynamic(built))
    groups = hardened.config.activation["groups"]
    assert all(sum(of.values()) == 48 and list(of) == sorted(of) and 0 < max(of.values()) < 48 for of in groups)
    soft = built(IDS).logits
    with hard_mix(built):
        expected = built(IDS).logits
    torch.testing.assert_close(hardened(IDS).logits, expected, rtol=0, atol=2e-5)
    assert (soft - expected).abs().max() > 1e-3, "the mix was hard from the start"
    assert torch.equal(built(IDS).logits, soft), "tau came back"


@torch.no_grad()
def test_is_exact_where_nothing_is_mixed(tmp_path: Path) -> None:
    built = model()
    for mechanism in built.routing_modules():
        best_F = mechanism.preference_bias.argmax(-1)
        mechanism.preference_bias.copy_(1000 * torch.nn.functional.one_hot(best_F, 4))
        mechanism.mix_bias.zero_()
    hardened = harden(built)
    assert not [name for name in hardened.state_dict() if "activation" in name]
    assert not list(hardened.routing_modules())
    hardened.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, built(IDS).logits, rtol=0, atol=1e-5)
    assert torch.equal(generate(loaded, IDS, max_new_tokens=8), loaded.generate(IDS, max_new_tokens=8, do_sample=False))
    assert torch.equal(generate(loaded, IDS, max_new_tokens=8), generate(built, IDS, max_new_tokens=8))


@torch.no_grad()
def test_what_the_context_adds_is_a_mean_over_tokens() -> None:
    built = model()
    for mechanism in built.routing_modules():
        mechanism.mix_weight.normal_()
    records = built(IDS, output_records=True).records
    for found, decided in zip(dynamic(built), records, strict=True):
        torch.testing.assert_close(found, decided["polyglu"].logits_BTA.mean((0, 1)))


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run = write_run(tmp_path / "run", text_data(tmp_path / "text"), [], {"name": "polyglu"})

    def command(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["skipstone", "convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0)

    assert command(run, tmp_path / "out", "--to", "hardened") == 0
    found = evaluate(tmp_path / "out", corpus=f"text:{tmp_path / 'text'}", context=24)
    assert found.hard_mix is None
    assert found.measured["executed"].loss == pytest.approx(evaluate(run).hard_mix.loss, rel=0.2)
    assert "fixed_mix" in (tmp_path / "out" / "README.md").read_text()
    refused = {
        (run, tmp_path / "out", "--to", "hardened"): "exists already",
        (run, tmp_path / "new", "--to", "dense", "--corpus", "x"): "--corpus has no effect without --to hardened",
        (tmp_path / "run" / "model", tmp_path / "new", "--to", "hardened"): "name the corpus to calibrate on",
        (write_run(tmp_path / "silu", text_data(tmp_path / "t"), []), tmp_path / "new", "--to", "hardened"): "only act",
    }
    for arguments, message in refused.items():
        assert command(*arguments) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"silu": 40}, "activation.groups of layer 0 have 40 neurons, but intermediate_size is 48"),
        ([{"silu": 48}, {"silu": 40, "relu": 8}], "activation.groups has 2 entries, but there are 3 layers"),
        ([{"silu": 48}, {"silu": 40}, {"silu": 48}], "of layer 1 have 40 neurons"),
        ({"slu": 48}, "unknown function in groups 'slu'; did you mean 'silu'"),
        ({"silu": -1, "relu": 49}, "groups.silu must be a number of neurons, got -1"),
        ({"silu": 0.5, "relu": 0.4}, "groups must be shares that add up to 1, got 0.9"),
        ({"silu": 0.5, "relu": 24}, "groups.relu must be a share of neurons, as another one is, got 24"),
        (None, "activation.groups"),
    ],
)
def test_groups_that_do_not_fit(groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        model(activation={"name": "fixed_mix", "groups": groups})
    assert "\n" not in str(error.value)


def test_groups_may_be_shares() -> None:
    mixes = [{"gelu": 0.5, "silu": 0.5}, {"relu": 1.0}, {"gelu": 0.3, "relu": 0.3, "silu": 0.4}]
    built = model(activation={"name": "fixed_mix", "groups": mixes})
    found = [layer.mlp.activation.groups for layer in built.model.layers]
    assert found == [{"gelu": 24, "silu": 24}, {"relu": 48}, {"gelu": 14, "relu": 15, "silu": 19}]


def test_a_fixed_mix_is_no_dense_family_unless_it_is_one_function(tmp_path: Path) -> None:
    for name, groups in (("mixed", {"silu": 24, "gelu": 24}), ("same", {"silu": 48})):
        model(activation={"name": "fixed_mix", "groups": groups}).save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="activation fixed_mix cannot be removed: its neurons use gelu, silu"):
        export_dense(tmp_path / "mixed", tmp_path / "out")
    export_dense(tmp_path / "same", tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "same").eval()
    torch.testing.assert_close(dense(IDS).logits, ours(IDS).logits, rtol=0, atol=1e-5)
