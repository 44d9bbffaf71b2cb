"""Law 1 for pretrained weights: at step 0, every mechanism and combination gives the source's logits and can learn."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapt.sources import VOCAB, mixture, source_model
from laws.builders import KINDS
from skipstone.adapt import stages
from skipstone.adapt.adapt_recipe import Lora, read_recipe
from skipstone.adapt.plan import prepare_plan
from skipstone.adapt.start import start_measured
from skipstone.adapt.student import NeutralStart, neutral_start, route, with_defaults
from skipstone.mechanisms import ACTIVATION, DEPTH
from skipstone.mechanisms.decisions import DECISIONS
from skipstone.model.config import SkipstoneConfig
from skipstone.train.callback import RoutingCallback
from skipstone.train.setup import plain

ROUNDING, GATES = 2e-6, 1e-3  # shares of the largest logit

ENTRIES: dict[str, dict[str, Any]] = {name: {"name": name, "layers": ":"} for name in DEPTH}
ENTRIES["mixture_of_depths"]["capacity"] = 0.25
PAIRS = [names for count in range(3) for names in itertools.permutations(DEPTH, count)]
COMBINATIONS = [
    *PAIRS,
    *(names for count in range(3, len(DEPTH) + 1) for names in itertools.combinations(DEPTH, count)),
]


def _quick(names: tuple[str, ...], activation: str) -> bool:
    """One mechanism, two of the three oldest, and all together; with another activation none and all, which meet it."""
    if activation != "silu":
        return len(names) in (0, len(DEPTH))
    return len(names) in (0, 1, len(DEPTH)) or (len(names) == 2 and {*names} < {*KINDS})


MARKED = [
    pytest.param(
        names,
        activation,
        id=f"{'+'.join(names)}-{activation}",
        marks=() if _quick(names, activation) else pytest.mark.slow,
    )
    for names in COMBINATIONS
    for activation in ("silu", *ACTIVATION)
]
SITES = [(name, site) for name in DEPTH for site in DEPTH[name].sites if site in ("attention", "mlp")]
RICH = [{"skip": "low_rank"}, {"kv": "full"}, {"router": "mlp"}, {"z_loss": 0.01}, {"router_norm": False}]


@cache
def dense() -> Any:
    return source_model().requires_grad_(False)


def rows() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, VOCAB, (2, 3, 20), generator=torch.Generator().manual_seed(1))
    padded = torch.ones(3, 20, dtype=torch.long)
    padded[1, 15:] = 0
    return [{"input_ids": ids[0]}, {"input_ids": ids[1], "attention_mask": padded}]


def student(mechanisms: list[dict[str, Any]], activation: Any = "silu") -> Any:
    values = {**plain(dense().config), "mechanisms": with_defaults(mechanisms), "activation": activation}
    return route(dense(), SkipstoneConfig.from_plain(values), seed=0)


def start(model: Any) -> NeutralStart:
    return neutral_start(model, dense(), rows())


def check(model: Any) -> None:
    """Neutral, and every mechanism has a gradient to leave with."""
    only_rounding = all(type(m).__name__ == "MixtureOfDepths" for m in model.routing_modules())
    found = start(model)
    assert found.largest > 1
    assert found.tokens == 2 * 3 * 20 - 5
    assert found.share <= (ROUNDING if only_rounding else GATES)
    found.require(1e-3)
    ids = rows()[0]["input_ids"]
    model.train()(ids, labels=ids, noise=False).loss.backward()
    for mechanism in model.routing_modules():
        norms = [p.grad.norm() for p in mechanism.parameters() if p.grad is not None]
        assert any(norm > 0 for norm in norms) or not list(mechanism.parameters())
        assert all(norm.isfinite() for norm in norms)


@pytest.mark.parametrize(("names", "activation"), MARKED)
def test_every_combination(names: tuple[str, ...], activation: str) -> None:
    check(student([ENTRIES[name] for name in names], activation if activation == "silu" else {"name": activation}))


@pytest.mark.parametrize(("name", "site"), SITES)
def test_every_site(name: str, site: str) -> None:
    check(student([{**ENTRIES[name], "on": site}]))


@pytest.mark.parametrize("decision", [name for name in DECISIONS if name != "forced"])
def test_every_decision(decision: str) -> None:
    check(student([mixture(capacity=0.25, decision=decision)]))


@pytest.mark.parametrize("options", RICH, ids=str)
def test_the_options_of_mixture_of_depths(options: dict[str, Any]) -> None:
    check(student([mixture(capacity=0.25, **options)]))


def test_weight_one_and_a_falling_capacity() -> None:
    model = student([mixture(capacity=0.25, weight="none", capacity_warmup=1.0)])
    assert start(model).share <= ROUNDING
    callback = RoutingCallback()
    for step in (1, 2):  # no longer neutral once the capacity has begun to fall
        callback._advance(model, type("State", (), {"global_step": step, "max_steps": 4})(), {})
        assert start(model).difference > 1e-3


def test_attention_and_mlp_alone_are_exact_to_the_last_bit() -> None:
    """There the residual stream is summed in the order of the source."""
    model = student([mixture(capacity=0.5, on="attention"), mixture(capacity=0.5, on="mlp")])
    assert start(model).difference == 0


def test_routers_and_skip_paths_that_start_as_guesses_change_nothing_yet() -> None:
    model = student([mixture(capacity=0.5, skip="low_rank")])
    before = model.model.layers[1].mechanisms["mixture_of_depths"].router.weight.clone()
    start_measured(model, dense(), rows())
    router = model.model.layers[1].mechanisms["mixture_of_depths"].router
    assert not torch.equal(before, router.weight)
    assert model.model.layers[1].mechanisms["mixture_of_depths"].skip.up_weight.abs().max() > 0
    assert start(model).share <= ROUNDING


def test_a_router_around_a_segment_starts_by_what_the_whole_segment_changes() -> None:
    model, source = student([{"name": "segment", "layers": ":", "capacity": 0.5, "skip": "low_rank"}]), dense()
    before = next(model.routing_modules()).router.weight.clone()
    start_measured(model, source, rows())
    assert not torch.equal(before, next(model.routing_modules()).router.weight)
    assert start(model).share <= ROUNDING


def test_adapters_change_nothing_yet() -> None:
    model = student([mixture(capacity=0.5)])
    stages.add_adapters(model, Lora())
    assert start(model).share <= ROUNDING


@pytest.mark.parametrize(
    ("options", "said"),
    [({"weight": "raw"}, "weight tanh or none"), ({"weight": "sigmoid"}, "not neutral"),
     ({"capacity_warmup": 0.0}, "capacity_warmup above 0")],
)  # fmt: skip
def test_what_is_not_neutral_is_refused(options: dict[str, Any], said: str) -> None:
    found = start(student([mixture(capacity=0.25, **options)]))
    with pytest.raises(ValueError, match=said):
        found.require(1e-3)


def test_damaged_weights_are_named() -> None:
    """The difference was 0.00: the larger one of 0 and NaN is 0 in Python."""
    source = copy.deepcopy(dense())
    source.decoder.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the source's logits are not finite"):
        neutral_start(dense(), source, rows())
    broken = student([mixture(capacity=0.5)])
    broken.decoder.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not neutral"):
        start(broken).require(1e-3)


FOLDER = Path(__file__).resolve().parents[2] / "recipes"
RECIPES = [path for path in sorted(FOLDER.glob("adapt-*.yaml")) if "smollm2" not in path.name]  # that one has 30 blocks
QUICK = ("adapt-mod", "adapt-polyglu", "adapt-neurons")  # gates and routers alone start neutral in the tests above


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow) for path in RECIPES]
)
def test_the_recipes_start_neutral_on_a_real_model(path: Path, data_dir: Path, tmp_path: Path) -> None:
    from skipstone_cli.overrides import load_recipe

    (tmp_path / "text.txt").write_text("Once upon a time, there was a little girl named Lily. " * 200)
    words = [f"data.corpus=text:{tmp_path}", "data.context=128", "adapt.calibration_rows=4"]
    plan = prepare_plan(str(data_dir / "stories260K"), read_recipe(load_recipe(path, words)))
    assert plan.record["neutral_start"]["difference"] <= 1e-3 * plan.record["neutral_start"]["largest"]
    theirs = AutoModelForCausalLM.from_pretrained(data_dir / "stories260K").eval()
    ids = plan.rows[0]["input_ids"]
    with torch.no_grad():
        expected, got = theirs(ids).logits, plan.model.eval()(ids).logits
    assert (got - expected).abs().max() <= 1e-3 * expected.abs().max()
