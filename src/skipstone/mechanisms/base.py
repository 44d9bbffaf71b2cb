"""What every mechanism around an update declares: the seam's side of a depth mechanism.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from skipstone.core.adjustable import Adjustable, Place
from skipstone.core.load import Load
from skipstone.core.records import DepthRecord, Records
from skipstone.core.seam import Update
from skipstone.core.strict import from_dict
from skipstone.core.tokens import Tokens
from skipstone.core.tokens import every as every


class DepthMechanism(Adjustable):
    """Decides which tokens get an update, and how strongly: a function on updates.

    Subclasses name a frozen keyword-only dataclass `Config`; options given to the constructor go through it.
    """

    Config: ClassVar[type[Any]]

    def __init__(self, hidden_size: int, place: Place | None = None, **options: Any) -> None:
        super().__init__()
        self.config = from_dict(self.Config, options)
        self.hidden_size, self.place = hidden_size, place or Place()

    def forward(self, update: Update, x_BTD: Tensor, tokens: Tokens) -> tuple[Tensor, Records]:
        raise NotImplementedError

    def initial_state(self, x_BTD: Tensor) -> dict[str, Tensor]:
        """Tensors [B, T] that cross blocks, as they are before block 0."""
        return {}

    def unasked(self, x_BTD: Tensor) -> DepthRecord:
        zero_BT = x_BTD.new_zeros(x_BTD.shape[:2], dtype=torch.float32)
        return DepthRecord(zero_BT + float("nan"), zero_BT > 0, zero_BT, zero_BT > 0)

    def narrow(self, load: Load, kept: Load | float | None = None, oracle: bool = False) -> Load:
        """The load inside, by what was measured (`kept`: those that it keeps), else as the configuration promises.

        What is not kept stays inside as keys and values, and an oracle pass skips nothing; others override this.
        """
        if oracle or kept is None:
            return load
        return Load(given=load.given, asked=load.of(kept).asked)

    def ideal(self, record: DepthRecord) -> Tensor | None:
        """bool [B, T], whom an oracle would keep by the record's scores; None where there is no such thing."""
        return None

    def record(self, **values: Any) -> Records:
        return {self.place.name or type(self).__name__: DepthRecord(**values)}
