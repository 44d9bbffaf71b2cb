"""Checks that files of a model or tokenizer are there and readable, before other libraries read them.

Errors name the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from skipstone.core.plain_text import read_object, read_text
from skipstone.core.strict import PlainDict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OBJECTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
)
TEXTS = ("chat_template.jinja", "merges.txt", "vocab.txt")
BINARIES = ("tokenizer.model", "spiece.model")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # start of the text that git-lfs leaves in place of a file


def is_present(path: Path) -> bool:
    """Return whether there is anything at `path`; a link whose target is gone counts."""
    return path.is_symlink() or path.exists()


def require_file(path: Path) -> None:
    """Raise ValueError if `path` is a folder, a link whose target is gone, a git-lfs pointer, or not there."""
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{str(path)!r} is a link to a file that is not there")
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is {'a folder' if path.is_dir() else 'not a file'}; a file is expected")
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{str(path)!r} is a pointer of git-lfs, not the file itself; run `git lfs pull` there")


def object_in(path: Path) -> PlainDict:
    """Return the JSON object in the file `path`.

    Raises ValueError, which names the path, if it is not a file, only a pointer of git-lfs, or holds no JSON object in
    UTF-8.
    """
    require_file(path)
    return read_object(path)


def check_tokenizer_files(folder: Path) -> None:
    """Raise ValueError, which names the file, if a file of a tokenizer is empty, damaged or not a file.

    Of the files that are there, tokenizer.json, tokenizer_config.json, special_tokens_map.json, added_tokens.json,
    vocab.json and chat_template.json must hold JSON objects, merges.txt, vocab.txt and chat templates (.jinja) UTF-8
    text, and tokenizer.model and spiece.model at least a byte. folder: the folder of the tokenizer; nothing is checked
    if there is none (a hub name, for example).
    """
    if not folder.is_dir():
        return
    for path in (folder / name for name in OBJECTS):
        if is_present(path):
            object_in(path)
    for path in (*(folder / name for name in TEXTS), *folder.glob("additional_chat_templates/*.jinja")):
        if is_present(path):
            require_file(path)
            read_text(path)
    for path in (folder / name for name in BINARIES):
        if is_present(path):
            require_file(path)
            if not path.stat().st_size:
                raise ValueError(f"{str(path)!r} cannot be read: it is empty")


def read_tokenizer(source: str | Path, **options: object) -> PreTrainedTokenizerBase:
    """Load a tokenizer by transformers' AutoTokenizer, without running code of its folder.

    source: a folder or a hub name. options: further arguments of `AutoTokenizer.from_pretrained`. Raises ValueError
    with one line that names the file, or the folder if none of its files can be blamed alone.
    """
    from transformers import AutoTokenizer

    folder, gguf_file = Path(source), options.get("gguf_file")
    if gguf_file is None:
        check_tokenizer_files(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(source), trust_remote_code=False, **options
        )
    except Exception as error:  # the tokenizers library raises plain Exception
        whole = folder / "tokenizer.json"
        if isinstance(gguf_file, str):
            folder = folder / gguf_file
        elif whole.is_file() and (reason := _why_unreadable(whole)):
            raise ValueError(f"{str(whole)!r} is no definition of a tokenizer: {reason}") from error
        raise ValueError(f"the tokenizer in {str(folder)!r} cannot be loaded: {_first_lines(error)}") from error
    most = tokenizer.model_max_length  # compared with lengths whenever a text is encoded
    if isinstance(most, bool) or not isinstance(most, int | float):
        path = str(folder / "tokenizer_config.json")
        raise ValueError(f"model_max_length in {path!r} must be a number of tokens, got {most!r}")
    return tokenizer


def _why_unreadable(path: Path) -> str | None:
    """Return why the tokenizers library cannot read the file `path`, a tokenizer.json; None if it can."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        return _first_lines(error)
    return None


def _first_lines(error: Exception) -> str:
    """Return an error's message as one line of at most 300 characters, with its type if it says little without."""
    text = " ".join(str(error).split())[:300]
    plain = type(error) is Exception or isinstance(error, OSError | ValueError | ImportError)
    return text if text and plain else f"{type(error).__name__}: {text}".removesuffix(": ")
