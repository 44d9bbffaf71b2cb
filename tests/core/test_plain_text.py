"""A file with one JSON object is read in one place, whose errors name the file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from skipstone.core.checksums import Damaged
from skipstone.core.plain_text import read_object
from skipstone.core.sealed import read_sealed, sealed


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it is empty"),
        (b'{"a": ', "Expecting value"),
        (b"\xff{}", "can't decode byte"),
        (b"[1]", "it does not contain a JSON object"),
        (b"3", "it does not contain a JSON object"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_object_is_named(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content)
    for read in (read_object, read_sealed):
        with pytest.raises(ValueError, match=rf"some\.json' cannot be read: .*{says}"):
            read(path)


def test_an_object_is_read_with_and_without_its_hash(tmp_path: Path) -> None:
    path, values = tmp_path / "some.json", {"a": [1, 2], "ü": None}
    for text in (json.dumps(sealed(values)), json.dumps(values)):
        path.write_text(text, encoding="utf-8")
        assert read_sealed(path) == values
    path.write_text(json.dumps(sealed(values)).replace("[1, 2]", "[1, 3]"), encoding="utf-8")
    with pytest.raises(Damaged, match=r"some\.json' is damaged or was edited"):
        read_sealed(path)
    assert read_object(path)["a"] == [1, 3]


def test_a_file_that_is_missing_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "absent.json")


def test_a_device_is_not_waited_for() -> None:
    with pytest.raises(ValueError, match="cannot be read: it is a device or a pipe"):
        read_object(Path(os.devnull))
