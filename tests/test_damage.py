"""A short version of `damage.py`: no damage to a file gives a wrong result in silence, or a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from damage import Case, attack_all, table
from skipstone.core.checksums import Damaged
from skipstone.core.sealed import check_text, sealed, sealed_line, sealed_text, unsealed, unsealed_line


@pytest.mark.slow
def test_damage_is_named(tmp_path: Path) -> None:
    found, told = attack_all(tmp_path, 2)
    assert not told, "\n".join(told)
    assert sum(count.total() for _, count in found.values()) >= 600
    assert "**all**" in table(found)


def test_damage_that_is_not_noticed_is_found(tmp_path: Path) -> None:
    import random

    from damage import attack

    path = tmp_path / "numbers.json"
    path.write_text(json.dumps({"loss": 12345678901234567890123456789}))
    case = Case(kind="bad", verbs="none", files=[path], use=lambda: json.loads(path.read_text()))
    found, told = attack(case, 8, random.Random(0))
    assert found["wrong"] > 0
    assert any("flip: wrong" in line for line in told)


def test_sealed_files_notice_changes(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    content = {"a": 1.5, "b": [1, (2, 3)], "c": {"d": None}, "e": "ä"}
    written = json.loads(json.dumps(sealed(content)))
    assert unsealed(dict(written), path) == json.loads(json.dumps(content))
    assert unsealed({"a": 1}, path) == {"a": 1}, "files of earlier releases state nothing"
    with pytest.raises(Damaged, match=r"x.json' is damaged or was edited.*remove the key 'sha256'"):
        unsealed({**written, "a": 2.5}, path)
    text = sealed_text("model: {}\ndata: {}\n")
    check_text(text, path)
    check_text("model: {}\n", path)
    with pytest.raises(Damaged, match="remove that line"):
        check_text(text.replace("data", "date"), path)
    line = json.loads(sealed_line({"step": 1, "loss": 0.1}))
    assert unsealed_line(line) == {"step": 1, "loss": 0.1}
    with pytest.raises(ValueError, match="its crc32 does not match"):
        unsealed_line({**line, "loss": 0.2})
