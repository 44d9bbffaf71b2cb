"""Routers that are dead, saturated, or no better than chance are named once, and the watch changes no result."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.measure.router_health import RouterHealth
from skipstone.train import router_watch
from skipstone.train.router_watch import RouterWatch, shuffled
from skipstone.train.trainer import RunTrainer
from train.tool import DENSE, MODELS, equal, lines, mod, recipe, train, weights

MODEL = {**DENSE, "vocab_size": 11, "max_position_embeddings": 32}


def built(**model: Any) -> SkipstoneForCausalLM:
    torch.manual_seed(0)
    return SkipstoneForCausalLM(SkipstoneConfig.from_plain({**MODEL, **model})).train()


def same(value: Tensor) -> Tensor:
    return value


def told(model: SkipstoneForCausalLM, late: bool = True) -> dict[str, str]:
    health = RouterHealth()
    for seed in range(3):
        ids = torch.randint(0, 11, (2, 32), generator=torch.Generator().manual_seed(seed))
        health.add(model.routing_modules(), model(ids, output_records=True).records)
    return health.read(same, late)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_fresh_model_is_well(name: str) -> None:
    model = {key: value for key, value in MODELS[name].items() if "dropout" not in key}
    assert told(built(**model), late=False) == {}


def test_dead_saturated_and_idle_routers_are_told_apart() -> None:
    dead = told(built(mechanisms=[mod("topk", capacity=0.01)]))
    assert set(dead) == {"block 0 mixture_of_depths", "block 1 mixture_of_depths"}
    assert "keeps no token of 192" in dead["block 0 mixture_of_depths"]
    model = built(mechanisms=[mod("topk")])
    with torch.no_grad():
        model.decoder.layers[1].mechanisms["mixture_of_depths"].router.weight.mul_(1e4)  # type: ignore[union-attr, operator]
    assert "is saturated" in told(model)["block 1 mixture_of_depths"]
    model = built(mlp="experts", experts={"count": 3, "top_k": 1, "renormalise": False})
    with torch.no_grad():
        for block in model.decoder.layers:
            block.mlp.router.weight.zero_()  # type: ignore[union-attr, operator]
    assert "to expert 1, 2 of 3: dead" in "".join(told(model).values())
    assert told(built(mechanisms=[mod("random", weight="none", capacity=0.01)])) == {}, "a control is meant to be so"


def watch(model: SkipstoneForCausalLM, steps: int = 10_000) -> RouterWatch:
    def forward(**inputs: object) -> Any:
        return model(**inputs)

    return RouterWatch(model, forward, steps, same, same, says=True)


@pytest.mark.parametrize("useless", [True, False])
def test_a_choice_no_better_than_chance_is_named_once(useless: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that changes nothing gains nothing by choosing; one that alone tells the next token does."""
    model = built(mechanisms=[mod("topk", weight="none", layers=[1])], num_hidden_layers=2)
    seen = watch(model)
    if not useless:  # what the loss would be if the kept tokens mattered
        plain = seen._loss
        monkeypatch.setattr(seen, "_loss", lambda i, r: plain(i, r) + 0.1 * (r[1].flatten()[:8] != first[:8]).sum())
    else:
        with torch.no_grad():
            for parameter in model.decoder.layers[1].parameters():
                parameter.zero_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, 60):
            ids = torch.randint(0, 11, (8, 32), generator=torch.Generator().manual_seed(step))
            records = model(ids, labels=ids, output_records=True).records
            first = records[1]["mixture_of_depths"].kept_BT.flatten()
            seen.next_pair = min(seen.next_pair, step) if step >= 20 else seen.next_pair
            seen.see(step, {"input_ids": ids, "labels": ids}, records)
            seen.after_backward(step)
    found = [str(one.message) for one in caught if "no better than chance" in str(one.message)]
    assert len(found) == int(useless)
    assert not useless or "the router of block 1 chooses tokens no better than chance" in found[0]
    assert all(module.training for module in model.modules())


def test_masks_are_shuffled_among_real_tokens() -> None:
    kept = torch.zeros(2, 8, dtype=torch.bool)
    kept[:, :3] = True
    real = torch.ones(2, 8)
    real[1, 5:] = 0
    drawn = shuffled(kept, real, 3)
    assert drawn.sum(1).tolist() == [3, 3]
    assert not drawn[1, 5:].any()
    assert drawn.equal(shuffled(kept, real, 3))


def test_a_training_warns_once_of_each_router_and_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with comparisons in every step, which is far more often than they come."""
    model = {**DENSE, "mechanisms": [mod("topk", weight="tanh")], "residual_dropout": 0.1}
    config = recipe(tmp_path, model, steps=24, eval_every=0, eval_rows=2, save_every=0)
    monkeypatch.setattr(router_watch, "SHARE", 1e9)
    monkeypatch.setattr(router_watch, "FIRST_PAIR", 2)
    monkeypatch.setattr(router_watch, "PAIRS", 8)
    monkeypatch.setattr(router_watch, "MARGIN", 1e9)
    with pytest.warns(UserWarning, match="no better than chance") as caught:
        one = train(config, tmp_path / "one")
    said = [str(each.message) for each in caught if "the router of" in str(each.message)]
    assert sorted(line.split(" chooses")[0] for line in said) == ["the router of block 0", "the router of block 1"]
    monkeypatch.setattr(RunTrainer, "_router_watch", lambda self: None)
    other = train(config, tmp_path / "other")
    assert equal(weights(one), weights(other))
    assert lines(one) == lines(other)
