"""What a layout is: how released weights become a model of ours, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from skipstone.core.strict import PlainDict, PlainMapping
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.released.files import Weights

Options = PlainMapping


@dataclass(frozen=True, kw_only=True)
class Translated:
    """values: of SkipstoneConfig. tensors: under our names."""

    values: PlainDict
    tensors: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """read: from weights and options. write: the way back, or None. options: names of what the weights do not tell.

    Both raise ValueError, one line, for weights or models that are not of this layout.
    """

    read: Callable[[Weights, Options], Translated]
    write: Callable[[SkipstoneForCausalLM], Weights] | None = None
    options: tuple[str, ...] = ()
