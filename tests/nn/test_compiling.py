"""What numba compiles for a decoding step: only what a model needs, once, and not without a word if it takes long."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("numba")

import skipstone
from skipstone.core import lock
from skipstone.nn import compiled_run
from skipstone.nn.block_table import sizes_of
from skipstone.ops import decode_stack


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What is logged while the test runs."""
    lines: list[str] = []
    logger, handler = logging.getLogger(decode_stack.__name__), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def test_compiling_for_long_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    def slowly(*needed: bool) -> tuple[bool, ...]:
        time.sleep(0.2)
        return needed

    monkeypatch.setattr(decode_stack, "_native", lambda: SimpleNamespace(units=slowly))
    for seconds in (0.01, 5.0):
        monkeypatch.setattr(decode_stack, "LONG_S", seconds)
        assert decode_stack._units.__wrapped__(True, False) == (True, False)
    assert said == [decode_stack.COMPILING]


def test_waiting_for_another_process_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, said: list[str], tmp_path: Path
) -> None:
    @contextmanager
    def slowly(folder: Path, *, wait: bool) -> Iterator[None]:
        time.sleep(0.2)
        yield

    monkeypatch.setattr(decode_stack, "LONG_S", 0.05)
    monkeypatch.setattr(compiled_run, "locked", slowly)
    monkeypatch.setattr(decode_stack, "prepare", lambda program: None)
    config = skipstone.SkipstoneConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=23)
    blocks = skipstone.SkipstoneForCausalLM(config).eval().model.layers
    compiled_run.CompiledRun(blocks, sizes_of(blocks))
    assert said == [decode_stack.WAITING]


def test_only_what_a_model_needs_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    native = decode_stack._native()
    asked: list[str] = []
    monkeypatch.setattr(type(native.crew), "address", property(lambda unit: asked.append(unit.function.__name__) or 1))
    assert native.units(False, False, False, False, False).count(1) == len(asked) - 1
    assert sorted(asked) == ["attend", "attention", "crew", "mlp", "single_rows", "turn"]
    asked.clear()
    assert 0 not in native.units(True, True, True, True, True)
    assert len(asked) == len(native.UNITS) + 1
    asked.clear()
    native.units(False, True, False, True, False)
    assert "summed" in asked
    assert {"four_bit_rows", "round_tokens"} <= {*asked}
    assert not {"summed_int8", "grouped_rows"} & {*asked}


@pytest.mark.parametrize("lockable", [True, False])
def test_processes_that_begin_together_compile_one_after_the_other(
    lockable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, held = decode_stack.prepare, list[Any]()
    monkeypatch.setattr(decode_stack, "prepare", lambda program: held.append(dict(lock._held)) or prepare(program))
    if not lockable:
        monkeypatch.setattr(decode_stack, "kept", lambda: decode_stack.Path("/dev/null/none"))
    config = skipstone.SkipstoneConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=23)
    model = skipstone.SkipstoneForCausalLM(config).eval()
    model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False)
    assert any(str(decode_stack.kept() / "step") in path for _, path in held[0]) == lockable
    assert not held[-1]
