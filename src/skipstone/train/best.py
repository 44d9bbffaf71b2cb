"""`KeepBest` keeps the model with the lowest validation loss so far beside the run's checkpoints."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from skipstone.core.atomic_write import write_json
from skipstone.core.sealed import sealed
from skipstone.core.strict import PlainMapping
from skipstone.runs import BEST, BEST_STEP, Run
from skipstone.train import folder as folders

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def validation_loss(line: PlainMapping) -> float:
    """Return the validation loss in nats by which models are compared.

    line: one validation entry with `oracle_loss` and `causal_loss`. The causal loss (routing decided without later
    tokens, as in generation) is returned unless it is None or absent; then the oracle loss (routing as in training) is.
    """
    causal = line.get("causal_loss")
    return float(line["oracle_loss"] if causal is None else causal)


class KeepBest(TrainerCallback):
    """A callback that saves the model to RUN/best after each validation whose loss is lower than all earlier ones.

    The loss is that of routing without access to later tokens, or, for models that cannot decide so, that of the
    routing of training. A resumed run repeats its steps exactly, so it finds the same best model again.

    folder: the run folder. tokenizer: the tokenizer saved with the model; None if there is none.
    """

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.folder, self.tokenizer = folder, tokenizer

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or metrics is None:
            return
        loss = validation_loss({name.removeprefix("eval_"): value for name, value in metrics.items()})
        best = Run(self.folder).best()
        if best is not None and best["loss"] <= loss:
            return
        model = kwargs["model"]
        told = {"losses": {f"validation, step {state.global_step}": loss}}
        cached, model.config.use_cache = model.config.use_cache, True  # Trainer has switched it off
        try:
            note = partial(write_json, value=sealed({"step": state.global_step, "loss": loss}))
            folders.save_model(self.folder, model, self.tokenizer, told, BEST, {BEST_STEP: note})
        finally:
            model.config.use_cache = cached
