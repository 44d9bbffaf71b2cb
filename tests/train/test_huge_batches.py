"""A batch that no machine can hold is refused before its rows are built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from skipstone.data import prepare
from skipstone.train.training import train

MODEL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("options", "data", "says"),
    [
        ({"batch_size": 10_000_000}, {}, "train.batch_size is too large: the hidden states of 10,000,000 rows"),
        ({"eval_batch_size": 10_000_000}, {}, "train.eval_batch_size is too large"),
        ({"batch_size": 16}, {"context": 1_000_000_000}, "rows of 1,000,000,000 tokens alone take"),
    ],
)
def test_it_is_one_line(
    options: dict[str, Any], data: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skipstone.train.setup.psutil.virtual_memory", lambda: type("", (), {"total": 2**36}))
    monkeypatch.setattr(prepare, "prepare", lambda *_, **__: pytest.fail("data were read"))
    config = {
        "model": MODEL,
        "data": {"corpus": "reset-s3", "context": 256, **data},
        "train": {"steps": 2, "warmup_steps": 1, "device": "cpu", **options},
    }
    with pytest.raises(ValueError, match=says):
        train(config, out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
