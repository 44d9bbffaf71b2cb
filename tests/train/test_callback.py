"""`RoutingCallback` in any Trainer: schedules, thresholds, once an optimizer step."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.train import RoutingCallback, RoutingMixin, RoutingTrainer
from skipstone.train.callback import NOTHING_SEEN
from train.tool import DENSE, MODELS, POLYGLU, mod, quick

ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(12 * 16).view(12, 16) ** 2 % 31]
STEPS = 6


def build(model: dict[str, Any]) -> SkipstoneForCausalLM:
    return SkipstoneForCausalLM(SkipstoneConfig.from_plain({"vocab_size": 31, **model}))


def fit(
    kind: type[Trainer],
    model: SkipstoneForCausalLM,
    folder: Path,
    callback: RoutingCallback | None = None,
    **options: Any,
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False, **options,
    )  # fmt: skip
    callback = RoutingCallback() if callback is None and kind is Trainer else callback
    callbacks = None if callback is None else [callback]
    trainer = kind(model=model, args=arguments, train_dataset=ROWS, callbacks=callbacks)
    trainer.train()
    return trainer


def thresholds(model: SkipstoneForCausalLM) -> list[float]:
    return [mechanism.decision.threshold.item() for mechanism in model.routing_modules()]


@pytest.mark.parametrize("kind", [Trainer, RoutingTrainer])
def test_schedules_move_in_any_trainer(kind: type[Trainer], tmp_path: Path) -> None:
    model = build({**DENSE, "activation": {**POLYGLU, "tau_end": 0.4}})
    fit(kind, model, tmp_path)
    assert [mechanism.tau.item() for mechanism in model.routing_modules()] == pytest.approx([0.4, 0.4])


@pytest.mark.parametrize(
    ("schedules", "expected"), [pytest.param(True, (1.0, 1.0), marks=pytest.mark.slow), (False, (0.5, 0.4))]
)
def test_a_trained_model_is_tuned_further(schedules: bool, expected: tuple[float, float], tmp_path: Path) -> None:
    """Without schedules, capacity and tau stay where training ended, and thresholds go on."""
    warming = {**mod("ema_threshold", capacity_warmup=0.5), "capacity": 0.5}
    model = build({**DENSE, "mechanisms": [warming], "activation": {**POLYGLU, "tau_end": 0.4}})
    trainer = fit(RoutingTrainer, model, tmp_path)
    routed, mixed = ([m for m in model.routing_modules() if hasattr(m, name)] for name in ("decision", "tau"))
    callback, before = RoutingCallback(schedules=schedules), [m.decision.threshold.item() for m in routed]
    trainer.state.global_step = 0
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)
    assert {m.decision.capacity.now for m in routed} == {expected[0]}
    assert [m.tau.item() for m in mixed] == pytest.approx([expected[1]] * 2)
    fit(RoutingTrainer, model, tmp_path, callback)
    assert [m.decision.threshold.item() for m in routed] != before


def test_a_stock_trainer_leaves_thresholds_and_says_so_once(tmp_path: Path) -> None:
    model = build(MODELS["ema_threshold"])
    with pytest.warns(UserWarning, match="RoutingCallback was shown no records") as caught:
        fit(Trainer, model, tmp_path)
    assert sum(str(warning.message) == NOTHING_SEEN for warning in caught) == 1
    assert thresholds(model) == [0, 0]


@pytest.mark.parametrize("name", quick(["dense", "topk", "predictor", "token_selective", "polyglu"], "predictor"))
def test_nothing_is_said_where_there_is_no_threshold(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(Trainer, build(MODELS[name]), tmp_path)


def test_another_model_is_left_alone(tmp_path: Path) -> None:
    callback, arguments = RoutingCallback(), TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = Trainer(model=torch.nn.Linear(1, 1), args=arguments)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    callback.observe(trainer.model, None)
    callback.on_train_begin(arguments, trainer.state, trainer.control, model=trainer.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback.on_step_end(arguments, trainer.state, trainer.control, model=trainer.model)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_thresholds_follow_the_mean_of_the_micro_batches(parts: int, tmp_path: Path) -> None:
    model = build({**DENSE, "mechanisms": [mod("ema_threshold")]})
    seen: list[list[float]] = []

    class Watching(RoutingCallback):
        def observe(self, model: Any, records: Any) -> None:
            seen.append(
                [m.statistics(records[m.placement.layer][m.placement.name]).item() for m in model.routing_modules()]
            )
            super().observe(model, records)

    class Mine(RoutingMixin, Trainer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**{**kwargs, "callbacks": [Watching()]})

    trainer = fit(Mine, model, tmp_path, gradient_accumulation_steps=parts)
    assert sum(isinstance(callback, RoutingCallback) for callback in trainer.callback_handler.callbacks) == 1
    assert len(seen) == STEPS * parts
    expected = torch.zeros(2)
    for step in range(STEPS):
        mean = torch.tensor(seen[step * parts : (step + 1) * parts]).mean(0)
        expected = torch.lerp(expected, mean, 1 - min(step / (step + 1), 0.95))
    assert thresholds(model) == pytest.approx(expected.tolist(), rel=1e-5)
    assert [mechanism.decision.steps.item() for mechanism in model.routing_modules()] == [STEPS, STEPS]
    assert [mechanism.not_ready_reason() for mechanism in model.routing_modules()] == [None, None]


def test_validation_is_not_observed(tmp_path: Path) -> None:
    model = build(MODELS["ema_threshold"])
    trainer = fit(RoutingTrainer, model, tmp_path)
    before = thresholds(model)
    trainer.evaluate(ROWS)
    assert not trainer.routing._sums
    assert thresholds(model) == before


def test_statistics_of_nothing_are_left_out(tmp_path: Path) -> None:
    model = build(MODELS["ema_threshold"])
    found = iter([[float("nan"), 1.0], [3.0, float("nan")], [float("nan"), float("nan")]])
    mechanisms = list(model.routing_modules())
    callback = RoutingCallback()
    for values in found:
        for mechanism, value in zip(mechanisms, values, strict=True):
            mechanism.statistics = lambda record, value=value: torch.tensor([value])
        callback.observe(model, tuple({"mixture_of_depths": object()} for _ in mechanisms))  # type: ignore[misc]
    advanced: list[Tensor | None] = []
    for mechanism in mechanisms:
        mechanism.advance = lambda progress, statistics: advanced.append(statistics)
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = Trainer(model=model, args=arguments)
    callback.on_step_end(arguments, trainer.state, trainer.control, model=model)
    assert advanced == [torch.tensor([3.0]), torch.tensor([1.0])]
    with pytest.warns(UserWarning, match="was shown no records"):
        callback.on_step_end(arguments, trainer.state, trainer.control, model=model)
    assert advanced[2:] == [None, None]


def test_the_mixin_hands_out_what_it_was_asked_for(tmp_path: Path) -> None:
    trainer = fit(RoutingTrainer, build(MODELS["topk"]), tmp_path)
    batch = {name: torch.stack([row[name] for row in ROWS[:2]]) for name in ("input_ids", "labels")}
    loss = trainer.compute_loss(trainer.model, batch)
    same, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert loss.shape == ()
    assert torch.equal(loss, same)
    assert outputs.records is not None


@pytest.mark.parametrize("trainer", [Trainer, RoutingTrainer], ids=["Trainer", "RoutingTrainer"])
def test_label_smoothing_shifts_labels_and_keeps_auxiliary_losses(trainer: type[Trainer], tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    mechanisms = [{"name": "mixture_of_depths", "capacity": 0.5}]  # guided: its router learns from its own loss alone
    model = SkipstoneForCausalLM(SkipstoneConfig(**sizes, mechanisms=mechanisms, initializer_range=0.2)).train()
    ids = torch.randint(0, 40, (3, 9))
    settings = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    smoothed = trainer(model=model, args=TrainingArguments(str(tmp_path), label_smoothing_factor=1e-9, **settings))
    loss = smoothed.compute_loss(model, {"input_ids": ids, "labels": ids})
    right = model(ids, labels=ids)
    # transformers' own Trainer takes the labels away before the model is called, and knows of no other loss.
    expected = right.loss if trainer is RoutingTrainer else right.token_loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    moved = [p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters() if "router" in n]
    assert any(moved) == (trainer is RoutingTrainer)
