"""Map released tensor names to ours by tables of patterns: `{i}` stands for a block, `{next}` for the following one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from torch import Tensor

from skipstone.model.loading import and_more

Table = Mapping[str, str]


def count_blocks(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Return the number of blocks in a state dict, from names such as `prefix.0.weight`.

    It is the highest index plus 1. tensors: the state dict. prefix: the beginning of the names. Raises ValueError if no
    name has this form.
    """
    found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in tensors)
    numbers = {int(match[1]) for match in found if match}
    if not numbers:
        raise ValueError(f"has no tensor {prefix}.0...: it is not of this layout")
    return max(numbers) + 1


def expand(table: Table, count: int) -> dict[str, str]:
    """Return a table of tensor names for `count` blocks, in which {i} is replaced by each index and {next} by i + 1.

    table: a dict from patterns of released names to patterns of our names.
    """
    return {k.format(i=i, next=i + 1): v.format(i=i, next=i + 1) for i in range(count) for k, v in table.items()}


def check_names(tensors: Mapping[str, Tensor], expected: Mapping[str, object], ignored: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless `tensors` has exactly the names of `expected`, whose values are not read.

    tensors: a state dict. ignored: names that may be present or absent.
    """
    if missing := [name for name in expected if name not in tensors and name not in ignored]:
        raise ValueError(f"lacks {and_more(missing)}")
    if left := [name for name in tensors if name not in expected and name not in ignored]:
        near = difflib.get_close_matches(left[0], expected, n=1)
        hint = f" (the nearest name that it has is {near[0]})" if near else ""
        raise ValueError(f"has {and_more(left)}, which this layout does not have{hint}")


def sizes(tensors: Mapping[str, Tensor], name: str, axes: int) -> tuple[int, ...]:
    """Return the shape of the tensor `name` in `tensors`. Raises ValueError if its number of axes is not `axes`."""
    shape = tuple(tensors[name].shape)
    if len(shape) != axes:
        raise ValueError(f"{name} has shape {list(shape)}, {axes} axes are expected")
    return shape
