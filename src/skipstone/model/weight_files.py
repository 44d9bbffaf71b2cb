"""Checks that the weight files of a folder are whole and would not be misread by transformers; errors name the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath

import torch
from safetensors import safe_open
from torch import Tensor

from skipstone.core.source_files import is_present, object_in, require_file

# In the order in which transformers looks for them.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OLD, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
INTEGERS = ("I", "U", "F8", "F4")  # beginnings of safetensors' names of types that hold no values by themselves


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights that transformers reads from `folder`; an empty list if it would find none.

    These are model.safetensors, else the files that model.safetensors.index.json names, else pytorch_model.bin, else
    the files that pytorch_model.bin.index.json names. Raises ValueError for an index that is damaged, or that names
    files that are not there or outside of the folder.
    """
    for single, index in ((SINGLE, INDEX), (OLD, OLD_INDEX)):
        if is_present(folder / single):
            require_file(folder / single)
            return [folder / single]
        if is_present(folder / index):
            return _shards(folder / index)
    return []


def _shards(index: Path) -> list[Path]:
    """Return the files that an index of weights names. Raises ValueError as `weight_files` says."""
    values = object_in(index)
    where = values.get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{str(index)!r} is no index of weights: weight_map must be an object of tensors and files")
    if not isinstance(values.get("metadata"), dict):
        raise ValueError(f'{str(index)!r} has no object "metadata", which transformers needs; {{}} is enough')
    for name in where.values():
        if not _is_inside(name):
            raise ValueError(f"{str(index)!r} names {name!r}, which is no file of its folder")
    files = [index.parent / name for name in sorted(set(where.values()))]
    for path in files:
        if not is_present(path):
            raise ValueError(f"{str(index)!r} names {path.name!r}, which is not there")
        require_file(path)
    return files


def _is_inside(name: object) -> bool:
    """Return whether a name in an index of weights is a path within the folder and ends as weight files do."""
    if not isinstance(name, str) or not name.endswith((".safetensors", ".bin")) or set(name) & set("\\\0\n"):
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def check_weight_files(folder: Path, *, quantised: bool) -> None:
    """Raise ValueError, which names the file, if transformers would misread weights in `folder` or fail to read them.

    That is: a damaged or missing file, an entry that is not a tensor, one tensor in two files with different values
    (transformers takes the last one, whatever the index says), and, unless `quantised`, weights or biases that are
    integers or 8-bit floats, which transformers would take for the values themselves although they need scales.
    quantised: whether such numbers are expected.
    """
    found: dict[str, tuple[Path, Callable[[], Tensor]]] = {}
    for path in weight_files(folder):
        for name, (kind, tensor) in open_tensors(path).items():
            if not quantised and _is_parameter(name) and kind.startswith(INTEGERS):
                raise ValueError(
                    f"{str(path)!r} holds {name} as {kind}: the weights are quantised; load the unquantised checkpoint"
                )
            if name in found and not _equal(tensor(), found[name][1]()):
                raise ValueError(f"{str(path)!r} holds {name}, and {found[name][0].name!r} does too, with other values")
            found[name] = path, tensor


def _is_parameter(name: str) -> bool:
    return name.endswith((".weight", ".bias")) and not name.endswith(".attn.bias")  # a mask of old files


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())


def open_tensors(path: Path) -> Mapping[str, tuple[str, Callable[[], Tensor]]]:
    """Return for each tensor in a weight file its type and a function that reads it.

    The result is {name: (type, function)}; types are named as in safetensors, such as "F32". path: a .safetensors file
    or one of `torch.save`; tensors are read only by these functions, except in files of torch.save from before 2020.
    Raises ValueError, which names the file, if it is missing or damaged.
    """
    require_file(path)
    try:
        return _tensors(path)
    except Exception as error:  # torch and safetensors raise many types for damaged files
        reason = " ".join(str(error).split())[:200] if path.stat().st_size else "it is empty"
        raise ValueError(f"{str(path)!r} is damaged or no file of weights: {reason}") from error


def _tensors(path: Path) -> Mapping[str, tuple[str, Callable[[], Tensor]]]:
    if path.suffix == ".safetensors":
        file = safe_open(str(path), "pt")
        names = list(file.keys())
        return {name: (file.get_slice(name).get_dtype(), partial(file.get_tensor, name)) for name in names}
    values = _unpickled(path)
    if not isinstance(values, dict):
        raise ValueError(f"it holds {type(values).__name__}, not tensors by name")
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name!r} in it is {type(value).__name__}, not a tensor")
    return {name: (TYPES.get(value.dtype, "F"), value.detach) for name, value in values.items()}


TYPES = {
    torch.int8: "I8", torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def _unpickled(path: Path) -> object:
    """Return the content of a file of `torch.save`, without running code in it.

    Tensors stay on disk until they are used, unless the file has the format of before 2020.
    """
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
