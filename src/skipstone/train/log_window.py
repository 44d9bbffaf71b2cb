"""`LogWindow`: sums of losses and time since the last log line. A checkpoint restores them exactly."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from skipstone.core.plain_text import read_object

FILE = "window.json"
STATE: dict[str, type] = {"began": int, "tokens": int, "total_tokens": int, "seconds": float, "total_seconds": float}
SKIPPED = ("skipped", "total_skipped")  # absent in checkpoints of earlier releases


class LogWindow:
    """Sums of losses, tokens and seconds for the next log line; the CPU never waits for the device to add to them.

    The steps since the last log line are called the window. device: where the losses are summed. sums: fp32 [2], the
    sums over the window's steps of this process's part of the token loss and of the auxiliary loss. began: the step
    after which the window began. tokens: tokens of the window over all processes. skipped: steps of the window that
    were skipped because their numbers were not finite. seconds: time of the window without evaluation and saving.
    total_tokens, total_skipped, total_seconds: these three over the whole training.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, device=device)  # token loss, auxiliary loss
        self.began = self.tokens = self.total_tokens = 0
        self.skipped = self.total_skipped = 0
        self.seconds = self.total_seconds = 0.0
        self._before = (self.sums.clone(), 0, 0)
        self._since: float | None = None

    def add(self, token_loss: Tensor, auxiliary_loss: Tensor, tokens: int) -> None:
        """Add the losses and tokens of one micro-batch.

        token_loss, auxiliary_loss: scalar tensors, the amounts that this process's rows of the micro-batch add to the
        mean losses of the optimizer step; summed over the step's micro-batches and over all processes, they give these
        means. tokens: number of tokens of the micro-batch over all processes.
        """
        self.sums += torch.stack((token_loss.detach(), auxiliary_loss.detach())).to(self.sums)
        self.tokens += tokens
        self.total_tokens += tokens

    def begin_step(self) -> None:
        """Remember the sums of losses and tokens before the first micro-batch of a step, for `skip_step` to restore."""
        self._before = (self.sums.clone(), self.tokens, self.total_tokens)

    def skip_step(self) -> None:
        """Remove the current step from the sums and count it as skipped, because it is not finite (`FiniteGuard`)."""
        sums, self.tokens, self.total_tokens = self._before
        self.sums.copy_(sums)
        self.skipped += 1
        self.total_skipped += 1

    def only_skipped(self, step: int) -> bool:
        """Return whether every step since the last log line was skipped because its numbers were not finite.

        step: index of the latest optimizer step, counted from 1. False if there was no step since the log line.
        """
        return 0 < self.skipped == step - self.began

    def start(self) -> None:
        """Start the clock that measures the seconds since the last log line."""
        self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock of the training's seconds during a `with` block, such as one that evaluates or saves.

        On an accelerator, the caller synchronises the device first.
        """
        if self._since is not None:
            elapsed = time.perf_counter() - self._since
            self.seconds += elapsed
            self.total_seconds += elapsed
        self._since = None
        try:
            yield
        finally:
            self.start()

    def clear(self, step: int) -> None:
        """Set the sums since the last log line to zero after step `step`; the totals over the training are kept."""
        self.sums.zero_()
        self.began, self.tokens, self.seconds, self.skipped = step, 0, 0.0, 0

    def save(self, folder: Path, sums: Tensor, lines: int) -> None:
        """Write the window's state to window.json in a checkpoint.

        folder: the checkpoint's folder. sums: fp32 [2], the window's sums of the token loss and of the auxiliary loss,
        added up over all processes (the attribute `sums` holds this process's part). lines: current number of lines in
        metrics.jsonl, to which a resumed run cuts it.
        """
        state = {name: getattr(self, name) for name in (*STATE, *SKIPPED)}
        state |= {"sums": sums.tolist(), "lines": lines}
        (folder / FILE).write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path, first: bool = True) -> int | None:
        """Restore the state from window.json in a checkpoint; return the number of lines that metrics.jsonl had then.

        The number is None in checkpoints of earlier releases. folder: the checkpoint's folder. first: whether this is
        the first process, which continues with the sums of all processes; the others start from zero. Raises ValueError
        for a checkpoint without this file, which `skipstone train` has not written, and for a damaged one.
        """
        path = folder / FILE
        if not path.is_file():
            raise ValueError(f"checkpoint {str(folder)!r} has no {FILE}: it was not written by skipstone train")
        try:
            state = read_object(path)
            sums = torch.tensor([float(value) for value in state["sums"]])
            values = {name: kind(state[name]) for name, kind in STATE.items()}
            values |= {name: int(state.get(name, 0)) for name in SKIPPED}
            self.sums.copy_(sums if first else torch.zeros_like(sums))
        except (ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{str(path)!r} cannot be read: {error!r}") from None
        for name, value in values.items():
            setattr(self, name, value)
        lines = state.get("lines")
        return lines if isinstance(lines, int) else None
