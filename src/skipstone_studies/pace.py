"""Messages with the remaining time of a study, estimated from the measured time of a training step."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from skipstone.core.strict import PlainMapping
from skipstone_studies.study import RecipeDict

FIRST_STEPS = 20  # steps before the first message; others follow each checkpoint
DEFAULTS = {"steps": 1000, "batch_size": 16, "context": 256, "num_hidden_layers": 1}


def work(recipe: RecipeDict) -> float:
    """Return the work of a recipe's training, to which training times are roughly proportional.

    It is the number of tokens times the number of blocks. recipe: the sections model, data and train; defaults are
    assumed for what they leave out.
    """
    values: PlainMapping = {
        **DEFAULTS,
        **recipe.get("model", {}),
        **recipe.get("data", {}),
        **recipe.get("train", {}),
    }
    return float(values["steps"] * values["batch_size"] * values["context"] * values["num_hidden_layers"])


class TimeLeft(TrainerCallback):
    """A trainer callback that measures training steps, saving and evaluation included, and reports the time left.

    The first step is not measured: text is encoded and code compiled in it.

    following: the work (tokens times blocks) of the trainings that follow, divided by the work of this training. say:
    called with each message, after 20 steps and then after every checkpoint.
    """

    def __init__(self, following: float, say: Callable[[str], None]) -> None:
        self.following, self.say = following, say
        self.since = 0.0
        self.first = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.since, self.first = monotonic(), state.global_step  # begins anew after the first step, which prepares data

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step - self.first == 1:
            self.since = monotonic()
        if state.global_step - self.first == FIRST_STEPS and state.max_steps - state.global_step >= FIRST_STEPS:
            self.tell(state.global_step, state.max_steps)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if state.global_step < state.max_steps and state.global_step - self.first > FIRST_STEPS:
            self.tell(state.global_step, state.max_steps)

    def tell(self, step: int, steps: int) -> None:
        """Report the time left after `step` of `steps` training steps."""
        seconds = (monotonic() - self.since) / (step - self.first - 1)
        here, all_of_it = seconds * (steps - step), seconds * (steps - step + self.following * steps)
        whole = f", about {duration(all_of_it)} of all" if self.following else ""
        self.say(f"step {step:,} of {steps:,}, {seconds:.3g} s each: {duration(here)} left of this arm{whole}")


def duration(seconds: float) -> str:
    """Return a duration as text: seconds up to two minutes, minutes up to two hours, then hours, days, years."""
    for unit, name, limit in ((1, "s", 120), (60, "min", 7200), (3600, "h", 172_800), (86_400, "d", 8.64e7)):
        if seconds < limit:
            return f"{seconds / unit:,.0f} {name}" if unit == 1 else f"{seconds / unit:,.1f} {name}"
    return f"{seconds / 31_557_600:,.1f} y"
