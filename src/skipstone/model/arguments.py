"""Checks of a decoder call's cache, and what the kind of cache means for the pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import Cache

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.core.static import SkipstoneStaticCacheLayer
from skipstone.core.tokens import Executor, PassMode


def check_cache(cache: Any, blocks: set[int], rows: int) -> None:
    """Raise ValueError unless the cache was made for one of these numbers of blocks and holds `rows` rows."""
    layers = getattr(cache, "layers", None)
    if not layers or not all(isinstance(layer, SkipstoneCacheLayer) for layer in layers):
        raise ValueError(
            "past_key_values must be a DynamicCache(config=model.config) of this model, or a "
            f"StaticCache(config=model.config, max_cache_len=...), got {_described(cache)}; "
            "prefixes of keys and values (prefix tuning) are not supported"
        )
    if len(layers) not in blocks:
        raise ValueError(f"past_key_values has {len(layers)} layers, but the model has {max(blocks)} blocks")
    if cache.offloading:
        raise ValueError("past_key_values must not be offloaded: slots and mechanism state would stay behind")
    held = next((layer.rows for layer in layers if layer.rows is not None), None)
    if held is not None and held != rows:
        raise ValueError(f"past_key_values holds {held} rows, but the call has {rows}; a row is never added to a cache")


def _described(cache: object) -> str:
    """Return the type of a cache and of its first layer."""
    layers = getattr(cache, "layers", None)
    return type(cache).__name__ + (f" of {type(layers[0]).__name__}" if layers else "")


def of_fixed_size(mode: PassMode, cache: Cache | None, length: int) -> PassMode:
    """Return the mode for a cache of fixed size, in which no shape of a step may depend on decisions.

    Steps compute everything and discard what is not kept. Prompts may gather, but every block has to get a token, so
    that every store allocates its memory.
    """
    if cache is None or not isinstance(cache.layers[0], SkipstoneStaticCacheLayer):
        return mode
    executor: Executor = "masked" if length == 1 or torch.compiler.is_compiling() else mode.executor
    return replace(mode, executor=executor, per_row_gather=False, never_empty=True)
