"""`FiniteGuard`: numbers that are not finite stop a training before they change a weight."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from skipstone.core.records import Records
from skipstone.measure.router_health import bad_scores
from skipstone.runs import checkpoints

OWN = ("loss", "gradient")  # the first columns; one for each router follows


class NotFinite(ValueError):
    """A training stopped because of numbers that are not finite; the message is one line."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which rows of the training data a process reads: micro-batches take turns over processes.

    rows: of a micro-batch. parts: micro-batches of a step. rank, count: this process, and how many there are.
    """

    rows: int
    parts: int
    rank: int = 0
    count: int = 1

    def first(self, step: int, part: int, rank: int) -> int:
        """Return the first row of a process's micro-batch. step: from 1."""
        return self.rows * (((step - 1) * self.parts + part) * self.count + rank)


class FiniteGuard:
    """Looks at every step's loss, gradient norm and router scores; `settle` stops the training in all processes alike.

    routers: the names of all routers, as `bad_scores` gives them. allowed: how many steps may be skipped instead.
    skipped: how many were. gather: concatenates a tensor's rows over processes. The flags stay on the device until
    `settle` reads them, which makes the host wait once.
    """

    def __init__(
        self, routers: Sequence[str], share: Share, folder: Path, allowed: int, gather: Callable[[Tensor], Tensor]
    ) -> None:
        self.columns = (*OWN, *routers)
        self.share, self.folder, self.allowed, self.gather = share, folder, allowed, gather
        self.skipped = 0
        self._seen: list[tuple[int, int]] = []  # step and micro-batch of each row of flags
        self._flags: list[Tensor] = []

    @torch.no_grad()
    def add(self, step: int, loss: Tensor, records: Iterable[Records]) -> None:
        """Look at one micro-batch of `step` (from 1)."""
        part = self._seen[-1][1] + 1 if self._seen and self._seen[-1][0] == step else 0
        routers, fine = bad_scores(records), torch.zeros((), dtype=torch.bool, device=loss.device)
        found = [~loss.detach().isfinite(), fine, *(routers.get(name, fine) for name in self.columns[len(OWN) :])]
        self._seen.append((step, part))
        self._flags.append(torch.stack(found))

    @torch.no_grad()
    def add_gradient(self, norm: Tensor | float) -> None:
        """Look at the norm of the gradients of the step whose micro-batches were added last."""
        if self._flags:
            self._flags[-1][1] = ~torch.as_tensor(norm).isfinite().to(self._flags[-1].device)

    def settle(self, may_skip: bool = False) -> bool:
        """Return whether the last step has to be skipped; all processes call it together and get the same answer.

        may_skip: whether its update can still be left out. Raises `NotFinite` if it cannot, or if no more skips are
        allowed.
        """
        if not self._flags:
            return False
        seen, flags = self._seen, self.gather(torch.stack(self._flags).to(torch.uint8)).tolist()
        self._seen, self._flags = [], []
        wrong = [
            (step, part, rank, row)
            for rank in range(self.share.count)
            for (step, part), row in zip(seen, flags[rank * len(seen) : (rank + 1) * len(seen)], strict=True)
            if any(row)
        ]
        if not wrong:
            return False
        step = min(found[0] for found in wrong)
        what = self._in_words(step, [found[1:] for found in wrong if found[0] == step])
        if may_skip and self.skipped < self.allowed:
            self.skipped += 1
            if self.share.rank == 0:
                print(  # noqa: T201
                    f"skipstone: step {step} is skipped ({self.skipped} of at most {self.allowed}): {what}",
                    file=sys.stderr,
                )
            return True
        raise NotFinite(f"training stopped at step {step}: {what}; {self._advice()}")

    def _in_words(self, step: int, wrong: list[tuple[int, int, list[int]]]) -> str:
        names = [name for i, name in enumerate(self.columns) if any(row[i] for _, _, row in wrong)]
        routers = [name for name in names if name not in OWN]
        own = [f"the {name}" for name in OWN if name in names]
        if routers:
            more = f" and {len(routers) - 1} more" if len(routers) > 1 else ""
            own.append(f"the router scores of {routers[0]}{more}")
        places = [(part, rank) for part, rank, row in wrong if row[0] or any(row[len(OWN) :])]
        if not places:  # only the gradient, which is of the whole step
            places = [(part, rank) for part in range(self.share.parts) for rank in range(self.share.count)]
        firsts = sorted(self.share.first(step, part, rank) for part, rank in places)
        rows = ", ".join(f"{start} to {end - 1}" for start, end in _joined(firsts, self.share.rows))
        return f"{' and '.join(own)} {'are' if len(own) > 1 or routers else 'is'} not finite on training rows {rows}"

    def good_checkpoint(self) -> str:
        """Return in words which checkpoint is the last; all are good, since numbers are looked at before saving."""
        known = checkpoints(self.folder)
        return f"the last good checkpoint is {str(known[-1])!r}" if known else "there is no checkpoint yet"

    def _advice(self) -> str:
        good = self.good_checkpoint()
        used = f" (skipped before: {self.skipped})" if self.skipped else ""
        return (
            f"{good}{used}. Lower train.learning_rate, lengthen train.warmup_steps, or skip such steps with "
            f"train.max_skipped_steps above {self.allowed}"
        )


def _joined(firsts: list[int], rows: int) -> list[tuple[int, int]]:
    """Return the ranges of rows [start, end) from sorted starts of micro-batches, adjacent ones joined."""
    found: list[tuple[int, int]] = []
    for first in firsts:
        if found and found[-1][1] == first:
            found[-1] = (found[-1][0], first + rows)
        else:
            found.append((first, first + rows))
    return found
