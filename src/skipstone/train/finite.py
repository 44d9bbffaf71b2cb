"""`FiniteGuard`: a training stops before a loss, gradient or score that is not finite reaches a checkpoint or log."""

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
    """Error for a training whose loss, gradient or router scores are not finite; the message is one line."""


@dataclass(frozen=True, kw_only=True)
class RowTurns:
    """Tells which training rows a process reads when several processes take turns by micro-batches.

    rows: number of rows that one process reads in a micro-batch. parts: micro-batches of an optimizer step. rank: index
    of this process. count: number of processes.
    """

    rows: int
    parts: int
    rank: int = 0
    count: int = 1

    def first(self, step: int, part: int, rank: int) -> int:
        """Return the index of the first training row of a micro-batch.

        step: the optimizer step, from 1. part: the micro-batch within the step, from 0. rank: the process that reads
        it.
        """
        return self.rows * (((step - 1) * self.parts + part) * self.count + rank)


class FiniteGuard:
    """A guard that stops a training when the loss, the gradient norm or a router score of a step is not finite.

    Whether something was not finite is noted on the device until `settle` reads it, for which the CPU waits for the
    device once, and which gives the same answer in all processes.

    routers: names of all routers as "block L NAME", with the index of the block and the mechanism's name in it. turns:
    the rows that this process reads, so that the message can name them. folder: the run folder, whose last checkpoint
    the message names. allowed: how many steps of the training may be skipped instead of stopping it. gather: a function
    that concatenates a tensor over processes along its first dimension. skipped: how many steps have been skipped so
    far.
    """

    def __init__(
        self, routers: Sequence[str], turns: RowTurns, folder: Path, allowed: int, gather: Callable[[Tensor], Tensor]
    ) -> None:
        self.columns = (*OWN, *routers)
        self.turns, self.folder, self.allowed, self.gather = turns, folder, allowed, gather
        self.skipped = 0
        self._seen: list[tuple[int, int]] = []  # step and micro-batch of each row of flags
        self._flags: list[Tensor] = []

    @torch.no_grad()
    def add(self, step: int, loss: Tensor, records: Iterable[Records]) -> None:
        """Record whether the loss and the router scores of one micro-batch are finite.

        step: the optimizer step, from 1. loss: a scalar tensor. records: what each mechanism decided, one dict by
        mechanism name for each block.
        """
        part = self._seen[-1][1] + 1 if self._seen and self._seen[-1][0] == step else 0
        routers, fine = bad_scores(records), torch.zeros((), dtype=torch.bool, device=loss.device)
        found = [~loss.detach().isfinite(), fine, *(routers.get(name, fine) for name in self.columns[len(OWN) :])]
        self._seen.append((step, part))
        self._flags.append(torch.stack(found))

    @torch.no_grad()
    def add_gradient(self, norm: Tensor | float) -> None:
        """Record whether the gradient norm of the step is finite, after the last micro-batch of the step was added.

        norm: the norm of all gradients of the step.
        """
        if self._flags:
            self._flags[-1][1] = ~torch.as_tensor(norm).isfinite().to(self._flags[-1].device)

    def settle(self, may_skip: bool = False) -> bool:
        """Return whether the current step must be skipped because its loss, gradient or router scores are not finite.

        All processes call it together and get the same answer. may_skip: True if the optimizer has not yet applied the
        step, so that it can still be skipped. Raises `NotFinite` if something was not finite and the step can no longer
        be skipped, or if `allowed` steps were skipped before.
        """
        if not self._flags:
            return False
        seen, flags = self._seen, self.gather(torch.stack(self._flags).to(torch.uint8)).tolist()
        self._seen, self._flags = [], []
        wrong = [
            (step, part, rank, row)
            for rank in range(self.turns.count)
            for (step, part), row in zip(seen, flags[rank * len(seen) : (rank + 1) * len(seen)], strict=True)
            if any(row)
        ]
        if not wrong:
            return False
        step = min(found[0] for found in wrong)
        what = self._in_words(step, [found[1:] for found in wrong if found[0] == step])
        if may_skip and self.skipped < self.allowed:
            self.skipped += 1
            if self.turns.rank == 0:
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
            places = [(part, rank) for part in range(self.turns.parts) for rank in range(self.turns.count)]
        firsts = sorted(self.turns.first(step, part, rank) for part, rank in places)
        rows = ", ".join(f"{start} to {end - 1}" for start, end in _joined(firsts, self.turns.rows))
        return f"{' and '.join(own)} {'are' if len(own) > 1 or routers else 'is'} not finite on training rows {rows}"

    def good_checkpoint(self) -> str:
        """Return words for messages that name the newest checkpoint, or say that there is none.

        Every checkpoint is good, because numbers are checked before one is saved.
        """
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
    """Return the ranges [start, end) of rows that micro-batches of `rows` rows cover, adjacent ones joined.

    firsts: the first row of each micro-batch, ascending.
    """
    found: list[tuple[int, int]] = []
    for first in firsts:
        if found and found[-1][1] == first:
            found[-1] = (found[-1][0], first + rows)
        else:
            found.append((first, first + rows))
    return found
