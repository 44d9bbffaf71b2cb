"""Callbacks of a training run: they write metrics.jsonl, show progress, and react to stop signals."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from types import FrameType

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from skipstone.core.atomic_write import naming
from skipstone.core.progress_bar import ProgressBar
from skipstone.core.sealed import sealed_line
from skipstone.core.strict import PlainDict, PlainMapping

VALIDATION = "eval_"  # prefix of validation metrics in Trainer and its integrations
AGREE_EVERY = 10  # steps between agreements of processes on accelerators
SECONDS = 60.0  # between two lines of progress without a validation
SHOWN = {"loss": "loss", "eval_oracle_loss": "oracle", "eval_causal_loss": "causal", "tokens_per_second": "tokens/s"}


class MetricsFile(TrainerCallback):
    """A callback that appends one JSON object per log line to metrics.jsonl, with step, split and the metrics by name.

    The split is "train" or "validation". path: path of metrics.jsonl. In validation lines, `causal_loss` is null for
    models that cannot decide without later tokens.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: PlainDict | None = None,
        **kwargs: object,
    ) -> None:
        if logs and state.is_world_process_zero:
            with naming(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(sealed_line(metrics_line(state.global_step, logs)) + "\n")


def metrics_line(step: int, logs: PlainMapping) -> PlainDict:
    """Return the entry of metrics.jsonl for one of Trainer's logs.

    step: the optimizer step. logs: figures by name. If a name starts with `eval_`, the entry is one of validation
    (`split` is "validation", the prefix is removed, and `oracle_loss` and `causal_loss` are None if they are missing);
    otherwise `split` is "train". `epoch` is left out.
    """
    values = {name: value for name, value in logs.items() if name != "epoch"}
    if not any(name.startswith(VALIDATION) for name in values):
        return {"step": step, "split": "train", **values}
    values = {name.removeprefix(VALIDATION): value for name, value in values.items()}
    return {"step": step, "split": "validation", "oracle_loss": None, "causal_loss": None, **values}


class ProgressReporter(TrainerCallback):
    """A callback that shows progress on stderr: a bar in a terminal; elsewhere lines of text.

    A line is printed at each validation, and after a minute without one. bar: the progress bar; None before training
    and in all processes but the first. shown: the latest figures by short name.
    """

    def __init__(self) -> None:
        self.bar: ProgressBar | None = None
        self.shown: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.is_world_process_zero:
            if state.global_step:
                print(resumption(state), file=sys.stderr)  # noqa: T201
            self.bar = ProgressBar(state.max_steps, "steps", done=state.global_step, seconds=SECONDS)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.bar is not None and (self.bar.console.is_terminal or state.global_step < state.max_steps):
            self.bar.update(state.global_step)  # the last line follows the last validation

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: PlainDict | None = None,
        **kwargs: object,
    ) -> None:
        logs = logs or {}
        self.shown |= {short: logs[name] for name, short in SHOWN.items() if name in logs}
        if self.bar is not None:
            self.bar.done, self.bar.note = state.global_step, self.summary()
            if "eval_oracle_loss" in logs:
                self.bar.line()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar from the terminal, also after an error."""
        if self.bar is not None:
            self.bar.close()

    def summary(self) -> str:
        """Return the latest figures as text, such as "loss 2.3010 tokens/s 4,800"."""
        return "  ".join(f"{k} {v:,.0f}" if k == "tokens/s" else f"{k} {v:.4f}" for k, v in self.shown.items())


def resumption(state: TrainerState) -> str:
    """Return a line of text for a resumed run: its step, what is restored, and the last validation loss.

    state: Trainer's, after the checkpoint was loaded.
    """
    losses = [entry["eval_oracle_loss"] for entry in state.log_history if "eval_oracle_loss" in entry]
    last = f"; the last validation: {losses[-1]:.4f}" if losses else ""
    return (
        f"resuming after step {state.global_step:,} of {state.max_steps:,}: weights, optimizer, schedules and the "
        f"order of the rows are kept{last}"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Disable the progress bars that transformers shows while it writes files, inside a `with` block."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


class StopSignals(TrainerCallback):
    """A callback that stops a training after SIGINT or SIGTERM: it finishes the step and saves a checkpoint.

    A second signal ends the process at once. Several processes agree on when to stop and save, so that all save the
    same step; on a GPU they do so only every tenth step. save_minutes: also save a checkpoint when this many minutes
    have passed since the last one; None means that no time limit applies. received: number of the signal that arrived;
    None if none has arrived.
    """

    HANDLED = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, save_minutes: float | None = None) -> None:
        self.received: int | None = None
        self.seconds = None if save_minutes is None else 60 * save_minutes
        self.saved = monotonic()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM during a `with` block: the first signal stops the training after its current step.

        A second signal ends the process at once. Does nothing outside of the main thread, where Python cannot handle
        signals.
        """
        try:
            before = {number: signal.signal(number, self._receive) for number in self.HANDLED}
        except ValueError:
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        print("stopping after this step ...", file=sys.stderr)  # noqa: T201
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        due = self.seconds is not None and monotonic() - self.saved >= self.seconds
        received, due = _agreed(self.received, due, args.device, state.global_step)
        if received is not None:
            self.received = received
            control.should_save = control.should_training_stop = True
        control.should_save = control.should_save or due
        if state.global_step >= state.max_steps:
            control.should_log = True  # Trainer only logs at multiples of the interval

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.saved = monotonic()

    on_save = on_train_begin


def _agreed(received: int | None, due: bool, device: torch.device, step: int) -> tuple[int | None, bool]:
    """Return the signal that any process has received, and whether a checkpoint is due on any of them.

    On an accelerator the host waits for the answer, so processes agree at every tenth step only. received: this
    process's signal, or None. due: whether a checkpoint is due here. device: where the processes exchange them. step:
    the optimizer step.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return received, due
    if device.type != "cpu" and step % AGREE_EVERY:
        return None, False
    both = torch.tensor([received or 0, int(due)], device=device)
    torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
    number, anywhere = both.tolist()
    return number or None, bool(anywhere)


class Interrupted(SystemExit):
    """Raised when a signal has stopped a training, which can be resumed.

    It is a SystemExit, whose exit status is 128 + the number of the signal.
    """
