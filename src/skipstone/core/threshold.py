"""The interface to a mechanism's threshold on scores, for code that calibrates a model.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

from torch import Tensor

from skipstone.core.records import DepthRecord

State = list[float | None]


class ScoreThreshold:
    """The threshold by which one mechanism of one block decides: tokens with a higher score are kept.

    saved: whether a saved model keeps a threshold that was set. option: the option that holds the threshold for all
    blocks of an entry of `mechanisms`; None if every block has its own threshold.
    """

    saved = True
    option: str | None = None

    def get(self) -> float:
        """Return the score above which a token is kept."""
        raise NotImplementedError

    def set(self, threshold: float) -> None:
        """Set the score above which a token is kept."""
        raise NotImplementedError

    def state(self) -> State:
        """Return everything that `set` changes, exactly; with an `option`, its value comes first."""
        return [self.get()]

    def restore(self, state: State) -> None:
        """Restore a `state`, undoing `set`."""
        (threshold,) = state
        assert threshold is not None
        self.set(threshold)

    def scores(self, record: DepthRecord) -> Tensor:
        """Return the scores [B, T] that are compared with the threshold, from the record of a pass."""
        return record.score_BT
