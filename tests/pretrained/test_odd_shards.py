"""Sharded checkpoints as people have them: read as transformers reads them, or one line that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from skipstone.model.loading import quiet
from skipstone.model.pretrained import convert, load_model, load_pretrained
from skipstone_studies.speed import parity

INDEX, OLD_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
FAMILIES = ("GPT-2", "Llama", "Qwen2, tied", "Phi-3, longrope", "GPT-NeoX")  # tied, renamed and fused tensors
IDS = torch.randint(2, 97, (2, 12), generator=torch.Generator().manual_seed(0))
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family in several files."""
    folders = {}
    for case in FAMILIES:
        parity.save_random(parity.CASES[case], whole := tmp_path_factory.mktemp("whole"))
        folders[case] = tmp_path_factory.mktemp("sharded")
        with quiet():
            AutoModelForCausalLM.from_pretrained(whole).save_pretrained(folders[case], max_shard_size="40KB")
    return folders


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*model-*"))


def index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / INDEX).read_text())
    change(values)
    (folder / INDEX).write_text(json.dumps(values))


def first(values: dict[str, Any]) -> str:
    return next(iter(values["weight_map"]))


def retyped(folder: Path, *kinds: torch.dtype) -> None:
    for i, path in enumerate(shards(folder)):
        save_file({name: x.to(kinds[i % len(kinds)]) for name, x in load_file(path).items()}, path, {"format": "pt"})


def pickled(folder: Path) -> None:
    def old(name: str) -> str:
        return "pytorch_" + name.replace(".safetensors", ".bin")

    for path in shards(folder):
        torch.save(load_file(path), folder / old(path.name))
        path.unlink()
    index(folder, lambda v: v.update(weight_map={name: old(file) for name, file in v["weight_map"].items()}))
    (folder / INDEX).rename(folder / OLD_INDEX)


def nested(folder: Path) -> None:
    (folder / "weights").mkdir()
    for path in shards(folder):
        path.rename(folder / "weights" / path.name)
    index(folder, lambda v: v.update(weight_map={name: f"weights/{f}" for name, f in v["weight_map"].items()}))


def twice(folder: Path, factor: float) -> None:
    one, other = shards(folder)[0], shards(folder)[-1]
    tensors = load_file(one)
    name = next(iter(tensors))
    save_file({**load_file(other), name: factor * tensors[name]}, other, {"format": "pt"})


def halved(folder: Path) -> None:
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(folder: Path) -> None:
    shards(folder)[1].write_bytes(b"")


def a_folder(folder: Path) -> None:
    path = shards(folder)[1]
    path.unlink()
    path.mkdir()


def pointer(folder: Path) -> None:
    nested(folder)
    path = min((folder / "weights").iterdir())
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def linked_to_nothing(folder: Path) -> None:
    path = shards(folder)[1]
    path.unlink()
    path.symlink_to(folder / "gone")


def entry(folder: Path, value: object) -> None:
    pickled(folder)
    path = shards(folder)[0]
    torch.save({**torch.load(path), "epoch": value}, path)


def both(folder: Path) -> None:
    whole: dict[str, Tensor] = {}
    for path in shards(folder):
        whole |= load_file(path)
    save_file({name: 2 * x for name, x in whole.items()}, folder / "model.safetensors", {"format": "pt"})


def beside(folder: Path) -> None:
    save_file({"a.weight": torch.zeros(2, dtype=torch.int8)}, folder / "consolidated.safetensors")


READ: dict[str, Change] = {
    "as saved": lambda folder: None,
    "fp16, bf16 and fp64": lambda f: retyped(f, torch.float16, torch.bfloat16, torch.float64, torch.float32),
    "fp64": lambda folder: retyped(folder, torch.float64),
    "pickled": pickled,
    "nested": nested,
    "a tensor twice, the same": lambda folder: twice(folder, 1.0),
    "whole beside it": both,
    "quantised weights of something else beside it": beside,
    "an index that names more": lambda f: index(f, lambda v: v["weight_map"].update(x=shards(f)[0].name)),
    "a size in words": lambda folder: index(folder, lambda v: v.update(metadata={"total_size": "large"})),
    "no format": lambda folder: [save_file(load_file(path), path) for path in shards(folder)],
}
REFUSED: dict[str, tuple[Change, str]] = {
    "a missing shard": (lambda folder: shards(folder)[1].unlink(), f"{INDEX}' names 'model-00002.*', which is not"),
    "another shard": (
        lambda folder: index(folder, lambda v: v["weight_map"].update({first(v): "other.safetensors"})),
        "names 'other.safetensors', which is not there",
    ),
    "an unnamed shard": (
        lambda f: index(f, lambda v: v.update(weight_map=dict([next(iter(v["weight_map"].items()))]))),
        "the checkpoint lacks",
    ),
    "no metadata": (lambda folder: index(folder, lambda v: v.pop("metadata")), f'{INDEX}\' has no object "metadata"'),
    "no map": (lambda folder: index(folder, lambda v: v.update(weight_map=[])), "no index of weights: weight_map must"),
    "an empty map": (lambda f: index(f, lambda v: v.update(weight_map={})), "no index of weights: weight_map must"),
    "a number": (lambda f: index(f, lambda v: v["weight_map"].update({first(v): 3})), "names 3, which is no file of"),
    "an empty index": (lambda f: (f / INDEX).write_text(""), f"{INDEX}' cannot be read: it is empty"),
    "a list": (lambda f: (f / INDEX).write_text("[]"), f"{INDEX}' cannot be read: it does not contain a JSON object"),
    "an index that is a folder": (lambda f: ((f / INDEX).unlink(), (f / INDEX).mkdir()), f"{INDEX}' is a folder; a"),
    "no index": (lambda folder: (folder / INDEX).unlink(), "no file named model.safetensors"),
    "a tensor twice": (lambda folder: twice(folder, 2.0), "does too, with other values"),
    "half": (halved, "model-00002.*' is damaged or no file of weights: "),
    "empty": (emptied, "model-00002.*' is damaged or no file of weights: it is empty"),
    "half, pickled": (lambda f: (pickled(f), halved(f)), r"model-00002.*\.bin' is damaged or no file of weights: "),
    "a folder": (a_folder, "model-00002.*' is a folder; a file is expected"),
    "a link to nothing": (linked_to_nothing, "model-00002.*' is a link to a file that is not there"),
    "a pointer": (pointer, "model-00001.*' is a pointer of git-lfs"),
    "8-bit floats": (lambda f: retyped(f, torch.float8_e4m3fn), "as F8_E4M3: the weights are quantised"),
    "8-bit floats, pickled": (lambda f: (retyped(f, torch.float8_e5m2), pickled(f)), r"\.bin' holds .* as F8_E5M2"),
    "integers, pickled": (lambda f: (retyped(f, torch.int8), pickled(f)), r"\.bin' holds .* as I8: the weights are"),
    "no tensor": (lambda folder: entry(folder, 3), r"\.bin' is .*: 'epoch' in it is int, not a tensor"),
    "outside": (
        lambda f: index(f, lambda v: v["weight_map"].update({first(v): "../x.safetensors"})),
        r"names '\.\./x\.safetensors', which is no file of its folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", [FAMILIES[0], *(pytest.param(case, marks=pytest.mark.slow) for case in FAMILIES[1:])])
@torch.no_grad()
def test_shards_that_transformers_reads(case: str, sharded: dict[str, Path], tmp_path: Path) -> None:
    for number, (what, change) in enumerate(READ.items()):
        folder = tmp_path / str(number)
        shutil.copytree(sharded[case], folder)
        change(folder)
        expected = parity.theirs(folder)(IDS).logits
        assert parity.relative_error(load_pretrained(folder, "float32")(IDS).logits, expected) < 1e-5, what


@pytest.mark.parametrize("what", REFUSED)
def test_shards_that_are_refused(what: str, sharded: dict[str, Path], tmp_path: Path) -> None:
    change, why = REFUSED[what]
    for number, case in enumerate(("Llama", "GPT-2")):
        folder = tmp_path / str(number)
        shutil.copytree(sharded[case], folder)
        change(folder)
        with pytest.raises(ValueError, match=why) as told:
            convert(folder, tmp_path / "out")
        assert "\n" not in str(told.value)
        assert str(folder) in str(told.value)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("what", ["a missing shard", "no metadata", "half", "a folder", "a tensor twice"])
def test_shards_of_a_model_of_ours(what: str, sharded: dict[str, Path], tmp_path: Path) -> None:
    load_pretrained(sharded["Llama"]).save_pretrained(tmp_path, max_shard_size="40KB")
    change, why = REFUSED[what]
    change(tmp_path)
    with pytest.raises(ValueError, match=why) as told:
        load_model(tmp_path)
    assert "\n" not in str(told.value)
