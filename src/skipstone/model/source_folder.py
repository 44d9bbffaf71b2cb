"""Checks of a checkpoint's folder before any library reads it."""

from __future__ import annotations

from pathlib import Path

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # start of the text that git-lfs leaves in place of a file
READ = {".safetensors", ".bin", ".json", ".model", ".gguf", ".txt"}
ADAPTER = "adapter_config.json"


def check_folder(folder: Path) -> None:
    """Raise ValueError if a folder holds git-lfs pointers instead of files, or an adapter.

    A hub name that is not a folder passes.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.suffix in READ and path.is_file() and _is_pointer(path):
            raise ValueError(f"{str(path)!r} is a pointer of git-lfs, not the file itself; run `git lfs pull` there")
    if (folder / ADAPTER).is_file():
        # transformers would silently apply it if PEFT is installed, and silently ignore it otherwise
        raise ValueError(
            f"{str(folder)!r} holds an adapter ({ADAPTER}); merge it into its base first "
            "(PEFT: model.merge_and_unload().save_pretrained(FOLDER)) and name that folder"
        )


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER
