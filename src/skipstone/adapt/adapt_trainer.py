"""The trainer of `skipstone adapt`: that of `skipstone train` with stages, a teacher, and a FLOP budget for gates.

Stages follow each other in a training, each with its own trained parameters and learning rates.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from skipstone.adapt import stages as staging
from skipstone.adapt.adapt_recipe import AdaptConfig, Stage
from skipstone.adapt.distillation import logit_divergence, stream_error
from skipstone.adapt.flop_budget import soft_gates
from skipstone.core.records import DepthRecord, Records, expect
from skipstone.core.strict import PlainDict
from skipstone.data.rows import Row
from skipstone.measure.passes import inputs_of, targets
from skipstone.model.causal_lm import IGNORED, CausalLMOutput, SkipstoneForCausalLM
from skipstone.ops.head_loss import Distillation
from skipstone.train.parallel import by_layout
from skipstone.train.trainer import RunTrainer


class Unfreeze(TrainerCallback):
    """A callback that enables gradients only for the parameters that the current stage trains.

    It acts at the first step of each stage, a part of the training with its own trained parameters. stages: all of
    them in order, without fields that are None (`read_recipe` replaces these). now: the current stage; None before the
    first step.
    """

    def __init__(self, stages: list[Stage]) -> None:
        self.stages = stages
        self.now: Stage | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        stage, _ = staging.stage_at(self.stages, state.global_step)
        if stage is not self.now:
            staging.unfreeze(kwargs["model"], stage)
            self.now = stage


class AdaptTrainer(RunTrainer):
    """The trainer of `skipstone train`, extended by stages, a teacher and a budget for soft gates.

    adapt: the options of the adaptation. teacher: a frozen dense model on the student's device; None means no
    distillation. passing: the share of tokens that gates should let pass to meet the budget; None if no gate has a
    budget to meet. parts: for the next log line, sums of the loss terms by name ("distillation_loss", "hidden_loss",
    "budget_loss"). kwargs: further arguments of `RunTrainer`, such as `recipe`, `data` and those of transformers'
    Trainer.
    """

    def __init__(
        self, *, adapt: AdaptConfig, teacher: SkipstoneForCausalLM | None, passing: float | None, **kwargs: Any
    ) -> None:
        staging.unfreeze(kwargs["model"], adapt.stages[0])
        super().__init__(**kwargs)
        self.adapt, self.teacher, self.passing = adapt, teacher, passing
        self.parts: Counter[str] = Counter()
        self.theirs: Any = None  # the teacher's output for the current micro-batch
        self.add_callback(Unfreeze(adapt.stages))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if getattr(self, "optimizer", None) is None:
            groups = staging.groups(self._plain, self.adapt.stages, self.args.weight_decay)
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer: Any = torch.optim.AdamW(by_layout(groups), betas=betas, eps=self.args.adam_epsilon)
        return self.optimizer  # type: ignore[no-any-return]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if getattr(self, "lr_scheduler", None) is None:
            self.lr_scheduler: Any = staging.schedule(
                optimizer or self.optimizer, self.adapt.stages, self.recipe.min_lr_ratio
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model: nn.Module, inputs: PlainDict, return_outputs: bool = False, **kwargs: Any) -> Any:
        more: PlainDict = {"output_hidden_states": True} if self.adapt.loss.hidden_states else {}
        if staging.stage_at(self.adapt.stages, self.state.global_step)[0].routing == "causal":
            more |= {"routing": "causal", "noise": False, "use_cache": False}
        if self.teacher is not None:
            more |= self._ask(self.teacher, inputs)
        return super().compute_loss(model, {**inputs, **more}, return_outputs, **kwargs)

    def objective(self, loss: Tensor, outputs: CausalLMOutput, inputs: PlainDict, items: Tensor | int | None) -> Tensor:
        """Return the weighted sum of the loss terms, a scalar tensor.

        loss: the model's own loss as Trainer scaled it; the sum is scaled by the same factor. outputs: the model's
        output, with logits, losses and records (decisions of mechanisms); its `auxiliary_loss`, which is logged, is
        replaced by the sum minus the unweighted cross-entropy. inputs: the micro-batch, by name. items: number of
        predicted tokens in the whole optimizer step, by which sums are divided; None means the number in this
        micro-batch.
        """
        wanted, token_loss = self.adapt.loss, outputs["token_loss"]
        theirs, self.theirs = self.theirs, None  # logits of a whole micro-batch must not outlive it
        asked_BT = targets(inputs) != IGNORED
        items = asked_BT.sum().clamp(min=1) if items is None else items
        own: dict[str, Tensor] = {}
        if outputs.get("distillation_loss") is not None:  # the model has put the three together already
            total = outputs["loss"]
            own["distillation_loss"] = wanted.distillation * outputs["distillation_loss"]
        else:
            total = wanted.language_modelling * token_loss + outputs["auxiliary_loss"]
            if wanted.distillation:
                divergence = logit_divergence(outputs["logits"], theirs.logits, asked_BT, wanted.temperature)
                total = total + own.setdefault("distillation_loss", wanted.distillation * divergence / items)
        if wanted.hidden_states:
            error = stream_error(outputs["hidden_states"][1:], theirs.hidden_states[1:], asked_BT)
            total = total + own.setdefault("hidden_loss", wanted.hidden_states * error / items)
        if self.passing is not None:
            share = asked_BT.sum() / items  # of a micro-batch in its optimizer step
            total = total + own.setdefault("budget_loss", wanted.budget * share * self._excess(outputs["records"]))
        scale = loss.detach() / outputs["loss"].detach()  # what Trainer makes up for the mean over processes
        outputs["auxiliary_loss"] = total - token_loss
        if self._logs_this_step():
            self.parts.update({name: term.item() for name, term in own.items()})
        return total * torch.nan_to_num(scale, nan=1.0)

    def _ask(self, teacher: SkipstoneForCausalLM, inputs: PlainDict) -> PlainDict:
        """Run the teacher on a micro-batch, keep its output for `objective`, and return arguments for the student.

        inputs: the micro-batch. The student's forward gets these arguments: none, `loss_chunk`, or `distillation`.
        """
        wanted = self.adapt.loss
        given: PlainDict = inputs_of(inputs)
        given |= {"use_cache": False, "output_hidden_states": wanted.hidden_states > 0}
        chunked = bool(self.loss_chunk and wanted.distillation)
        with torch.no_grad():
            self.theirs = (teacher.model if chunked or not wanted.distillation else teacher)(**given)
        if not chunked:
            return {"loss_chunk": 0} if wanted.distillation else {}
        distillation = Distillation(
            hidden_BTE=teacher.to_head(self.theirs.last_hidden_state),
            head_VE=teacher.lm_head.weight,
            soft_cap=teacher.config.logit_soft_cap,
            language_modelling=wanted.language_modelling,
            distillation=wanted.distillation,
            temperature=wanted.temperature,
        )
        return {"distillation": distillation}

    def _excess(self, records: tuple[Records, ...]) -> Tensor:
        """Return (share of tokens with a gain above the threshold - allowed share)^2, with the mean gain's gradient.

        The result is a scalar tensor. records: what each mechanism decided, one dict for each block.
        """
        passed, means = [], []
        for mechanism in soft_gates(self._plain):
            record = expect(records[mechanism.placement.layer][mechanism.placement.name], DepthRecord)
            threshold = mechanism.score_threshold()
            assert threshold is not None
            count = record.reached_BT.sum().clamp(min=1)
            passed.append(((threshold.scores(record) > threshold.get()) & record.reached_BT).sum() / count)
            means.append(torch.where(record.reached_BT, record.weight_BT, 0.0).sum() / count)
        mean = torch.stack(means).mean()
        assert self.passing is not None
        return (torch.stack(passed).mean() + mean - mean.detach() - self.passing).square()

    def _forget_step(self, model: nn.Module) -> None:
        self.parts = Counter()  # terms are added up in steps that are logged, of which this is one or is not
        super()._forget_step(model)

    def _window_logs(self) -> dict[str, float]:
        names, values = sorted(self.parts), [self.parts[name] for name in sorted(self.parts)]
        summed = self._summed(torch.tensor(values, device=self.args.device)).tolist() if names else []
        self.parts = Counter()
        return super()._window_logs() | dict(zip(names, summed, strict=True))


def on_device(row: Row, device: torch.device) -> Row:
    """Return a copy of the batch `row` (tensors by name) with all its tensors on `device`."""
    return {name: value.to(device) for name, value in row.items()}
