"""The user's own corpora: text files, JSON lines, and datasets of the Hugging Face hub or in its file formats."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from skipstone.core import checksums
from skipstone.core.hub import why_unreachable
from skipstone.core.plain_text import parse_json
from skipstone.core.progress_bar import advance
from skipstone.core.strict import PlainDict
from skipstone.data.corpus import Corpus, Documents, Reader, by_hash, contiguous
from skipstone.data.fetch import offline

BYTES = "bytes of JSON"  # the unit in which reading is told
OWN_SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}


def text(argument: str) -> Corpus:
    """Return the corpus `text:PATH`: a UTF-8 file, or all .txt files below a folder, each of which is a document.

    Files are ordered by path. If the folder has train.txt and validation.txt (or valid.txt or val.txt), and optionally
    test.txt, these are the splits, and other files are not read. Otherwise the whole text is cut into 90 % train and 10
    % validation. argument: the PATH. Raises FileNotFoundError if there is no such file, and `Damaged` (a ValueError) if
    a file differs from the hashes that the folder has recorded; reading raises ValueError for a file that is not UTF-8.
    """
    files, path = _files("text", argument, ".txt"), Path(argument).expanduser()
    if path.is_dir():
        checksums.check(path)  # of `skipstone write`
    own = _own_files(path)
    readers = {split: partial(_read, [file]) for split, file in own.items()}
    return Corpus(
        name=f"text:{argument}",
        description=f"{len(files)} text file(s) of yours",
        licence="your own",
        readers=readers if {"train", "validation"} <= set(own) else contiguous(partial(_read, files), (90, 10)),
    )


def _own_files(folder: Path) -> dict[str, Path]:
    """Return the files of a folder whose names say which split they are, such as train.txt and valid.txt, by split."""
    found: dict[str, Path] = {}
    for split, stems in OWN_SPLITS.items():
        for stem in stems:
            if (folder / f"{stem}.txt").is_file():
                found.setdefault(split, folder / f"{stem}.txt")
    return found


def _read(files: list[Path]) -> Documents:
    return tuple(map(_decode, files))


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None


def jsonl(argument: str) -> Corpus:
    """Return the corpus `jsonl:PATH`: JSON objects, one per line, whose field "text" is a document.

    argument: PATH, a file, or a folder with .jsonl or .jsonl.gz files. Documents are assigned to train, validation and
    test by the hash of their text (90, 5 and 5 %). Raises FileNotFoundError if there is no such file; reading raises
    ValueError for a line without such a text.
    """
    files = jsonl_files(argument)
    return Corpus(
        name=f"jsonl:{argument}",
        description=f"{len(files)} file(s) of JSON lines of yours",
        licence="your own",
        readers=by_hash(lambda: tuple(document for file in files for document in read_jsonl(file))),
    )


def jsonl_files(argument: str) -> list[Path]:
    """Return the file PATH, whatever its name, or all .jsonl and .jsonl.gz files at any depth below the folder PATH.

    They are ordered by path. argument: PATH. Raises FileNotFoundError if PATH does not exist or is a folder without
    such a file, and ValueError for a device or a pipe.
    """
    return _files("jsonl", argument, ".jsonl", ".jsonl.gz")


def _files(kind: str, argument: str, *endings: str) -> list[Path]:
    """Return the file that a corpus `kind:PATH` names, or all files below a folder whose names end so.

    Pipes and devices are refused: a corpus is read more than once, and some of them never end.
    """
    path = Path(argument).expanduser()
    if not argument or not path.exists():
        raise FileNotFoundError(f"corpus {kind}:PATH: there is no file or folder {argument!r}")
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.name.endswith(endings) and file.is_file())
        if not found:
            raise FileNotFoundError(f"corpus {kind}:{argument}: no {' or '.join(endings)} file below that folder")
        return found
    if not path.is_file():
        raise ValueError(f"corpus {kind}:{argument}: it is a device or a pipe, but a file or folder is expected")
    return [path]


def read_jsonl(path: Path, field: str = "text") -> Iterator[str]:
    """Yield the string in `field` of the JSON object on each line of the file `path`, which may be compressed (.gz).

    Empty lines are skipped. Raises ValueError, naming the line, for a line that is not JSON or has no such string.
    """
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            advance(BYTES, len(line))
            if not line.strip():
                continue
            try:
                entry = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, is not JSON: {error}") from None
            if not isinstance(entry, dict) or not isinstance(entry.get(field), str):
                keys = f" (its keys: {', '.join(entry)})" if isinstance(entry, dict) else ""
                if isinstance(entry, dict) and field in entry:
                    keys = f", which is {'null' if entry[field] is None else f'of type {type(entry[field]).__name__}'}"
                raise ValueError(f"{path}, line {number}: no text under {field!r}{keys}")
            yield entry[field]


def huggingface(argument: str) -> Corpus:
    """Return a dataset of the Hugging Face hub, or of a local folder, as a corpus in which each row is a document.

    argument: `NAME`, `OWNER/NAME`, `OWNER/NAME/CONFIG` or a folder. The text is the column "text" or, without one, the
    only column of strings. The dataset's own splits are used; if it has none for validation, its train split is divided
    by the hash of the documents (90 % train, 5 % validation and, unless the dataset has one, 5 % test). The dataset is
    loaded at once, because its splits are not known before. Raises ValueError for a dataset without usable splits or
    without the package `datasets`, FileNotFoundError if the dataset cannot be loaded.
    """
    if not argument:
        raise ValueError("corpus hf:NAME: the name of a dataset is missing")
    loaded = load_dataset(argument)
    name = f"hf:{argument}"
    own: dict[str, Reader] = {}
    for split, names in OWN_SPLITS.items():
        found = next((n for n in names if n in loaded), None)
        if found is not None:
            own[split] = cache(partial(_column, name, loaded[found]))
    if "train" in own and "validation" not in own:
        own = by_hash(own["train"]) | ({"test": own["test"]} if "test" in own else {})
    if not own:
        raise ValueError(
            f"corpus {name}: its splits are {', '.join(map(str, loaded))}; none is train, validation, test"
        )
    return Corpus(name=name, description=f"dataset {argument}", licence="see its dataset card", readers=own)


def load_dataset(argument: str, streaming: bool = False) -> PlainDict:
    """Return the splits of a Hugging Face dataset by name, as objects of the package `datasets`.

    argument: `NAME`, `OWNER/NAME`, `OWNER/NAME/CONFIG` or a folder. streaming: whether to read rows one after another
    instead of downloading everything first. Raises ValueError without the package `datasets`, FileNotFoundError if the
    dataset cannot be loaded.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(f"corpus hf:{argument} needs the package datasets: pip install 'skipstone[data]'") from None
    parts = argument.split("/")
    local = Path(argument).expanduser().is_dir()
    config = parts[2] if len(parts) == 3 and not local else None
    path = str(Path(argument).expanduser()) if local else "/".join(parts[:2])
    if len(parts) > 3 and not local:
        raise ValueError(f"corpus hf:{argument}: expected NAME, OWNER/NAME, OWNER/NAME/CONFIG or a folder")
    unreachable = None if local or offline() else why_unreachable(path, "dataset")
    try:
        with _hub_offline(not local and (offline() or unreachable is not None)):
            return dict(datasets.load_dataset(path, config, streaming=streaming))
    except (OSError, ValueError, RuntimeError) as error:  # the library raises many types, with long messages
        reason = unreachable or " ".join(str(error).split())[:300]
        raise FileNotFoundError(f"corpus hf:{argument} could not be loaded: {reason}") from error


@contextmanager
def _hub_offline(wanted: bool) -> Iterator[None]:
    """Switch the libraries `datasets` and `huggingface_hub` to offline in a `with` block, if `wanted`.

    Their attributes are set, because their environment variables act only when the libraries are imported.
    """
    import datasets
    import huggingface_hub.constants as hub

    before = datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE
    if wanted:
        datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE = before


def _column(name: str, rows: Any) -> Documents:
    """Return the texts in the column `text` of a dataset's rows, or in their only column of strings.

    name: the corpus's name, for errors. Raises ValueError if there is no such column.
    """
    strings = [
        column for column, kind in rows.features.items() if getattr(kind, "dtype", None) in ("string", "large_string")
    ]
    if "text" not in strings and len(strings) != 1:
        raise ValueError(f"corpus {name}: it has no column 'text' (columns: {', '.join(rows.column_names)})")
    return tuple(row for row in rows["text" if "text" in strings else strings[0]] if row)
