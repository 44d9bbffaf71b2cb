"""`route`: put depth mechanisms around the blocks of a transformers decoder that is already built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from torch import nn

from skipstone.in_place.check import check
from skipstone.in_place.find import blocks_of, decoder_of, require_kernel
from skipstone.in_place.handle import RoutedDecoder
from skipstone.in_place.saved import read_mechanisms, read_weights
from skipstone.mechanisms import DEPTH
from skipstone.model.fields import Written
from skipstone.model.parts import MechanismEntry, parse_mechanisms

NEUTRAL: Mapping[str, object] = {"kv": "full"}


def route(
    model: nn.Module,
    mechanisms: Sequence[Written] | str | Path,
    *,
    dense_start: bool = False,
    verify: bool = True,
) -> RoutedDecoder:
    """Put depth mechanisms around the blocks of a transformers decoder, in place, and return an object to control them.

    model: a causal language model, or a multimodal one with a text decoder, whose blocks take hidden states first and
    return hidden states, alone or first in a tuple. mechanisms: entries as in `SkipstoneConfig` (name, layers,
    options), around whole blocks, with `kv: full` by default (skipped tokens still provide keys and values); or a
    folder that `RoutedDecoder.save` has written. dense_start: whether to start with the outputs of the model itself,
    for fine-tuning; options that are not given then take the defaults of `skipstone adapt`. verify: whether to check on
    a few tokens that every routed block gives the same result with skipping as with computing everything.

    Raises ValueError for invalid entries, for models whose blocks have another form, and for a block that fails the
    check; the model is left as it was.
    """
    decoder = decoder_of(model)
    require_kernel(decoder)
    blocks = blocks_of(decoder)
    folder = Path(mechanisms) if isinstance(mechanisms, str | Path) else None
    written = _entries(mechanisms) if folder is None else read_mechanisms(folder)
    entries = parse_mechanisms([_completed(entry, dense_start) for entry in written], len(blocks))
    _refuse_sites(entries)
    handle = RoutedDecoder(model, decoder, blocks, entries)
    try:
        if folder is not None:
            read_weights(folder, dict(handle.modules()))
        if dense_start:
            for mechanism in handle.routing_modules():
                mechanism.start_as_dense()
        if verify:
            check(handle)
    except BaseException:
        handle.undo()
        raise
    return handle


def _entries(mechanisms: object) -> list[Written]:
    """Return the argument `mechanisms` as a list. Raises ValueError unless it is one of mappings."""
    if not isinstance(mechanisms, list | tuple) or not all(isinstance(entry, Mapping) for entry in mechanisms):
        raise ValueError(f"mechanisms must be a list of mappings or a folder, got {mechanisms!r}")
    return [*mechanisms]


def _completed(written: Written, dense_start: bool) -> dict[str, object]:
    """Return one entry of `mechanisms` with the defaults of `route` where it does not set an option.

    They are `kv: full` and, with `dense_start`, the mechanism's defaults in `skipstone adapt`.
    """
    entry = dict(written)
    mechanism = DEPTH.get(str(entry.get("name")))
    if mechanism is None:  # reported by the parser
        return entry
    known = {field.name for field in fields(mechanism.Config)}
    start = mechanism.adapt_defaults if dense_start else {}
    given = {**start, **{name: value for name, value in NEUTRAL.items() if name in known}}
    return {**given, **entry}


def _refuse_sites(entries: Sequence[MechanismEntry]) -> None:
    for i, entry in enumerate(entries):
        if entry.site != "block":
            raise ValueError(f"mechanisms[{i}].on must be 'block', as route wraps whole blocks; got {entry.site!r}")
        if entry.get("benefit"):
            raise ValueError(f"mechanisms[{i}].benefit is measured for skipstone's own models only; leave it out")
        if entry.get("decision") == "boundary":
            raise ValueError(f"mechanisms[{i}].decision 'boundary' reads token ids, which route does not give blocks")
