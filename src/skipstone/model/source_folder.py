"""Checks of a checkpoint's folder before any library reads it."""

from __future__ import annotations

from pathlib import Path

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # start of the text that git-lfs leaves in place of a file
READ = {".safetensors", ".bin", ".json", ".model", ".gguf", ".txt"}
ADAPTER = "adapter_config.json"


def check_folder(folder: Path) -> None:
    """Raise ValueError if a folder holds git-lfs pointers instead of files, or an adapter beside a model.

    A hub name that is not a folder passes.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.suffix in READ and path.is_file() and _is_pointer(path):
            raise ValueError(f"{str(path)!r} is a pointer of git-lfs, not the file itself; run `git lfs pull` there")
    if (folder / ADAPTER).is_file() and (folder / "config.json").is_file():
        # transformers would silently apply it if PEFT is installed, and silently ignore it otherwise
        raise ValueError(
            f"{str(folder)!r} holds a model and an adapter ({ADAPTER}); move the adapter to a folder of its own and "
            "name that (`skipstone convert ADAPTER OUT` merges it into its base), or the folder of the model alone"
        )


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER
