"""What the cache holds after a real prefill.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.measure.speed import prefill
from skipstone.model.causal_lm import SkipstoneForCausalLM


@dataclass(frozen=True, kw_only=True)
class CacheBytes:
    """Bytes per token that the model has seen, all layers together, skipped tokens counted among the seen.

    kv: keys, values and slots of stored entries. state: what mechanisms keep beside them, with its slots.
    allocated: all that the cache has reserved, used or not.
    """

    kv: float
    state: float
    allocated: float


def cache_bytes(model: SkipstoneForCausalLM, ids_BT: Tensor) -> CacheBytes:
    """Measured on the cache that a causal prefill of `ids_BT` leaves."""
    _, cache = prefill(model, ids_BT)
    kv = state = allocated = 0
    for layer in cache.layers:
        assert isinstance(layer, SkipstoneCacheLayer)
        kv += layer.kv.bytes()
        state += sum(store.bytes() for store in layer.stores.values())
        allocated += sum(store.bytes(allocated=True) for store in (layer.kv, *layer.stores.values()))
    seen = ids_BT.numel()
    return CacheBytes(kv=kv / seen, state=state / seen, allocated=allocated / seen)
