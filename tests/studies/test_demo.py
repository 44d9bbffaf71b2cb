"""The demonstration: the text below its table, and its smallest scale, which `make demo` runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.measure.speed import prefill
from skipstone.ops import decode_stack
from skipstone_studies.page import lookup
from skipstone_studies.quality import demo

ROOT = Path(__file__).resolve().parents[2]


def recorded(arm: str) -> dict[str, Any]:
    path = ROOT / "results" / "demo" / "records" / "laptop" / f"{arm}-seed0.json"
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["figures"]
    return figures


def ratio(key: str) -> str:
    speeds = [lookup(recorded(arm), f"{key}.tokens_per_second") for arm in ("mod", "dense")]
    assert speeds[0] is not None
    assert speeds[1] is not None
    return f"{speeds[0] / speeds[1]:.2f}"


def test_the_larger_scale_is_quoted_from_its_records() -> None:
    assert f"trained Mixture-of-Depths {ratio('training_speed')} times" in demo.LARGER
    assert f"decoded it {ratio('comparison.speed.decode 1')} times as fast" in demo.LARGER
    assert f"{ratio('comparison.speed.decode 8')} times with 8 rows" in demo.LARGER


def figures(training: float, decoding: float) -> dict[int, dict[str, Any]]:
    sample = {"prompt": "A:", "pieces": [["b", 1.0], ["c", 0.5]]}
    speed = {"decode 1": {"tokens_per_second": decoding}}
    return {0: {"training_speed": {"tokens_per_second": training}, "comparison": {"speed": speed}, "sample": sample}}


def test_the_terminal_is_told_what_is_faster_and_what_is_not() -> None:
    text = demo.closing("quick", {"dense": figures(10, 4), "mod": figures(15, 3), "polyglu": figures(5, 2)})
    assert "In training, faster than dense: mod (1.50×); slower: polyglu (0.50×)." in text
    assert "In decoding, slower: mod (0.75×), polyglu (0.50×)." in text
    assert "A:bc" in text
    assert demo.LARGER in text
    assert demo.LARGER not in demo.closing("laptop", {"dense": figures(10, 4), "mod": figures(15, 3)})


def test_the_larger_scale_keeps_its_recipes() -> None:
    quick, laptop = demo.arms("quick"), demo.arms("laptop")
    assert list(quick) == list(laptop) == ["dense", "mod", "tsa", "polyglu", "all"]
    assert laptop["dense"]["data"]["validation_rows"] == 512
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "SCALE ?= quick\n" in makefile


@pytest.mark.parametrize("arm", demo.arms("quick"))
@torch.no_grad()
def test_a_step_of_every_arm_is_one_compiled_call(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no mechanism falls back unnoticed to a way of several times its cost."""
    pytest.importorskip("numba")
    model = SkipstoneForCausalLM(SkipstoneConfig(vocab_size=61, **demo.arms("quick")[arm]["model"])).eval()
    compiled, run = [], decode_stack.run
    monkeypatch.setattr(
        decode_stack, "run", lambda x, program, *rest: compiled.append(len(program.table_LC)) or run(x, program, *rest)
    )
    token, cache = prefill(model, torch.randint(0, 61, (1, 12)))
    for _ in range(4):
        token = model(token, past_key_values=cache, use_cache=True).logits.argmax(-1)
    assert compiled == [len(model.model.layers)] * 4
