"""Checks of a checkpoint's folder before any library reads it."""

from __future__ import annotations

import re
from pathlib import Path

from skipstone.core import checksums
from skipstone.core.plain_text import parse_json, read_object
from skipstone.core.strict import PlainDict, is_folder_name

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # start of the text that git-lfs leaves in place of a file
READ = {".safetensors", ".bin", ".json", ".model", ".gguf", ".txt"}
ADAPTER, GENERATION = "adapter_config.json", "generation_config.json"
INTEGERS = ("I", "U", "F8", "F4")  # beginnings of safetensors' names of types that hold no values by themselves
LONGEST_HEADER = 100_000_000  # bytes, safetensors' own limit
HASHED = 256 * 2**20  # bytes of a file up to which its hash is compared at every load, which takes a moment


def check_folder(folder: Path) -> None:
    """Raise ValueError if the files of a checkpoint folder are damaged or would be read wrongly.

    It finds git-lfs pointers, files that differ from the checksums in the folder's `files.json` or from the SHA-256 in
    their name in the hub's cache (files up to 256 MiB), a bad index of weights, an adapter beside a whole model, and
    special token ids that are not integers. Nothing is checked if `folder` is not a folder, but a hub name.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.suffix in READ and path.is_file() and _is_pointer(path):
            raise ValueError(f"{str(path)!r} is a pointer of git-lfs, not the file itself; run `git lfs pull` there")
    checksums.check(folder, hash_up_to=HASHED)
    for path in folder.glob("*.safetensors"):
        _check_blob(path)
    for path in folder.glob("*.index.json"):
        _check_index(path)
    if (folder / ADAPTER).is_file() and (folder / "config.json").is_file():
        # transformers would silently apply it if PEFT is installed, and silently ignore it otherwise
        raise ValueError(
            f"{str(folder)!r} holds a model and an adapter ({ADAPTER}); move the adapter to a folder of its own and "
            "name that (`skipstone convert ADAPTER OUT` merges it into its base), or the folder of the model alone"
        )
    _check_generation(folder / GENERATION)


def check_numbers(folder: Path) -> None:
    """Raise ValueError if the safetensors files of a folder hold weights or biases as integers or 8-bit floats.

    Such weights have scales elsewhere, but transformers would read them as the values themselves. Files without a
    readable header are skipped.
    """
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        for name, told in _header(path).items():
            kind = told.get("dtype") if isinstance(told, dict) else None
            parameter = name.endswith((".weight", ".bias")) and not name.endswith(".attn.bias")  # a mask of old files
            if parameter and isinstance(kind, str) and kind.startswith(INTEGERS):
                raise ValueError(
                    f"{str(path)!r} holds {name} as {kind}: the weights are quantised; load the unquantised checkpoint"
                )


def _header(path: Path) -> PlainDict:
    """Return the header of a safetensors file: its tensors' types, shapes and places; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            values = parse_json(file.read(size)) if size <= LONGEST_HEADER else {}
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _check_generation(path: Path) -> None:
    """Raise ValueError if generation_config.json cannot be read or names ends that are not ids.

    transformers would silently go on without it, and texts would not end.
    """
    if not path.is_file():
        return
    values = read_object(path)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = values.get(name)
        for each in value if isinstance(value, list) else [value]:
            if each is not None and (not isinstance(each, int) or isinstance(each, bool)):
                raise ValueError(f"{name} in {str(path)!r} must be a token id or a list of them, got {each!r}")


def _check_blob(path: Path) -> None:
    """Raise `Damaged` for a file of the hub's cache, which is named by its SHA-256 there, that has another one."""
    blob = path.resolve()
    named = path.is_symlink() and re.fullmatch("[0-9a-f]{64}", blob.name) is not None
    if named and blob.stat().st_size <= HASHED and checksums.file_sha256(blob) != blob.name:
        raise checksums.Damaged(f"{str(path)!r} is damaged: its SHA-256 is not the one that names {str(blob)!r}")


def _check_index(path: Path) -> None:
    """Raise ValueError for an index of weights that cannot be read or that names files outside of its folder."""
    try:
        names = {*read_object(path)["weight_map"].values()}
        outside = [name for name in names if not is_folder_name(name)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is no index of weights: {error!r}") from None
    if outside:
        raise ValueError(f"{str(path)!r} names {outside[0]!r}, which is no file of its folder")


def check_room(folder: Path, weights: int, room: int = 4) -> None:
    """Raise ValueError if a configuration describes more weights than the folder's files can hold.

    Called before memory is allocated. folder: the folder with the weights' files. weights: the model's number of
    parameters. room: the largest number of weights per byte (packed formats hold several).
    """
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    held = sum(path.stat().st_size for path in files)
    if files and weights > room * held:
        path = str(folder / "config.json")
        raise ValueError(f"{path!r} describes {weights:,} weights, but the files beside it have {held:,} bytes")


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER
