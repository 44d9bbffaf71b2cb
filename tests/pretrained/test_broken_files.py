"""A file of a source folder that is empty, cut, of another form or no file: one line names it, nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from skipstone.data.tokenizers import load_saved
from skipstone.model.pretrained import convert, load_model, load_tokenizer

OBJECTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
NO_FILE: dict[str, Callable[[Path], None]] = {
    "a folder": lambda path: (path.unlink(), path.mkdir())[1],
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("/nowhere"))[1],
    "a pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n") and None,
}
NO_TEXT: dict[str, Callable[[Path], None]] = {
    **NO_FILE,
    "no UTF-8": lambda path: path.write_bytes(b"\xff\xfe" + path.read_bytes()) and None,
}
NO_OBJECT: dict[str, Callable[[Path], None]] = {
    **NO_TEXT,
    "empty": lambda path: path.write_text("") and None,
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]) and None,
    "zeros": lambda path: path.write_bytes(bytes(64)) and None,
    "a list": lambda path: path.write_text("[]") and None,
    "null": lambda path: path.write_text("null") and None,
    "a number": lambda path: path.write_text("3") and None,
    "a page": lambda path: path.write_text("<!DOCTYPE html>") and None,
    "deep": lambda path: path.write_text("[" * 100_000) and None,
}
BROKEN = {
    **dict.fromkeys(OBJECTS, NO_OBJECT),
    "chat_template.jinja": NO_TEXT,
    "merges.txt": NO_TEXT,
    "model.safetensors": {**NO_FILE, **{how: NO_OBJECT[how] for how in ("empty", "half", "zeros", "null", "a page")}},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, intermediate_size=8)).save_pretrained(folder)
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    (folder / "added_tokens.json").write_text('{"</s>": 256}')
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "generation_config.json").write_text('{"eos_token_id": 256}')
    return folder


def refused(call: Callable[[], object], name: str) -> None:
    with pytest.raises(ValueError, match=name) as told:
        call()
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_of_a_source(name: str, source: Path, tmp_path: Path) -> None:
    for number, (what, spoil) in enumerate(BROKEN[name].items()):
        folder = tmp_path / str(number)
        shutil.copytree(source, folder)
        spoil(folder / name)
        refused(
            lambda folder=folder: convert(folder, tmp_path / "out"),
            str(folder) if what == "a folder" and name == "config.json" else name,
        )
        assert not (tmp_path / "out").exists(), what
        assert not list(tmp_path.glob(".out*")), what


@pytest.mark.parametrize("name", TOKENIZER)
def test_a_broken_file_of_a_tokenizer(name: str, source: Path, tmp_path: Path) -> None:
    for number, (_, spoil) in enumerate(BROKEN[name].items()):
        folder = tmp_path / str(number)
        shutil.copytree(source, folder)
        spoil(folder / name)
        for load in (load_tokenizer, load_saved):
            refused(lambda folder=folder, load=load: load(folder), name)


def test_a_broken_file_of_a_model_of_ours(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "ours")
    (tmp_path / "ours" / "files.json").unlink()  # which says of most damage that there is some
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        for number, (what, spoil) in enumerate(BROKEN[name].items()):
            folder = tmp_path / f"{name}{number}"
            shutil.copytree(tmp_path / "ours", folder)
            spoil(folder / name)
            refused(lambda folder=folder: load_model(folder), name)
            assert what


@pytest.mark.parametrize("values", [{}, {"model": {}}, {"version": "1.0", "model": {"type": "Unknown"}}], ids=str)
def test_an_object_that_defines_no_tokenizer(values: dict[str, object], source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text(json.dumps(values))
    for load in (load_tokenizer, load_saved):
        refused(lambda load=load: load(tmp_path / "source"), "tokenizer.json' is no definition of a tokenizer: ")


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (
            {"model_max_length": "long"},
            "model_max_length in .*tokenizer_config.json' must be a number of tokens, got 'lo",
        ),
        ({"model_max_length": [64]}, "model_max_length in .*tokenizer_config.json' must be a number of tokens"),
        ({"bos_token": 3}, "cannot be loaded: .*bos_token"),
        ({"added_tokens_decoder": {"x": {"content": "<a>"}}}, "cannot be loaded: .*'x'"),
    ],
    ids=str,
)
def test_a_setting_of_a_tokenizer_of_another_type(
    values: dict[str, object], why: str, source: Path, tmp_path: Path
) -> None:
    shutil.copytree(source, tmp_path / "source")
    path = tmp_path / "source" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    for load in (load_tokenizer, load_saved):
        refused(lambda load=load: load(tmp_path / "source"), why)
    refused(lambda: convert(tmp_path / "source", tmp_path / "out"), why)
    assert not (tmp_path / "out").exists()
