"""Small text files that state their own SHA-256 or CRC-32, so that damage is noticed when they are read.

A JSON object states its hash under the key `sha256`, a YAML file in a comment at its beginning, and each line of a
JSON-lines file under the key `crc32`. Files of earlier releases have no hash; these, and files from which somebody who
edited them has removed it, are read unchecked.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

from skipstone.core.checksums import Damaged
from skipstone.core.plain_text import read_object
from skipstone.core.strict import PlainDict, PlainMapping

KEY, LINE_KEY = "sha256", "crc32"
COMMENT = "# sha256 of the lines below, by which damage is noticed; remove this line if you edit them: "


def sealed(values: PlainMapping) -> PlainDict:
    """Return a copy of the JSON object `values` with the SHA-256 of its content under the last key, `sha256`."""
    return {**values, KEY: _digest(values)}


def unsealed(values: PlainDict, path: Path) -> PlainDict:
    """Return the content of a JSON object that `sealed` made, without the key `sha256`, after comparing the hash.

    values: the object as read; without the key it is returned unchecked. path: the file, named in the error. Raises
    `Damaged` (a ValueError) if the content has a different SHA-256.
    """
    if KEY not in values:
        return values
    content = {name: value for name, value in values.items() if name != KEY}
    if values[KEY] != _digest(content):
        raise Damaged(
            f"{str(path)!r} is damaged or was edited: its content has another SHA-256 than it states; if the change is "
            f"yours, remove the key {KEY!r} from it"
        )
    return content


def read_sealed(path: Path) -> PlainDict:
    """Return the JSON object in the file `path`, made by `sealed`, without the key `sha256`, after comparing the hash.

    A file without this key is read unchecked. Raises `Damaged` (a ValueError) if the content has a different SHA-256,
    ValueError, which names the file, if it does not hold a JSON object in UTF-8, and OSError if it cannot be opened.
    """
    return unsealed(read_object(path), path)


def sealed_text(text: str) -> str:
    """Return a YAML text below a comment line that states the SHA-256 of the text, so that damage is noticed."""
    return f"{COMMENT}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def check_text(text: str, path: Path) -> None:
    """Compare a text with the SHA-256 in its first line, as `sealed_text` writes it; a text without such a line passes.

    path: the file, named in the error. Raises `Damaged` (a ValueError) if the hash differs.
    """
    first, _, below = text.partition("\n")
    if first.startswith(COMMENT) and first != COMMENT + hashlib.sha256(below.encode()).hexdigest():
        raise Damaged(
            f"{str(path)!r} is damaged or was edited: its lines have another SHA-256 than the first one states; if the "
            "change is yours, remove that line"
        )


def sealed_line(values: PlainMapping) -> str:
    """Return the JSON object `values` as one line, with the CRC-32 of its content under the last key, `crc32`."""
    return json.dumps({**values, LINE_KEY: _crc(values)})


def unsealed_line(values: PlainDict) -> PlainDict:
    """Compare a parsed line that `sealed_line` made with its checksum, and return it without the key `crc32`.

    values: the object as read; without the key it is returned unchecked. Raises ValueError if the content has a
    different CRC-32.
    """
    if LINE_KEY not in values:
        return values
    content = {name: value for name, value in values.items() if name != LINE_KEY}
    if values[LINE_KEY] != _crc(content):
        raise ValueError(
            f"it is damaged or was edited: its {LINE_KEY} does not match (remove that key if you edited it)"
        )
    return content


def _text(values: PlainMapping) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def _digest(values: PlainMapping) -> str:
    # as it will be read: tuples are lists, keys are strings
    return hashlib.sha256(_text(json.loads(json.dumps(values)))).hexdigest()


def _crc(values: PlainMapping) -> str:
    return f"{zlib.crc32(_text(json.loads(json.dumps(values)))):08x}"
