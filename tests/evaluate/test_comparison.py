"""`compare`: the data that each figure is measured on, and the cells of figures that cannot be measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from generate.folders import MOD, TSA, reset_data, text_data, write_run
from skipstone.evaluate import comparison as module
from skipstone.evaluate.comparison import Comparison, compare
from skipstone.evaluate.tables import UNKNOWN
from skipstone.measure.losses import MEASURED, headroom_captured
from skipstone.measure.speed import cache_bytes
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig
from skipstone.model.cost import cost
from skipstone.model.quantise import quantise
from skipstone.runs import Run

pytestmark = pytest.mark.slow  # five models are timed, counted and measured

ARMS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "dense": ([], "silu"),
    "mod": ([MOD], "silu"),
    "all": ([MOD, TSA], "polyglu"),
    "topk": ([{**MOD, "decision": "topk"}], "silu"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    data = text_data(root / "text")
    for name, (mechanisms, activation) in ARMS.items():
        write_run(root / name, data, mechanisms, activation)
    return root


@pytest.fixture(scope="module")
def compared(root: Path) -> Comparison:
    return compare([*(root / name for name in ARMS), root / "mod" / "model"], rounds=1)


def row(found: Comparison, name: str) -> list[str]:
    """A row of the Markdown table."""
    line = next(line for line in found.markdown().splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def test_every_run_is_measured(compared: Comparison, root: Path) -> None:
    assert [run.name for run in compared.runs] == ["dense", "mod", "all", "topk", "model"]
    for run in compared.runs:
        assert run.flops.agree
        assert run.pass_name == ("oracle" if run.name == "topk" else "executed")
    for run in compared.runs[:3]:
        assert set(run.rates) == {"prefill", "decode 1", "decode 8"}
        assert all(len(rate.laps) == 1 and rate.tokens_per_second > 0 for rate in run.rates.values())
    assert row(compared, "parameters")[0] == f"{Run(root / 'dense').load_model().num_parameters():,}"
    assert compared.runs[1].flops.share < 1 == compared.runs[0].flops.share


def test_what_a_saved_model_does_not_tell_is_a_dash(compared: Comparison) -> None:
    assert row(compared, "training tokens/s") == ["1,234"] * 4 + [UNKNOWN]
    assert row(compared, "validation loss, causal") == ["2.2500"] * 4 + [UNKNOWN]


def test_topk_cannot_generate_and_the_table_says_why(compared: Comparison) -> None:
    assert row(compared, "decode tokens/s, batch 1")[3] == UNKNOWN
    assert row(compared, "KV bytes/token")[3] == UNKNOWN
    assert "topk: no causal form, so it cannot generate" in compared.markdown()


def test_capacity_by_layer_has_a_row_for_each_mechanism(compared: Comparison) -> None:
    assert row(compared, "1 token_selective")[:2] == [UNKNOWN, UNKNOWN]
    assert row(compared, "3 mixture_of_depths")[3] == "25.0 %"
    kept = compared.runs[2].layers[3]["mixture_of_depths"]["capacity"]
    assert row(compared, "3 mixture_of_depths")[2] == f"{100 * kept:.1f} %"


def test_overhead_is_of_routing_and_of_nothing_else(compared: Comparison) -> None:
    dense, mod, all_three, topk, _ = (run.overhead for run in compared.runs)
    assert (dense.routing, dense.activation) == (0, 0)
    assert 0 < mod.routing < 1
    assert mod.activation == topk.activation == 0
    assert 0 < all_three.activation < 1
    assert all_three.routing + all_three.activation < 1


@pytest.mark.slow
def test_measuring_leaves_the_model_as_it_was(root: Path) -> None:
    model = Run(root / "all").load_model()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    from skipstone.measure.overhead import overhead
    from skipstone.measure.passes import PASSES

    overhead(model, PASSES["oracle"], {"input_ids": torch.randint(256, (2, 24))})
    assert not model.training
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.routing_modules())


def test_cache_bytes_are_those_of_what_was_kept(root: Path) -> None:
    ids = torch.randint(256, (3, 24))
    dense = Run(root / "dense").load_model()
    entry = 2 * 4 * 32 + 8  # key and value in fp32, and a slot
    assert cache_bytes(dense, ids).kv == 4 * entry == cost(dense, tokens=24).kv_bytes_per_token
    model = Run(root / "all").load_model()
    found = cache_bytes(model, ids)
    records = model(ids, routing="causal", output_records=True).records
    kept = [int(r["mixture_of_depths"].kept_BT.sum()) if "mixture_of_depths" in r else 3 * 24 for r in records]
    assert kept[1] < 3 * 24
    assert found.kv == pytest.approx(sum(kept) * entry / (3 * 24))
    assert found.state > 0
    assert found.allocated >= found.kv + found.state


def test_figures_leave_as_json_markdown_and_table(compared: Comparison) -> None:
    values = json.loads(json.dumps(compared.to_dict(), allow_nan=False))
    assert [run["run"] for run in values["runs"]] == ["dense", "mod", "all", "topk", "model"]
    assert values["runs"][0]["speed"]["decode 8"]["tokens_per_second"] > 0
    assert values["machine"]["threads"] == torch.get_num_threads()
    assert compared.table().row_count > 3
    assert "equal the cost model's" in compared.markdown()


def test_many_runs_are_shown_a_few_at_a_time(compared: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compared.table().row_count
    monkeypatch.setattr(module, "COLUMNS", 3)
    assert compared.table().row_count > whole


@pytest.mark.slow
def test_headroom_between_the_twins(tmp_path: Path) -> None:
    data = reset_data(rows=24)
    dense = write_run(tmp_path / "dense", data, [])
    forced = write_run(tmp_path / "forced", data, [MOD], train={"routing": "difficulty"})
    learned = write_run(tmp_path / "learned", data, [{**MOD, "decision": "positional"}])
    found = compare([learned], dense=dense, forced=forced, rounds=1)
    assert found.forced is not None
    assert found.forced.pass_name == "forced"
    accuracy = [run.accuracy for run in (found.runs[0], found.dense, found.forced) if run is not None]
    for name in MEASURED:
        low, middle, high = (a[name] for a in accuracy if a is not None)
        expected = headroom_captured(low, middle, high)
        assert found.captured["learned"][name] == pytest.approx(expected, nan_ok=True)
    assert not math.isnan(found.captured["learned"]["all operations"])
    assert "learned: headroom captured" in found.markdown()
    json.dumps(found.to_dict(), allow_nan=False)


def test_headroom_is_a_share_of_what_was_possible() -> None:
    assert headroom_captured(0.7, 0.5, 0.9) == pytest.approx(0.5)
    assert headroom_captured(0.4, 0.5, 0.9) == pytest.approx(-0.25)
    assert math.isnan(headroom_captured(0.5, 0.5, 0.5))


def test_wrong_input_is_one_clear_line(root: Path, tmp_path: Path) -> None:
    run = root / "mod"
    s3 = write_run(tmp_path / "s3", reset_data(rows=2), [])
    cases: list[tuple[list[Path], dict[str, Path], str]] = [
        ([], {}, "at least one run"),
        ([run], {"dense": run}, "name both the dense and the forced one"),
        ([run], {"dense": s3, "forced": s3}, "mod was not trained on a corpus of known difficulty"),
        ([s3], {"dense": s3, "forced": s3}, "s3 has no depth mechanism that could be forced"),
        ([tmp_path / "nothing"], {}, "does not exist"),
    ]
    for runs, options, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            compare(runs, **options)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bits", [4, None])
def test_a_model_that_is_not_trained_has_no_overhead_of_training(root: Path, tmp_path: Path, bits: int | None) -> None:
    options = {"hidden_size": 64, "head_candidates": 32, "head_directions": 64} if bits is None else {}
    model = SkipstoneForCausalLM(SkipstoneConfig(**{**Run(root / "mod").load_model().config.to_dict(), **options}))
    (model if bits is None else quantise(model, bits)).save_pretrained(tmp_path / "changed")
    found = compare([root / "mod", tmp_path / "changed"])
    assert found.runs[0].overhead is not None
    assert found.runs[1].overhead is None
    assert found.to_dict()["runs"][1]["training_overhead"] is None
    assert found.markdown()
