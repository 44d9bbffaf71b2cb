"""Interleaved timing, and energy from counters that a machine may not have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.measure.speed import PREFILLS, Lap, Rate, decode_task, find_meter, prefill_task, take_turns


def test_tasks_take_turns_and_the_first_round_is_thrown_away() -> None:
    order: list[str] = []

    def task(name: str, seconds: float) -> Lap:
        order.append(name)
        return Lap(tokens=10, seconds=100.0 if len(order) <= 3 else seconds, joules=None)

    rates = take_turns({name: lambda name=name: task(name, 2.0) for name in "abc"}, rounds=3)  # type: ignore[misc]
    assert "".join(order) == "cba" + "abc" + "cba" + "abc"
    assert all(rate.tokens_per_second == 5.0 and rate.spread == 0 and len(rate.laps) == 3 for rate in rates.values())


def test_a_rate_is_a_median_with_its_spread() -> None:
    rate = Rate(laps=tuple(Lap(tokens=12, seconds=s, joules=j) for s, j in ((1.0, 3.0), (2.0, 1.0), (3.0, 2.0))))
    assert rate.tokens_per_second == 6.0
    assert rate.spread == pytest.approx((12 - 4) / 2 / 6)
    assert rate.joules_per_token == pytest.approx(6 / 36)
    assert Rate(laps=(*rate.laps, Lap(tokens=1, seconds=1.0, joules=None))).joules_per_token is None


def test_decoding_runs_the_passes_that_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SkipstoneForCausalLM(SkipstoneConfig(vocab_size=17, hidden_size=16, num_hidden_layers=2)).eval()
    shapes: list[tuple[int, ...]] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    ids = torch.randint(17, (3, 5))
    assert decode_task(model, ids, 4)().tokens == 12
    assert shapes == [(3, 5), *[(3, 1)] * 4]
    assert prefill_task(model, ids)().tokens == 15 * PREFILLS
    assert shapes[5:] == [(3, 5)] * PREFILLS
    hook.remove()


def counter(folder: Path, joules: float, limit: float = 100.0) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "max_energy_range_uj").write_text(f"{int(limit * 1e6)}\n")
    (folder / "energy_uj").write_text(f"{int(joules * 1e6)}\n")


def test_rapl_sums_packages_and_survives_a_counter_that_starts_again(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert find_meter(cpu, tmp_path) is None
    for name, joules in (("intel-rapl:0", 90.0), ("intel-rapl:1", 10.0), ("intel-rapl:0:0", 50.0)):
        counter(tmp_path / name, joules)
    meter = find_meter(cpu, tmp_path)
    assert meter is not None
    start = meter.read()
    counter(tmp_path / "intel-rapl:0", 4.0)  # past 100 J
    counter(tmp_path / "intel-rapl:1", 11.5)
    counter(tmp_path / "intel-rapl:0:0", 99.0)  # a domain inside package 0
    assert meter.read() - start == pytest.approx(14.0 + 1.5)
    assert meter.read() - start == pytest.approx(15.5)


def test_counters_that_cannot_be_read_are_no_meter(tmp_path: Path) -> None:
    counter(tmp_path / "intel-rapl:0", 1.0)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert find_meter(torch.device("cpu"), tmp_path) is None
