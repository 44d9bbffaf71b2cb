"""Callbacks that watch a run: metrics.jsonl, the progress bar, stop signals."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from skipstone.core.atomic_write import naming
from skipstone.core.strict import PlainDict, PlainMapping

VALIDATION = "eval_"  # how Trainer and its integrations mark what validation measured
AGREE_EVERY = 10  # steps, on accelerators
SHOWN = {"loss": "loss", "eval_oracle_loss": "oracle", "eval_causal_loss": "causal", "tokens_per_second": "tokens/s"}


class MetricsFile(TrainerCallback):
    """One JSON object a line: step, split, then what was measured. `causal_loss` is null without a causal pass."""

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
                file.write(json.dumps(metrics_line(state.global_step, logs)) + "\n")


def metrics_line(step: int, logs: PlainMapping) -> PlainDict:
    """What a line of metrics.jsonl holds of Trainer's logs."""
    values = {name: value for name, value in logs.items() if name != "epoch"}
    if not any(name.startswith(VALIDATION) for name in values):
        return {"step": step, "split": "train", **values}
    values = {name.removeprefix(VALIDATION): value for name, value in values.items()}
    return {"step": step, "split": "validation", "oracle_loss": None, "causal_loss": None, **values}


class Progress(TrainerCallback):
    """A bar on stderr where that is a terminal; elsewhere a line at each validation."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)
        self.bar: Any = None
        self.shown: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.console.is_terminal and state.is_world_process_zero:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self.bar = Bar(*columns, console=self.console)
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

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
            self.bar.update(self.task, description=self.summary())
        elif state.is_world_process_zero and "eval_oracle_loss" in logs:
            self.console.print(f"step {state.global_step}/{state.max_steps}  {self.summary()}", highlight=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def summary(self) -> str:
        return "  ".join(f"{k} {v:,.0f}" if k == "tokens/s" else f"{k} {v:.4f}" for k, v in self.shown.items())


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own bars for every file that is written."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


class StopSignals(TrainerCallback):
    """The first SIGINT or SIGTERM lets the step end, saves a checkpoint and stops; a second one ends the process.

    save_minutes: a checkpoint is also saved whenever so many minutes have passed since the last one. Where several
    processes train, they agree on both at the end of each step, so that all of them save the same step.
    """

    HANDLED = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, save_minutes: float | None = None) -> None:
        self.received: int | None = None
        self.seconds = None if save_minutes is None else 60 * save_minutes
        self.saved = monotonic()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Signals can be handled in the main thread only; elsewhere this does nothing."""
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
            control.should_log = True  # Trainer logs at multiples of the interval only

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.saved = monotonic()

    on_save = on_train_begin


def _agreed(received: int | None, due: bool, device: torch.device, step: int) -> tuple[int | None, bool]:
    """What any of the processes has received, and whether a checkpoint is due on any of them.

    On an accelerator the host waits for the answer, so they ask each other at every tenth step only.
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
    """Training was stopped by a signal and can be resumed; leaves the process with 128 + the signal's number."""
