"""Read and write files of released weights: tensors and plain values only, refusing anything else in a pickle."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from skipstone.model.loading import one_line

STATE_DICT_KEYS = ("model", "model_state_dict", "state_dict")  # keys under which training scripts store it
SAFETENSORS = ".safetensors"


@dataclass(frozen=True)
class Weights:
    """The content of a file of released weights.

    tensors: the state dict. beside: plain numbers stored next to it, by name.
    """

    tensors: dict[str, Tensor]
    beside: dict[str, int | float] = field(default_factory=dict)


def read_weights(path: Path) -> Weights:
    """Read the state dict in the file `path`, a .safetensors file or one of torch.save.

    In a file of torch.save, the state dict may be part of a checkpoint. Nothing in a pickle is executed. Tensors of a
    zipped torch.save file stay on disk until they are used. Raises FileNotFoundError if there is no such file, and
    ValueError for a file that cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"file {str(path)!r} does not exist")
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; the released file itself is expected (.pt or .safetensors)")
    try:
        found = load_file(path) if path.suffix == SAFETENSORS else _unpickled(path)
    except Exception as error:  # torch and safetensors raise many types for what is no file of theirs
        raise ValueError(f"{path.name}: {_why(error)}") from None
    return _weights(found, path.name)


def _unpickled(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _why(error: Exception) -> str:
    """Return one line that tells the user why a file cannot be read."""
    if refused := re.search(r"Unsupported (?:global|class|operand).*?(?:GLOBAL\s+)?([\w.]+\.[\w.]+)", str(error)):
        return f"holds more than tensors and plain values ({refused[1]}), which is not read; save its state dict alone"
    return f"is no file of weights that can be read ({one_line(error)[:120]})"


def _weights(found: Any, name: str) -> Weights:
    """Return the state dict in what was read from a file, and the plain numbers beside it.

    found: a state dict, or a checkpoint that has one under a key such as "model". name: the file's name for errors.
    Raises ValueError if there is none.
    """
    inside = [
        found[key] for key in STATE_DICT_KEYS if isinstance(found, Mapping) and isinstance(found.get(key), Mapping)
    ]
    tensors = inside[0] if inside else found
    if not isinstance(tensors, Mapping) or not any(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{name}: contains no state dict (neither directly nor under {', '.join(STATE_DICT_KEYS)})")
    for key, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: {key} is not a tensor, but {type(value).__name__}")
    numbers = {k: v for k, v in found.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return Weights(dict(tensors), numbers)


def write_weights(weights: Weights, path: Path, kind: str) -> None:
    """Write weights to `path`, by safetensors if `kind` is ".safetensors", else by torch.save.

    weights: the state dict and plain numbers beside it. Safetensors stores shared tensors twice and drops the numbers
    in `weights.beside`. torch.save gets a dict with the state dict under "model" and these numbers.
    """
    if kind == SAFETENSORS:
        whole = torch.contiguous_format  # a matrix of a compiled step may lie input by input
        save_file({key: value.clone(memory_format=whole) for key, value in weights.tensors.items()}, path)
    else:
        torch.save({"model": weights.tensors, **weights.beside}, path)
