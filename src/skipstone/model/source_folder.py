"""Checks that a checkpoint's files are undamaged and would not be misread, made before any library reads them.

Missing files are not noticed here.
"""

from __future__ import annotations

import re
from pathlib import Path

from skipstone.core import checksums
from skipstone.core.source_files import is_present, object_in, require_file

READ = {".safetensors", ".bin", ".json", ".model", ".gguf", ".txt"}
ADAPTER, CONFIG, GENERATION = "adapter_config.json", "config.json", "generation_config.json"
HASHED = 256 * 2**20  # bytes of a file up to which its hash is compared at every load, which takes a moment


def check_folder(folder: Path) -> None:
    """Raise ValueError if the files of a checkpoint folder are damaged or would be read wrongly.

    It finds git-lfs pointers, files that differ from the checksums in the folder's `files.json` or from the SHA-256 in
    their name in the hub's cache (files up to 256 MiB), a config.json or generation_config.json that does not hold a
    JSON object, an adapter beside a whole model, and special token ids that are not integers. Nothing is checked if
    `folder` is a hub name and not a folder.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.suffix in READ and path.is_file():
            require_file(path)
    checksums.check(folder, hash_up_to=HASHED)
    for path in folder.glob("*.safetensors"):
        _check_blob(path)
    if (folder / ADAPTER).is_file() and (folder / "config.json").is_file():
        # transformers would silently apply it if PEFT is installed, and silently ignore it otherwise
        raise ValueError(
            f"{str(folder)!r} holds a model and an adapter ({ADAPTER}); move the adapter to a folder of its own and "
            "name that (`skipstone convert ADAPTER OUT` merges it into its base), or the folder of the model alone"
        )
    if is_present(folder / CONFIG):
        object_in(folder / CONFIG)
    _check_generation(folder / GENERATION)


def _check_generation(path: Path) -> None:
    """Raise ValueError if generation_config.json cannot be read or its end tokens are not ids.

    transformers would ignore it without a word, and generated texts would not end.
    """
    if not is_present(path):
        return
    values = object_in(path)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = values.get(name)
        for each in value if isinstance(value, list) else [value]:
            if each is not None and (not isinstance(each, int) or isinstance(each, bool)):
                raise ValueError(f"{name} in {str(path)!r} must be a token id or a list of them, got {each!r}")


def _check_blob(path: Path) -> None:
    """Raise `Damaged` for a file of the hub's cache whose SHA-256 is not the one that is its name there."""
    blob = path.resolve()
    named = path.is_symlink() and re.fullmatch("[0-9a-f]{64}", blob.name) is not None
    if named and blob.stat().st_size <= HASHED and checksums.file_sha256(blob) != blob.name:
        raise checksums.Damaged(f"{str(path)!r} is damaged: its SHA-256 is not the one that names {str(blob)!r}")


def check_room(folder: Path, weights: int, room: int = 4) -> None:
    """Raise ValueError if a configuration describes more weights than the folder's files can hold.

    It is called before memory is allocated. folder: the folder with the weights' files. weights: the model's number of
    parameters. room: the largest number of weights per byte (packed formats hold several).
    """
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    held = sum(path.stat().st_size for path in files)
    if files and weights > room * held:
        path = str(folder / "config.json")
        raise ValueError(f"{path!r} describes {weights:,} weights, but the files beside it have {held:,} bytes")
