"""What can be said about a checkpoint's folder before any library reads it."""

from __future__ import annotations

from pathlib import Path

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how the text begins that git-lfs leaves in place of a file
READ = {".safetensors", ".bin", ".json", ".model", ".gguf", ".txt"}
ADAPTER = "adapter_config.json"


def check_folder(folder: Path) -> None:
    """Raise ValueError, one line, for pointers of git-lfs in place of files, and for a folder that holds an adapter.

    A hub's name that is no folder passes.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.suffix in READ and path.is_file() and _is_pointer(path):
            raise ValueError(f"{str(path)!r} is a pointer of git-lfs, not the file itself; run `git lfs pull` there")
    if (folder / ADAPTER).is_file():
        # transformers would apply it silently if PEFT is installed, and leave it out silently otherwise.
        raise ValueError(
            f"{str(folder)!r} holds an adapter ({ADAPTER}); merge it into its base first "
            "(PEFT: model.merge_and_unload().save_pretrained(FOLDER)) and name that folder"
        )


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER
