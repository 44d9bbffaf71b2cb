"""`skipstone convert` writes a folder that every Hugging Face tool loads, or prints one line and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from command import command
from skipstone import SkipstoneForCausalLM
from skipstone.model.pretrained import convert, load_model
from skipstone_studies.speed import parity


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Qwen3 checkpoint with tokenizer and generation_config."""
    folder = tmp_path / "source"
    parity.save_random(parity.CASES["Qwen3"], folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(folder)
    GenerationConfig(do_sample=True, top_k=7, temperature=0.6, eos_token_id=2).save_pretrained(folder)
    return folder


def test_the_folder_is_whole(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "out")
    expected = {"README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_skipstone.py"}
    assert expected | {"tokenizer.json", "tokenizer_config.json", "files.json"} == {
        f.name for f in (tmp_path / "out").iterdir()
    }
    assert {f.name for f in tmp_path.iterdir()} == {"source", "out"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model, SkipstoneForCausalLM)
    ids_BT = torch.randint(2, 97, (2, 20))
    with torch.no_grad():
        assert parity.relative_error(model(ids_BT).logits, parity.theirs(source)(ids_BT).logits) < 1e-6
    generation = model.generation_config
    assert (generation.do_sample, generation.top_k, generation.temperature) == (True, 7, 0.6)
    assert generation.eos_token_id == 2


def test_the_tokenizer_is_the_same(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "out")
    text = "w5 w6 unheard w96"
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert after(text).input_ids == before(text).input_ids == [5, 6, 0, 96]
    assert after.eos_token_id == 2


def test_no_path_of_this_machine_is_written(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
    assert "Converted from `source`." in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_without_tokenizer_or_generation_config(tmp_path: Path) -> None:
    parity.save_random(parity.CASES["GPT-2"], tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").unlink()
    convert(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert load_model(tmp_path / "out").config.positions == "learned"


def test_dtype_and_a_model_that_is_ours_already(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "out", dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    convert(tmp_path / "out", tmp_path / "wide", dtype="float32")
    once, twice = load_model(tmp_path / "out"), load_model(tmp_path / "wide")
    assert once.dtype == torch.bfloat16
    assert twice.dtype == torch.float32
    assert torch.equal(once.lm_head.weight.float(), twice.lm_head.weight)
    assert (tmp_path / "wide" / "tokenizer.json").exists()


def test_an_empty_folder_may_be_filled_and_parents_are_made(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out")
    convert(source, tmp_path / "new" / "deep")
    assert (tmp_path / "new" / "deep" / "config.json").exists()


def test_nothing_is_overwritten(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    for target in (out, out / "mine"):
        with pytest.raises(FileExistsError, match="nothing is overwritten"):
            convert(source, target)
    assert [f.name for f in out.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda source: (source / "model.safetensors").unlink(), "model.safetensors"),
        (lambda source: (source / "tokenizer.json").write_text("{"), "source"),
    ],
)
def test_a_failure_leaves_nothing(tmp_path: Path, source: Path, spoil: Any, said: str) -> None:
    spoil(source)
    with pytest.raises(ValueError, match=said) as caught:
        convert(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert {f.name for f in tmp_path.iterdir()} == {"source"}


def test_sampling_settings_without_sampling_survive(tmp_path: Path, source: Path) -> None:
    """Published checkpoints have them, and transformers complains about them."""
    values = {"do_sample": False, "temperature": 0.6, "top_p": 0.9}
    (source / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
    convert(source, tmp_path / "out")
    assert load_model(tmp_path / "out").generation_config.temperature == 0.6


def test_the_command(tmp_path: Path, source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command("convert", source, tmp_path / "out", "--dtype", "float16") == 0
    shown = capfd.readouterr()
    assert shown.out == f"written: {tmp_path / 'out'}\n"
    stages = ["reading the checkpoint", "writing the model", "checksums"]
    assert shown.err.splitlines() == [*(f"stage {i} of 3: {stage}" for i, stage in enumerate(stages, 1)), "done"]
    assert load_model(tmp_path / "out").dtype == torch.float16


def test_the_commands_one_line(tmp_path: Path, source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for words in [(tmp_path / "typo", tmp_path / "out"), (source, source), (source, tmp_path / "out", "--dtype", "f")]:
        assert command("convert", *words) == 2
        shown = capfd.readouterr()
        assert shown.out == ""
        assert len([line for line in shown.err.splitlines() if not line.startswith("stage ")]) == 1
    assert not (tmp_path / "out").exists()
