"""`ScoreThreshold`: access to the threshold by which a mechanism keeps tokens, for code that calibrates a model.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

from torch import Tensor

from skipstone.core.records import DepthRecord

State = list[float | None]


class ScoreThreshold:
    """Access to the threshold by which one mechanism of one block decides: tokens with a higher score are kept.

    saved: whether saving the model afterwards stores a threshold that `set` has changed. option: the configuration
    option that holds the threshold for all blocks of a mechanism; None means that every block has its own threshold.
    """

    saved = True
    option: str | None = None

    def get(self) -> float:
        """Return the score above which a token is kept."""
        raise NotImplementedError

    def set(self, threshold: float) -> None:
        """Change the score above which a token is kept to `threshold`."""
        raise NotImplementedError

    def state(self) -> State:
        """Return everything that `set` changes as a list of numbers, so that `restore` can undo it exactly.

        If the threshold is an option of the configuration and not a buffer, the option's value comes first, None where
        it is not set.
        """
        return [self.get()]

    def restore(self, state: State) -> None:
        """Set the threshold back to what it was when the method `state` returned the list `state`."""
        (threshold,) = state
        assert threshold is not None
        self.set(threshold)

    def scores(self, record: DepthRecord) -> Tensor:
        """Return the scores, fp32 [B, T], that are compared with the threshold; NaN for tokens without a decision.

        record: what the mechanism decided in a forward pass.
        """
        return record.score_BT
