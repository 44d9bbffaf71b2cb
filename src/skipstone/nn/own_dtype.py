"""A module whose buffers keep their dtype when the dtype of the model around it changes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class OwnDtype(nn.Module):
    """A base class of modules whose buffers move with the model, but keep their dtype.

    A model that `model.to(torch.bfloat16)` has converted thus computes the same as one that was loaded in bf16.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if (moved := self._buffers[name]) is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self
