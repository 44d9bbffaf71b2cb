"""A run is resumed from the very weights that it was started with, in whatever files they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapt.sources import mixture, recipe, run, save_source
from skipstone.model.pretrained import files_of

STEPS = {"steps": 2, "warmup_steps": 1, "eval_every": 2}


def as_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def nudge(folder: Path) -> None:
    """Change one weight of the checkpoint in a folder."""
    path = next(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    tensors = torch.load(path) if path.suffix == ".bin" else load_file(path)
    name = min(tensors)
    tensors[name].view(-1)[0] += 0.5
    torch.save(tensors, path) if path.suffix == ".bin" else save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("as_bin_stored", ["source", "teacher"])
def test_changed_weights_are_not_trained_on(source: Path, tmp_path: Path, as_bin_stored: str) -> None:
    """Neither the source's nor the teacher's, of which one is in safetensors and the other in PyTorch's own form."""
    folders = {name: shutil.copytree(source, tmp_path / name) for name in ("source", "teacher")}
    as_bin(folders[as_bin_stored])
    loss = {"loss": {"distillation": 1.0, "teacher": str(folders["teacher"])}}
    config = recipe(tmp_path, {"mechanisms": [mixture()]}, loss, **STEPS)
    out = run(folders["source"], config, tmp_path / "out")
    (out / "result.json").unlink()
    run(folders["source"], config, out, resume=True)
    (out / "result.json").unlink()
    for name, folder in folders.items():
        shutil.copytree(folder, tmp_path / "as it was" / name)
        nudge(folder)
        with pytest.raises(ValueError, match="the weights of source or teacher, have changed since the run"):
            run(folders["source"], config, out, resume=True)
        shutil.copytree(tmp_path / "as it was" / name, folder, dirs_exist_ok=True)


def test_the_files_of_a_source_are_all_that_hold_weights(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    assert [path.name for path in files_of(source)] == ["model.safetensors"]
    base = save_source(tmp_path / "base")
    as_bin(base)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    values = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(values))
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    assert files_of(adapter) == [adapter / "adapter_model.safetensors", base / "pytorch_model.bin"]
    (base / "a.gguf").write_bytes(b"GGUF")
    assert files_of(base / "a.gguf") == [base / "a.gguf"]


def test_a_finished_run_is_not_that_of_another_recipe_or_source(source: Path, tmp_path: Path) -> None:
    config = recipe(tmp_path, {"mechanisms": [mixture()]}, **STEPS)
    out = run(source, config, tmp_path / "out")
    assert run(source, config, out, resume=True) == out
    other = shutil.copytree(source, tmp_path / "other")
    for given, changed, says in (
        (other, config, "source"),
        (source, {**config, "adapt": {**config["adapt"], "budget": 0.5}}, "adapt.budget"),
        (source, {**config, "train": {**config["train"], "steps": 9}}, "train.steps"),
    ):
        with pytest.raises(ValueError, match=f"differs from the run's in {says}"):
            run(given, changed, out, resume=True)
