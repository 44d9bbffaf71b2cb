"""`ReleasedLayout`: how weights as a paper's authors released them become a model of ours, and back."""

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
    """Released weights in our terms. values: fields of SkipstoneConfig. tensors: a state dict under our names."""

    values: PlainDict
    tensors: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ReleasedLayout:
    """A layout in which a paper's authors released weights: how to read and write it.

    read: a function of a file's weights and of options that returns our configuration fields and tensors. write: a
    function of one of our models that returns a file's weights; None if that is not supported. options: the names of
    the options of `read`, values that the weights do not contain. Both functions raise ValueError for weights or models
    that do not fit the layout.
    """

    read: Callable[[Weights, Options], Translated]
    write: Callable[[SkipstoneForCausalLM], Weights] | None = None
    options: tuple[str, ...] = ()
