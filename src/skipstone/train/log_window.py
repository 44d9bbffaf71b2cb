"""What the next log line reports: losses and time since the last one. It survives a checkpoint bit for bit."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = "window.json"


class LogWindow:
    """Sums on the device, so that adding to them never makes the host wait.

    began: the step after which this window began. The totals run over the whole training. Time spent on evaluation and
    on saving is left out.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, device=device)  # token loss, auxiliary loss
        self.began = self.tokens = self.total_tokens = 0
        self.seconds = self.total_seconds = 0.0
        self._since: float | None = None

    def add(self, token_loss: Tensor, auxiliary_loss: Tensor, tokens: int) -> None:
        """One micro-batch: its share of the step's mean losses, and how many tokens it had."""
        self.sums += torch.stack((token_loss.detach(), auxiliary_loss.detach())).to(self.sums)
        self.tokens += tokens
        self.total_tokens += tokens

    def start(self) -> None:
        self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here does not count. The caller has waited for the device before it enters."""
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
        """Begin the next window after `step`; the totals stay."""
        self.sums.zero_()
        self.began, self.tokens, self.seconds = step, 0, 0.0

    def save(self, folder: Path) -> None:
        state = {name: getattr(self, name) for name in ("began", "tokens", "total_tokens", "seconds", "total_seconds")}
        (folder / FILE).write_text(json.dumps({**state, "sums": self.sums.tolist()}), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Raises ValueError for a checkpoint that was not written by this trainer."""
        if not (folder / FILE).is_file():
            raise ValueError(f"checkpoint {str(folder)!r} has no {FILE}: it was not written by skipstone train")
        state: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
        self.sums.copy_(torch.tensor(state.pop("sums")))
        for name, value in state.items():
            setattr(self, name, value)
