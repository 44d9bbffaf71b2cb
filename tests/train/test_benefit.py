"""Routers that learn the measured benefit of their blocks, and the routers' own learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

from models import tiny_model
from skipstone import SkipstoneForCausalLM
from skipstone.measure.losses import token_nats
from skipstone.model.causal_lm import shifted
from skipstone.train import RoutingTrainer
from skipstone.train.benefit import measure_benefit, measured_benefit
from skipstone.train.decay import with_router_rate
from skipstone.train.recipe import TrainConfig

ROWS, LENGTH = 32, 12
IDS = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) ** 2 % 31
BATCH = {"input_ids": IDS, "labels": IDS}


def model(name: str = "segment", **options: Any) -> SkipstoneForCausalLM:
    layers = "1:3" if name == "segment" else [1, 2]
    entry = {"name": name, "layers": layers, "benefit": True, "capacity": 0.5, **options}
    return tiny_model(mechanisms=[entry], vocab_size=31, num_hidden_layers=4, intermediate_size=48).train()


def test_it_is_the_difference_of_two_passes() -> None:
    chosen = model()
    found = measure_benefit(chosen, BATCH, 5)
    assert list(found) == [1]
    known = found[1].isfinite()
    assert known[:2, :-1].all()
    assert known.sum() == 2 * (LENGTH - 1)
    assert chosen.training
    kept = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(5)) < 0.5

    def nats(mask: Tensor) -> Tensor:
        with torch.no_grad():
            return token_nats(chosen.eval()(IDS[:2], routing={1: mask}).logits, shifted(IDS[:2]))

    gap = nats(~kept) - nats(kept)
    expected = torch.where(kept, gap, -gap)[:, :-1]
    torch.testing.assert_close(found[1][:2, :-1], expected)


def test_blocks_take_turns_and_small_batches_wait() -> None:
    chosen = model("mixture_of_depths")
    assert [next(iter(measure_benefit(chosen, BATCH, step))) for step in range(4)] == [1, 2, 1, 2]
    small = {name: value[:4] for name, value in BATCH.items()}
    assert [sorted(measure_benefit(chosen, small, step)) for step in range(9)] == [
        [1],
        [],
        [],
        [],
        [2],
        [],
        [],
        [],
        [1],
    ]
    assert measure_benefit(model(benefit=False), BATCH, 0) == {}
    assert measure_benefit(chosen, {"input_ids": IDS}, 0) == {}


@pytest.mark.parametrize("executor", ["gathered", "masked"])
def test_the_router_alone_learns_from_it(executor: Any) -> None:
    chosen = model(decision="ema_threshold")
    with measured_benefit(chosen, BATCH, 0):
        out = chosen(**BATCH, executor=executor, output_records=True)
    assert chosen.model.benefits == {}
    assert out.auxiliary_loss > 0
    out.auxiliary_loss.backward()
    learned = {name for name, p in chosen.named_parameters() if p.grad is not None and p.grad.any()}
    assert learned == {"model.layers.1.mechanisms.segment.router.weight"}
    record, benefit = out.records[1]["segment"], measure_benefit(chosen, BATCH, 0)[1]
    known = benefit.isfinite()
    huber = torch.nn.functional.huber_loss(record.score_BT[known], benefit[known])
    torch.testing.assert_close(record.loss_BT.mean(), 0.01 * huber)


def test_scores_come_to_predict_the_benefit(tmp_path: Path) -> None:
    """The first half of the rows' tokens gain from the segment by construction, and the others lose."""
    chosen, good = model(auxiliary_weight=1.0), IDS < 15

    def made(model: Any, batch: Any, step: int) -> dict[int, Tensor]:
        return {1: torch.where(good, 1.0, -1.0)}

    router = next(chosen.routing_modules()).router  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for step in range(40):
        chosen.model.benefits = made(chosen, BATCH, step)
        optimizer.zero_grad()
        chosen(**BATCH, output_records=True).auxiliary_loss.backward()
        optimizer.step()
    chosen.model.benefits = {}
    score = chosen(IDS, output_records=True).records[1]["segment"].score_BT
    assert score[good].mean() > score[~good].mean() + 1


def test_a_trainer_measures_it(tmp_path: Path) -> None:
    chosen = model(decision="ema_threshold", auxiliary_weight=1.0)
    before = next(chosen.routing_modules()).router.weight.clone()  # type: ignore[call-overload]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=16, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False, learning_rate=0.01,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    RoutingTrainer(model=chosen, args=arguments, train_dataset=rows).train()
    assert not torch.equal(next(chosen.routing_modules()).router.weight, before)  # type: ignore[call-overload]


def test_routers_have_a_rate_of_their_own() -> None:
    chosen = model()
    named = dict(chosen.named_parameters())
    groups = [{"params": list(named.values()), "lr": 0.1, "weight_decay": 0.5}]
    plain, routers = with_router_rate(groups, chosen, 0.01)
    assert (plain["lr"], routers["lr"]) == (0.1, 0.01)
    assert routers["weight_decay"] == 0.5
    assert [id(p) for p in routers["params"]] == [id(p) for n, p in named.items() if ".mechanisms." in n]
    assert len(plain["params"]) + len(routers["params"]) == len(named)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance": True}, "benefit trains scores and cannot be combined with guidance"),
        ({"decision": "random"}, "benefit trains scores and cannot be combined with decision 'random'"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model(**options)
    with pytest.raises(ValueError, match=r"router_learning_rate must be above 0, got -1\.0"):
        TrainConfig(router_learning_rate=-1.0)
