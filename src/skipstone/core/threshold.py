"""A threshold on scores, as whoever calibrates a model sees it: a mechanism hands one out (`score_threshold`).

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

from torch import Tensor

from skipstone.core.records import DepthRecord

State = list[float | None]


class ScoreThreshold:
    """The threshold by which one mechanism of one block decides: a token is kept where its score lies above.

    saved: whether a saved model keeps what was set. option: the option that holds the threshold for all blocks of an
    entry of `mechanisms`, or None where every block has a threshold of its own.
    """

    saved = True
    option: str | None = None

    def get(self) -> float:
        """Return the score above which a token is kept."""
        raise NotImplementedError

    def set(self, threshold: float) -> None:
        raise NotImplementedError

    def state(self) -> State:
        """Return everything that `set` changes, to the bit; with an `option`, first of all its value."""
        return [self.get()]

    def restore(self, state: State) -> None:
        """Undo `set`: back to a `state`."""
        (threshold,) = state
        assert threshold is not None
        self.set(threshold)

    def scores(self, record: DepthRecord) -> Tensor:
        """Return the scores [B, T] that the threshold is compared with, from the record of a pass."""
        return record.score_BT
