"""Check every routed block on a few tokens: skipping must give the same result as computing everything.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from skipstone.in_place.handle import RoutedDecoder

LENGTH = 6
KEPT = ((1, 0, 1, 1, 0, 1), (0, 1, 0, 1, 1, 0))  # ragged, so that rows are padded
NEXT = ((1,), (0,))


@torch.no_grad()
def check(handle: RoutedDecoder) -> None:
    """Check that every routed block gives the same result with skipping as with computing everything.

    handle: the routed decoder. It runs in evaluation mode on two rows of six tokens, and then, if the options of all
    mechanisms let skipped tokens provide keys (`kv: full`), on one more token per row with these in the cache, each
    time with a fixed mask of kept tokens. Nothing is checked if weights are offloaded (on the meta device). Raises
    ValueError for a block that differs.
    """
    if any(p.device.type == "meta" for p in handle.decoder.parameters()):
        return  # offloaded weights cannot be checked now
    device = handle.decoder.get_input_embeddings().weight.device  # type: ignore[operator]
    ids = torch.arange(2 * (LENGTH + 1), device=device).view(2, LENGTH + 1) % 7 + 1
    with _in_evaluation(handle.decoder):
        cached = all(getattr(mechanism.config, "kv", "full") == "full" for mechanism in handle.routing_modules())
        cache = _forced(handle, KEPT, ids[:, :LENGTH], None, cached)
        if cached:
            _forced(handle, NEXT, ids[:, LENGTH:], cache, cached)


def _forced(handle: RoutedDecoder, kept: tuple[tuple[int, ...], ...], ids: Tensor, cache: Any, cached: bool) -> Any:
    mask = torch.tensor(kept, dtype=torch.bool, device=ids.device)
    handle.forced = {routed.layer: mask for routed in handle.blocks}
    handle.verifying = True
    try:
        return handle.decoder(input_ids=ids, past_key_values=cache, use_cache=cached).past_key_values
    finally:
        handle.forced, handle.verifying = {}, False


@contextmanager
def _in_evaluation(decoder: nn.Module) -> Iterator[None]:
    was = {module: module.training for module in decoder.modules()}
    decoder.eval()
    try:
        yield
    finally:
        for module, training in was.items():
            module.training = training
