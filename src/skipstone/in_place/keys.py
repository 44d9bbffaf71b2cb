"""Caches between a block's attention and the model's own cache, so that some tokens can attend to the keys of all.

The attention of a transformers block passes its tokens' keys and values to the cache, and attends to what the cache
returns. A block can therefore be run for some tokens and attend to all. First it is called with the other tokens; this
run ends when their keys and values reach a `Catching` cache. Then it is called with the tokens themselves and a
`Joining` cache, which merges both, stores the result in the model's cache, and returns it to the attention.

Shape letters: B rows, H heads of keys, T tokens of the call, S tokens of keys, E head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

Pair = tuple[Tensor, Tensor]


class _Caught(BaseException):
    """Raised to end a run of a block once its keys and values are known.

    It is a BaseException, so that no `except Exception` in the block stops it.
    """


class _Between(Cache):
    """A cache that passes every call except `update` on to the model's cache; to an empty one if that is None."""

    def __init__(self, cache: Any) -> None:
        self.behind = DynamicCache() if cache is None else cache
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["behind"], name)

    def get_seq_length(self, *args: object, **kwargs: object) -> Any:
        return self.behind.get_seq_length(*args, **kwargs)

    def get_mask_sizes(self, *args: object, **kwargs: object) -> Any:
        return self.behind.get_mask_sizes(*args, **kwargs)


class Catching(_Between):
    """A cache that captures the keys and values that an attention passes to it, and then ends the block's run.

    caught: (keys, values), each [B, H, T, E]. handed: the other arguments of the call of `update`, as (args, kwargs).
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> Pair:
        """Store `key_states` and `value_states` in `caught`, and end the block's run by an exception.

        `keys_of` catches the exception. Other arguments are stored in `handed`. Nothing is returned.
        """
        self.caught = key_states, value_states
        self.handed = args, kwargs
        raise _Caught


class Joining(_Between):
    """A cache that merges the keys and values of the tokens that a block runs for with those of all other tokens.

    cache: the model's cache, which stores the merged ones; None means that nothing is stored. join: a function from the
    pair (keys, values) of the tokens that the block runs for to the pair of all tokens, in their order. rows: a
    function applied to merged keys, and to values, which returns those of the batch rows that the block runs for.
    calls: how often `update` was called.
    """

    def __init__(self, cache: Any, join: Callable[[Pair], Pair], rows: Callable[[Tensor], Tensor]) -> None:
        super().__init__(cache)
        self._stores, self._join, self._rows = cache is not None, join, rows

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> Pair:
        """Merge keys and values with those of the other tokens, store them, and return all for the rows that run.

        key_states, value_states: [B, H, T, E], those of the tokens that the block runs for. Other arguments are passed
        to the model's cache. Returns keys and values [B, H, S, E]; B is smaller if the block runs for some rows only.
        """
        self.calls += 1
        pair = self._join((key_states, value_states))
        if self._stores:
            pair = self.behind.update(*pair, *args, **kwargs)
        return self._rows(pair[0]), self._rows(pair[1])


def keys_of(block: nn.Module, where: str, run: Callable[[Catching], object], cache: Any) -> Catching:
    """Run a block only as far as its attention's keys and values, and return the `Catching` cache that has them.

    block: the module. where: the block's name in error messages. run: calls the block with the cache that it is given.
    cache: the model's cache, or None. Raises ValueError for a block that passes no keys and values to a cache.
    """
    catching = Catching(cache)
    try:
        with _without_queries(block):
            run(catching)
    except _Caught:
        return catching
    raise ValueError(
        f"{where} ({type(block).__name__}) hands no keys and values to a cache, so its tokens cannot be skipped"
    )


@contextmanager
def _without_queries(block: nn.Module) -> Iterator[None]:
    """Let the query projections of a block return zeros inside a `with` block, to save time.

    Queries are not needed in a run that ends once keys and values are known.
    """
    found = [m for name, m in block.named_modules() if name.rpartition(".")[2] == "q_proj" and _width(m) is not None]
    before = [module.__dict__.get("forward") for module in found]
    for module in found:
        module.forward = _Zeros(_width(module))
    try:
        yield
    finally:
        for module, forward in zip(found, before, strict=True):
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.forward = forward


def _width(module: nn.Module) -> int | None:
    width = getattr(module, "out_features", None)
    return width if isinstance(width, int) else None


class _Zeros:
    def __init__(self, width: int | None) -> None:
        self.width = width

    def __call__(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        assert self.width is not None
        return torch.zeros(*x.shape[:-1], self.width, dtype=x.dtype, device=x.device)
