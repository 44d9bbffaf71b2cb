"""Export to transformers' own classes: equal logits, or a one-line error or warning about what cannot be exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapt.sources import mixture, recipe, run
from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.adapt.export import export_dense
from skipstone.model.pretrained import convert
from skipstone_cli.main import main
from skipstone_studies.speed import parity
from train.tool import quick


@pytest.mark.parametrize("name", quick(parity.CASES, "Llama", "GPT-2"))
def test_every_family_comes_back(name: str, tmp_path: Path) -> None:
    parity.save_random(parity.CASES[name], tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    export_dense(tmp_path / "ours", tmp_path / "back")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    ids = torch.randint(2, 97, (2, 30))
    with torch.no_grad():
        one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / f).eval()(ids).logits for f in ("theirs", "back"))
    assert (one - two).abs().max() <= 1e-6 * one.abs().max()
    kinds = {AutoModelForCausalLM.from_pretrained(tmp_path / f).config.model_type for f in ("theirs", "back")}
    assert kinds <= {"llama", "mistral"} or len(kinds) == 1


def adapted(source: Path, folder: Path, model: dict[str, Any], **adapt: Any) -> Path:
    return run(source, recipe(folder, model, adapt, steps=2, warmup_steps=0), folder / "run")


def test_a_routed_model_says_what_is_lost(source: Path, tmp_path: Path) -> None:
    model = {"mechanisms": [mixture(capacity=0.5), {"name": "token_selective", "layers": [2]}]}
    folder = adapted(source, tmp_path, model, train_only="routers")
    with pytest.warns(UserWarning, match="is left out of blocks") as said:
        export_dense(folder, tmp_path / "back")
    lines = sorted(str(w.message) for w in said)
    assert lines[0].startswith("mixture_of_depths is left out of blocks 1, 2: every token passes")
    assert lines[1].startswith("token_selective is left out of blocks 2")
    assert len(lines) == 2
    before, after = (load_file(f / "model.safetensors") for f in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before), "only routers were trained"
    tokenizers = [AutoTokenizer.from_pretrained(f).get_vocab() for f in (source, tmp_path / "back")]
    assert tokenizers[0] == tokenizers[1]


@pytest.mark.slow
def test_polyglu_is_removed_while_every_neuron_uses_one_function(source: Path, tmp_path: Path) -> None:
    values = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
    model = SkipstoneForCausalLM(SkipstoneConfig(**values, activation={"name": "polyglu"})).eval()
    for mechanism in model.routing_modules():
        mechanism.set_identity()
    model.save_pretrained(tmp_path / "neutral")
    export_dense(tmp_path / "neutral", tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    ids = torch.arange(15)[None]
    with torch.no_grad():
        expected, got = model(ids).logits, back(ids).logits
    assert back.config.hidden_act == "silu"
    assert (expected - got).abs().max() <= 1e-3 * expected.abs().max()
    trained = adapted(source, tmp_path, {"activation": {"name": "polyglu", "noise": False}})
    with pytest.raises(ValueError, match="its neurons mix activations"):
        export_dense(trained, tmp_path / "not")
    assert not (tmp_path / "not").exists()


def test_a_decoder_of_no_family(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    SkipstoneForCausalLM(SkipstoneConfig(**sizes, norm="layernorm")).save_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match="no dense family computes this decoder"):
        export_dense(tmp_path / "odd", tmp_path / "out")


def test_nothing_is_overwritten(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "ours")
    with pytest.raises(FileExistsError):
        export_dense(tmp_path / "ours", source)


def test_the_command(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(source, tmp_path / "ours")
    words = ["convert", "--to", "dense", str(tmp_path / "ours"), str(tmp_path / "back")]
    monkeypatch.setattr("sys.argv", ["skipstone", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"written: {tmp_path / 'back'}\n"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").config.model_type == "llama"
