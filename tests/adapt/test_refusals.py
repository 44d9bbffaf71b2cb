"""Checkpoints and recipes that cannot be adapted are refused with one line, before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from adapt.sources import SIZE, mixture, recipe, run, save_source
from skipstone.adapt.adapt_recipe import read_recipe
from skipstone.model.pretrained import convert
from skipstone_cli.main import main


def refusal(source: Path | str, config: dict[str, Any], folder: Path, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        run(Path(source), config, folder / "out")
    assert "\n" not in str(caught.value)
    assert not (folder / "out").exists()
    return str(caught.value)


def changed(source: Path, folder: Path, **values: Any) -> Path:
    copy = shutil.copytree(source, folder / "changed")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **values}))
    return copy


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "gptj"}, "architecture 'gptj'"),
        ({"model_type": "gptj"}, "supported: llama, mistral, ministral, qwen2, qwen3"),
        ({"model_type": "mixtral", "num_local_experts": 4}, "mixture of experts"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ],
)
def test_sources_that_this_decoder_does_not_compute(
    values: dict[str, Any], said: str, source: Path, tmp_path: Path
) -> None:
    assert said in refusal(changed(source, tmp_path, **values), recipe(tmp_path, {}), tmp_path)


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "no such place", recipe(tmp_path, {}), tmp_path, FileNotFoundError)


def test_a_source_that_is_routed_already(source: Path, tmp_path: Path) -> None:
    config = recipe(tmp_path, {"mechanisms": [mixture(capacity=0.5)]}, steps=1, warmup_steps=0)
    routed = run(source, config, tmp_path / "first") / "model"
    assert "routed already (mixture_of_depths)" in refusal(routed, recipe(tmp_path, {}), tmp_path)


def test_a_dense_model_of_ours_is_a_source(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "ours")
    assert run(tmp_path / "ours", recipe(tmp_path, {}, steps=1, warmup_steps=0), tmp_path / "run").is_dir()


def test_a_source_without_a_tokenizer(tmp_path: Path) -> None:
    bare = save_source(tmp_path / "bare", with_tokenizer=False)
    assert "no tokenizer beside it" in refusal(bare, recipe(tmp_path, {}), tmp_path)


def test_a_tokenizer_too_large(source: Path, tmp_path: Path) -> None:
    config = recipe(tmp_path, {})
    config["data"]["tokenizer"] = "byte"
    assert "258 tokens, the model only 48" in refusal(source, config, tmp_path)


def test_teachers_that_speak_another_language(source: Path, tmp_path: Path) -> None:
    other = save_source(tmp_path / "other", LlamaConfig(**{**SIZE, "vocab_size": 50}), with_tokenizer=False)
    config = recipe(tmp_path, {}, {"loss": {"distillation": 1.0, "teacher": str(other)}})
    assert "vocabulary has 50 tokens, the student's 48" in refusal(source, config, tmp_path)
    shuffled = shutil.copytree(source, tmp_path / "shuffled")
    state = json.loads((shuffled / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    vocabulary["I"], vocabulary["a"] = vocabulary["a"], vocabulary["I"]
    (shuffled / "tokenizer.json").write_text(json.dumps(state))
    config = recipe(tmp_path, {}, {"loss": {"distillation": 1.0, "teacher": str(shuffled)}})
    assert "gives other ids" in refusal(source, config, tmp_path)


def test_hidden_states_need_blocks_to_compare(source: Path, tmp_path: Path) -> None:
    config = recipe(tmp_path, {"drop_layers": [1]}, {"loss": {"distillation": 1.0, "hidden_states": 1.0}})
    assert "the student has 2 blocks of width 32 and the teacher 3" in refusal(source, config, tmp_path)


SCORED = {"score": "block_influence", "count": 2}


@pytest.mark.parametrize(
    ("model", "adapt", "said"),
    [
        ({"mechanisms": [mixture(weight="raw", capacity=0.5)]}, {}, "not neutral"),
        ({"mechanisms": [mixture(weight="raw", capacity=0.5)]}, {}, "weight tanh or none"),
        ({"hidden_size": 64}, {}, "unknown key in model 'hidden_size'"),
        ({"tie_word_embeddings": True}, {}, "all else is the source's"),
        ({"mechanism": []}, {}, "did you mean 'mechanisms'"),
        ({"mechanisms": {"name": "early_exit"}}, {}, "must be a list"),
        ({"mechanisms": [mixture(capacity=0.5)]}, {"budget": 0.8}, "name one of them, not both"),
        ({"mechanisms": [{"name": "token_selective", "capacity": 0.5}]}, {}, "cannot keep a capacity"),
        ({"mechanisms": [mixture()]}, {"budget": 0.05}, "cannot be met"),
        ({}, {"budget": 0.8}, "needs a mechanism that skips"),
        ({"mechanisms": [mixture()]}, {"budget": 1.5}, "budget must be in (0, 1)"),
        ({"mechanisms": [mixture(layers={**SCORED, "count": 9})]}, {}, "from 1 to 3, got 9"),
        ({"mechanisms": [mixture(layers={**SCORED, "score": "block_influense"})]}, {}, "mean 'block_influence'"),
        ({"mechanisms": [mixture(layers={**SCORED, "cout": 1})]}, {}, "did you mean 'count'"),
        ({"drop_layers": ":"}, {}, "drops every block"),
        ({"mechanisms": [mixture(capacity=0.5)]}, {"train_only": "router"}, "unknown adapt.train_only 'router'"),
        ({}, {"train_only": "routers"}, "trains nothing"),
        ({}, {"start": "measured"}, "has no effect"),
        ({}, {"stages": [{"steps": 0}]}, "stages[0].steps must be at least 1"),
        ({}, {"stages": [{"steps": 2, "warmup_steps": 3}]}, "warmup_steps must be in [0, 2]"),
        ({}, {"loss": {"language_modelling": 0.0}}, "nothing would be learned"),
        ({}, {"loss": {"temperature": 0.0}}, "temperature must be above 0"),
        ({}, {"loss": {"teacher": "x"}}, "teacher is named"),
        ({}, {"lora": {"rank": 0}}, "rank must be at least 1"),
        ({}, {"budgett": 0.8}, "did you mean 'budget'"),
        ({"activation": {"name": "polyglu", "tau_end": 9.0}}, {}, "tau_end"),
    ],
)  # fmt: skip
def test_recipes(model: dict[str, Any], adapt: dict[str, Any], said: str, source: Path, tmp_path: Path) -> None:
    assert said in refusal(source, recipe(tmp_path, model, adapt), tmp_path)


def test_an_activation_that_polyglu_cannot_start_from(tmp_path: Path) -> None:
    gelu = save_source(tmp_path / "gelu", LlamaConfig(**SIZE, hidden_act="gelu"))
    assert "whose activation is silu" in refusal(gelu, recipe(tmp_path, {"activation": {"name": "polyglu"}}), tmp_path)


def test_data_that_no_pretrained_model_reads(source: Path, tmp_path: Path) -> None:
    config = recipe(tmp_path, {})
    assert "is synthetic" in refusal(source, {**config, "data": {"corpus": "copy", "context": 16}}, tmp_path)
    mixed = {"corpus": "mixed:python-stdlib", "context": 16}
    assert "has tokens of its own; a pretrained model is adapted on text" in refusal(
        source, {**config, "data": mixed}, tmp_path
    )
    long = {**config, "data": {**config["data"], "context": 128}}
    assert "longer than the source's 64" in refusal(source, long, tmp_path)


def test_steps_are_those_of_the_stages(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the stages have 3 steps together"):
        read_recipe(recipe(tmp_path, {}, {"stages": [{"steps": 3}]}, steps=5))


def test_the_command_says_it_in_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text("model: {mechanisms: [{name: mixture_of_dept}]}\n")
    out = str(tmp_path / "out")
    monkeypatch.setattr("sys.argv", ["skipstone", "adapt", str(source), str(tmp_path / "a.yaml"), "--out", out])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("skipstone: ")
    assert "did you mean 'mixture_of_depths'" in said
