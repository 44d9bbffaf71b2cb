"""A mixin that lets any Trainer train routers: it observes their decisions and adds their auxiliary losses.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from skipstone.core.records import auxiliary_loss
from skipstone.core.routing_module import RoutingModule
from skipstone.core.strict import PlainDict
from skipstone.model.causal_lm import SkipstoneForCausalLM, shifted
from skipstone.ops.head_loss import IGNORED
from skipstone.train.benefit import measured_benefit
from skipstone.train.callback import RoutingCallback
from skipstone.train.seen import SeenPass, inner, seen_passes


class RoutingMixin:
    """A mixin that lets any Trainer train routers and thresholds: `class MyTrainer(RoutingMixin, SFTTrainer)`.

    By hooks on the decoder, it observes the forward passes that the trainer makes anyway. It passes their records (what
    each mechanism decided) to a `RoutingCallback`, which moves thresholds and schedules, and adds the routers'
    auxiliary losses if the trainer computes its loss outside of the model. Its constructor passes all arguments to the
    trainer. routing: the trainer's `RoutingCallback`; one is added if there is none.
    """

    routing: RoutingCallback
    _has_looked = False  # whether all that learns by a loss of its own gets one

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        handler = self.callback_handler  # type: ignore[attr-defined]
        present = [callback for callback in handler.callbacks if isinstance(callback, RoutingCallback)]
        self.routing = present[0] if present else RoutingCallback()
        if not present:
            self.add_callback(self.routing)  # type: ignore[attr-defined]

    def compute_loss(self, model: nn.Module, inputs: PlainDict, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Return the trainer's loss of a micro-batch, plus the routers' auxiliary losses if the trainer omits them.

        The result is a scalar tensor, or (loss, outputs of the model) if `return_outputs` is True. The records of the
        pass (what mechanisms decided) are passed to the routing callback, which moves thresholds. model: the model,
        wrapped or not. inputs: the micro-batch, by name. kwargs: further arguments of `Trainer.compute_loss`, such as
        `num_items_in_batch`.
        """
        target_BT, base = _targets(inputs), inner(model)
        learns = model.training and isinstance(base, SkipstoneForCausalLM)
        step = self.state.global_step  # type: ignore[attr-defined]
        benefit = measured_benefit(base, inputs, step) if learns else nullcontext()
        with benefit, seen_passes(model) as passes:
            result = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        if model.training:
            for seen in passes:
                self.routing.observe(model, seen.records)
            self._warn_of_losses_that_rest(model, passes)
        added = self._losses_left_out(model, passes, target_BT, kwargs.get("num_items_in_batch"))
        if added is None:
            return result
        return (result[0] + added, *result[1:]) if return_outputs else result + added

    def _losses_left_out(
        self, model: nn.Module, passes: list[SeenPass], target_BT: Tensor | None, items: Tensor | int | None
    ) -> Tensor | None:
        """Return the mean auxiliary loss of passes that do not add it to their loss themselves; None if there is none.

        Passes add it if the model computes their loss. passes: the micro-batch's passes. target_BT: int64, the label of
        each position's next token, or None. items: number of labels in the whole optimizer step, or None. The result is
        scaled as Trainer scales the loss.
        """
        outside = self.label_smoother is not None or self.compute_loss_func is not None  # type: ignore[attr-defined]
        records = [seen.records for seen in passes if outside or not seen.in_forward]
        over = getattr(inner(model).config, "auxiliary_loss_over", "all")
        labelled_BT = None if target_BT is None else target_BT != IGNORED
        sums = [x for r in records if (x := auxiliary_loss(r, labelled_BT, items, over)) is not None]
        if not sums:
            return None
        added: Tensor = sum(sums) / len(sums)  # type: ignore[assignment]
        if labelled_BT is None or items is None:
            return added / self._micro_batches(items)
        args, accelerator = self.args, self.accelerator  # type: ignore[attr-defined]
        return added * accelerator.num_processes if args.average_tokens_across_devices else added

    def _micro_batches(self, items: Tensor | int | None) -> int:
        """Return the number of micro-batches by which a mean loss has to be divided; 1 if Trainer divides it by itself.

        items: number of labels in the whole optimizer step; None if Trainer does not know it.
        """
        scaled = self.loss_is_scaled_for_ga  # type: ignore[attr-defined]
        if scaled is None:
            accepts = self.model_accepts_loss_kwargs and items is not None  # type: ignore[attr-defined]
            scaled = accepts or self.compute_loss_func is not None  # type: ignore[attr-defined]
        steps: int | None = getattr(self, "current_gradient_accumulation_steps", None)  # known while it trains
        return steps if scaled and steps else 1

    def _warn_of_losses_that_rest(self, model: nn.Module, passes: list[SeenPass]) -> None:
        """Warn once if a mechanism that learns by its auxiliary loss got none, because the passes decide causally.

        passes: the passes of a micro-batch.
        """
        if self._has_looked or not passes:
            return
        self._has_looked = True
        resting = [
            f"block {m.placement.layer} {m.placement.name}"
            for m in inner(model).routing_modules()
            if m.has_auxiliary_loss and _rests(m, passes)
        ]
        if resting:
            shown = resting[0] + (f" and {len(resting) - 1} more" if len(resting) > 1 else "")
            warnings.warn(
                f"training passes decide causally and give no auxiliary losses to {shown}: what learns by these alone "
                "stays as it is (routers with weight 'none', predictors); thresholds follow the scores",
                stacklevel=2,
            )


def _rests(mechanism: RoutingModule, passes: list[SeenPass]) -> bool:
    place = mechanism.placement
    found = [seen.records[place.layer].get(place.name) for seen in passes]
    return all(record is None or record.loss_BT is None for record in found)


def _targets(inputs: PlainDict) -> Tensor | None:
    """Return the label of each position's next token, int64 [B, T]; None if the inputs have no labels of this shape.

    inputs: the micro-batch, by name.
    """
    if inputs.get("shift_labels") is not None:
        return inputs["shift_labels"]  # type: ignore[no-any-return]
    labels = inputs.get("labels")
    return shifted(labels) if isinstance(labels, Tensor) and labels.dim() == 2 else None


class RoutingTrainer(RoutingMixin, Trainer):
    """A `transformers.Trainer` that also advances routing thresholds and schedules once per optimizer step.

    Its constructor takes the arguments of `Trainer`.
    """

    def compute_loss(self, model: nn.Module, inputs: PlainDict, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Return the loss of a micro-batch, a scalar tensor, and pass mechanisms' decisions to the routing callback.

        With `return_outputs`, the result is (loss, outputs of the model), and the outputs have `records`. model: the
        model, wrapped or not. inputs: the micro-batch, by name. kwargs: further arguments of `Trainer.compute_loss`.
        """
        return super().compute_loss(model, {**inputs, "output_records": True}, return_outputs, **kwargs)
