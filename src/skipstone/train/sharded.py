"""Checkpoints of a model whose parameters are sharded: torch's distributed checkpoint, in files of safetensors.

Each process writes the shards that it holds, and any number of processes can read them. No file is a pickle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

SHARDS = "shards"  # in a checkpoint
MODEL, OPTIMIZER = "model", "optimizer"


def save(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Write the state of a sharded model and its optimizer to `folder`, as files of safetensors; all processes call it.

    model: sharded by FSDP2. optimizer: an optimizer of torch, or accelerate's wrapper around one.
    """
    state = _model_state(model) | _optimizer_state(model, optimizer)
    flat = {name: _flat(value) for name, value in state.items()}
    dcp.save(flat, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def load_model(folder: Path, model: nn.Module) -> None:
    """Read a sharded model's parameters and buffers, in place, from the folder to which `save` wrote them.

    All processes call it; their number may differ from when the files were written.
    """
    _load(folder, _model_state(model))


def load_optimizer(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Read the state of a sharded model's optimizer, in place, from the folder to which `save` wrote it.

    model: owns the parameters. optimizer: an optimizer of torch, or accelerate's wrapper around one. Parameters whose
    state was not written have none afterwards.
    """
    reader = HuggingFaceStorageReader(str(folder))
    prefix = f"{OPTIMIZER}."
    written = [n.removeprefix(prefix) for n in reader.read_metadata().state_dict_metadata if n.startswith(prefix)]
    parameters, found = dict(model.named_parameters()), {}
    plain = _plain(optimizer)
    plain.state.clear()
    for entry in sorted(written):
        name, _, key = entry.rpartition(".")
        parameter = parameters[name]
        value = torch.zeros(()) if key == "step" else torch.zeros_like(parameter, requires_grad=False)
        plain.state[parameter][key] = found[prefix + entry] = value
    _load(folder, found)


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """Return torch's own optimizer, inside accelerate's."""
    found = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(found, torch.optim.Optimizer)
    return found


def _model_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and saved buffers, by name below `model.`; of tied ones, only the first."""
    state, seen = {}, set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            state[f"{MODEL}.{name}"] = value.detach()
    return state


def _optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    known = _plain(optimizer).state
    named = ((name, known[p]) for name, p in model.named_parameters() if p in known)
    return {f"{OPTIMIZER}.{name}.{key}": value for name, values in named for key, value in values.items()}


def _flat(value: Tensor) -> Tensor:
    """Return a tensor unchanged, or as [1] if it is a scalar, because the file format holds no scalars."""
    return value if value.dim() else value.reshape(1)


@torch.no_grad()
def _load(folder: Path, state: dict[str, Tensor]) -> None:
    flat = {name: value if value.dim() else torch.zeros_like(value).reshape(1) for name, value in state.items()}
    dcp.load(flat, storage_reader=HuggingFaceStorageReader(str(folder)))
    for name, value in state.items():
        if not value.dim():
            value.copy_(flat[name][0])
