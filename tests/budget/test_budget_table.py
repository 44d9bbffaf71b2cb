"""Budget tables: budgets are met on rows outside of the calibration set, and resetting restores the model exactly."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

import skipstone
from models import tiny_model
from skipstone import SkipstoneForCausalLM
from skipstone.budget import BudgetTable, calibrate
from skipstone.budget.budget_table import OperatingPoint
from skipstone.budget.calibration import meet, quantile
from skipstone.budget.handles import find_handles
from skipstone.generate.engine import generate, stream
from skipstone.measure.flops import count_flops
from skipstone.measure.passes import PASSES
from skipstone.measure.share import observe
from skipstone.train import RoutingTrainer

GATE = {"name": "token_selective", "layers": "1:", "start_bias": 0.0}
MECHANISMS: dict[str, list[dict[str, Any]]] = {
    "mixture_of_depths": [{"name": "mixture_of_depths", "layers": "1::2", "capacity": 0.25}],
    "unequal": [{"name": "mixture_of_depths", "layers": "1:", "capacity": [0.7, 0.4, 0.2], "kv": "full"}],
    "threshold": [{"name": "mixture_of_depths", "layers": "1:", "capacity": 0.5, "decision": "threshold"}],
    "gates": [GATE],
    "gates_of_a_capacity": [{**GATE, "capacity": 0.5, "training": "hard", "guidance": True}],
    "early_exit": [{"name": "early_exit", "layers": "1:", "start_bias": 1.0}],
    "gate_skip": [{"name": "gate_skip", "on": site, "layers": "1:", "gate": "token"} for site in ("attention", "mlp")],
    "nested": [{"name": "mixture_of_depths", "layers": "1:", "capacity": 0.6}, {"name": "early_exit", "layers": "2:"}],
}
QUICK = ("mixture_of_depths",)
CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MECHANISMS]
VOCAB, ROWS, TOKENS = 40, 8, 48


def text(seed: int, rows: int = ROWS) -> Tensor:
    """Sums of pairs of drawn digits: something to learn, and tokens that differ."""
    digits = torch.randint(0, VOCAB // 2, (rows, TOKENS), generator=torch.Generator().manual_seed(seed))
    return torch.where(torch.arange(TOKENS) % 3 == 2, digits.roll(1, 1) + digits.roll(2, 1), digits)


def build(mechanisms: list[dict[str, Any]]) -> SkipstoneForCausalLM:
    sizes = {"vocab_size": VOCAB, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": TOKENS}
    return tiny_model(1, **sizes, initializer_range=0.2, mechanisms=mechanisms).train()


def trained(name: str, folder: Path) -> SkipstoneForCausalLM:
    model = build(MECHANISMS[name])
    rows = [{"input_ids": row, "labels": row} for row in text(0)]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=12, per_device_train_batch_size=4, learning_rate=3e-3, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    RoutingTrainer(model=model, args=arguments, train_dataset=rows).train()
    return model.eval()


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trained model and its budget table."""
    model = trained(request.param, tmp_path_factory.mktemp(request.param))
    return model, calibrate(model, text(2, 2 * ROWS))


def everything(model: SkipstoneForCausalLM) -> tuple[dict[str, Tensor], str, list[Any]]:
    """All that says what the model computes."""
    state = {name: x.clone() for name, x in model.state_dict().items()}
    return state, json.dumps(model.config.to_dict(), default=str), [handle.state() for handle in find_handles(model)]


def same(one: Any, other: Any) -> bool:
    return one[1:] == other[1:] and all(torch.equal(one[0][name], x) for name, x in other[0].items())


def counted(model: SkipstoneForCausalLM, rows: Tensor) -> float:
    """Share of the dense FLOPs, counted on operations while they run, one row at a time."""
    forward = PASSES["executed"]
    total = sum(count_flops(lambda row=row: forward.run(model, {"input_ids": row[None]})).total for row in rows)
    dense = model.cost(tokens=TOKENS).dense
    return total / (len(rows) * dense.forward.total)


def test_budgets_are_met_on_other_rows(case: Any) -> None:
    model, budget_table = case
    low, high = budget_table.range
    other = text(7)
    assert high - low > 0.25
    for way in (0.15, 0.7):
        budget = low + way * (high - low)
        with budget_table.at(model, budget):
            assert counted(model, other) == pytest.approx(budget, rel=0.1)


def test_the_share_by_decisions_is_that_of_the_operations(case: Any) -> None:
    model, budget_table = case
    other = text(7, 5)
    with budget_table.at(model, sum(budget_table.range) / 2):
        one_at_a_time = observe(model, [{"input_ids": row[None]} for row in other])
        assert one_at_a_time.share == pytest.approx(counted(model, other), rel=1e-9)
        assert observe(model, [{"input_ids": other}]).share == pytest.approx(one_at_a_time.share, rel=1e-9)


def test_the_ends_keep_nobody_and_everybody(case: Any) -> None:
    _, budget_table = case
    assert set(budget_table.points[-1].kept) == {1.0}
    assert set(budget_table.points[0].kept) == {0.0}
    shares = [stop.share for stop in budget_table.points]
    assert all(other <= one * 1.1 for one, other in pairwise(shares))


def test_the_trained_setting_is_on_the_way(case: Any) -> None:
    model, budget_table = case
    share = observe(model, [{"input_ids": text(2, 2 * ROWS)}]).share
    stop = min(budget_table.points, key=lambda stop: abs(stop.share - share))
    thresholds = [handle.threshold for handle in find_handles(model)]
    assert any(list(stop.thresholds) == thresholds for stop in budget_table.points)
    assert stop.share == pytest.approx(share, rel=0.03)


def test_nothing_is_left_behind(case: Any) -> None:
    model, budget_table = case
    before = everything(model)
    with budget_table.at(model, budget_table.range[0]):
        assert not same(before, everything(model))
    assert same(before, everything(model))
    with pytest.raises(RuntimeError, match="stop"), budget_table.at(model, budget_table.range[0]):
        raise RuntimeError("stop")
    assert same(before, everything(model))
    budget_table.set(model, budget_table.range[0])
    budget_table.set(model, budget_table.range[1])
    budget_table.reset(model)
    assert same(before, everything(model))
    calibrate(model.train(), text(2, 2))
    assert model.training
    assert same(before, everything(model.eval()))


def test_generation_with_a_budget(case: Any) -> None:
    model, budget_table = case
    budget, prompt = budget_table.range[0] + 0.4 * (budget_table.range[1] - budget_table.range[0]), text(3, 2)[:, :16]
    before = everything(model)
    ours = generate(model, prompt, max_new_tokens=8, budget=budget, budget_table=budget_table)
    assert same(before, everything(model))
    budget_table.set(model, budget)
    theirs = model.generate(prompt, max_new_tokens=8, do_sample=False)
    budget_table.reset(model)
    assert torch.equal(ours, theirs)
    steps = stream(model, prompt, max_new_tokens=8, budget=budget, budget_table=budget_table)
    next(steps)
    assert not same(before, everything(model))
    steps.close()  # type: ignore[attr-defined]
    assert same(before, everything(model))


def test_a_saved_model_keeps_the_setting_where_it_can(case: Any, tmp_path: Path) -> None:
    model, budget_table = case
    saved = all(handle.saved for handle in find_handles(model))
    rows = [{"input_ids": text(7, 4)}]
    with budget_table.at(model, sum(budget_table.range) / 2):
        share = observe(model, rows).share
        model.save_pretrained(tmp_path)
    loaded = SkipstoneForCausalLM.from_pretrained(tmp_path).eval()
    assert (observe(loaded, rows).share == pytest.approx(share, rel=1e-6)) == saved


@pytest.mark.usefixtures("coarse_tables")
def test_a_budget_table_is_read_from_beside_the_weights(tmp_path: Path) -> None:
    build(MECHANISMS["gates"]).save_pretrained(tmp_path)
    model, prompt = SkipstoneForCausalLM.from_pretrained(tmp_path).eval(), text(3, 1)[:, :8]
    with pytest.raises(FileNotFoundError, match=r"has no budget\.json, which a budget needs: `skipstone calibrate`"):
        generate(model, prompt, max_new_tokens=2, budget=0.7)
    budget_table = skipstone.calibrate(model, text(0), text="walks")
    assert budget_table.save(tmp_path).name == "budget.json"
    assert BudgetTable.load(tmp_path) == budget_table
    assert str(budget_table).endswith("calibrated on 8 rows of 48 tokens of walks")
    ours = generate(model, prompt, max_new_tokens=6, budget=0.5)
    assert torch.equal(ours, generate(model, prompt, max_new_tokens=6, budget=0.5, budget_table=budget_table))
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        budget_table.save(tmp_path)
    (tmp_path / "budget.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"budget\.json' cannot be read"):
        BudgetTable.load(tmp_path)
    (tmp_path / "budget.json").write_text('{"handle": []}', encoding="utf-8")
    with pytest.raises(ValueError, match="did you mean 'handles'"):
        BudgetTable.load(tmp_path)


@pytest.mark.usefixtures("coarse_tables")
def test_budgets_out_of_reach_name_the_range() -> None:
    model = build(MECHANISMS["gates"])
    budget_table, prompt = calibrate(model, text(0)), text(3, 1)[:, :8]
    low, high = budget_table.range
    for budget in (low - 0.01, high + 0.01, float("nan"), -1.0):
        with pytest.raises(ValueError, match=f"out of reach: this model can execute from {low:g} to {high:g} of its"):
            generate(model, prompt, max_new_tokens=2, budget=budget, budget_table=budget_table)
    for budget in budget_table.range:
        budget_table.thresholds(budget)
    with pytest.raises(ValueError, match="a budget table has no effect without a budget"):
        generate(model, prompt, max_new_tokens=2, budget_table=budget_table)
    with pytest.raises(ValueError, match=r"another model: it sets 1\.\.3 token_selective, here are 1 mix"):
        budget_table.set(build(MECHANISMS["mixture_of_depths"]), 0.8)


MIXTURE = {"name": "mixture_of_depths", "layers": "1:", "capacity": 0.5}


@pytest.mark.parametrize(
    ("mechanisms", "message"),
    [
        ([], "this model has no mechanism"),
        ([{**MIXTURE, "decision": "topk"}], "decision 'topk' ranks the whole row"),
        ([{**MIXTURE, "decision": "predictor"}], "has mixture_of_depths, decision 'predictor', capacity 0.5"),
        ([{**MIXTURE, "decision": "random"}], "has mixture_of_depths, decision 'random'"),
        ([{**GATE, "execution": "soft"}], "has token_selective, execution 'soft'"),
        ([{"name": "gate_skip", "layers": "1:", "execution": "soft"}], "has gate_skip, execution 'soft'"),
    ],
)
def test_models_without_a_threshold_to_turn(mechanisms: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        calibrate(build(mechanisms), text(0, 2))
    assert "\n" not in str(caught.value)


def test_rows_that_are_none() -> None:
    model = build(MECHANISMS["gates"])
    with pytest.raises(ValueError, match="needs rows of text, got none"):
        calibrate(model, [])
    with pytest.raises(ValueError, match=r"token ids, int64 \[rows, tokens\], got torch.float32 \[2, 3\]"):
        calibrate(model, torch.zeros(2, 3))


def test_a_gate_that_tells_no_tokens_apart_has_gaps() -> None:
    model = build([{**GATE, "gate": "constant"}])
    budget_table = calibrate(model, text(0, 2))
    with pytest.raises(
        ValueError, match=r"cannot be met: the scores do not distinguish tokens between 0\.\d+ and 1\.\d+"
    ):
        budget_table.thresholds(0.7)


def test_one_budget_is_met_closely() -> None:
    model = build([{**MIXTURE, "capacity": 0.3}])
    rows = [{"input_ids": text(0)}]
    dense = model.eval().cost(tokens=TOKENS).dense.forward.total / TOKENS
    meet(model, find_handles(model), rows, 0.7 * dense)
    assert observe(model, rows).share == pytest.approx(0.7, rel=0.015)


def test_quantiles_by_hand() -> None:
    x = torch.tensor([3.0, 1.0, 2.0, 4.0])
    assert [quantile(x, share) for share in (0.0, 0.25, 0.5, 1.0)] == [-2.0, 1.5, 2.5, 7.0]


def test_the_shares_beside_a_gap_are_met_as_they_are_printed() -> None:
    points = [OperatingPoint(share=share, thresholds=(share,), kept=(1.0,)) for share in (0.69821, 0.77316, 0.9996)]
    table = BudgetTable(handles=("a",), points=tuple(points), trained=((0.0,),), rows=1, tokens=1, text="")
    for budget in (0.7, 0.76, 0.8, 0.99):
        with pytest.raises(ValueError, match="take one of these") as caught:
            table.thresholds(budget)
        for share in re.findall(r"between ([\d.]+) and ([\d.]+) of", str(caught.value))[0]:
            assert table.thresholds(float(share))[0] == pytest.approx(float(share), abs=1e-3)
    for end in table.range:
        assert table.thresholds(end)


def test_a_model_that_was_not_loaded_has_no_budgets_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build([{**MIXTURE, "decision": "threshold"}])
    calibrate(model, text(0, 2)).save(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="was not loaded from a folder that has one"):
        generate(model, text(0)[:1, :4], max_new_tokens=2, budget=0.9)
