"""Counts how many tokens each mechanism of a model kept in a pass, for the cost model.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Literal, Protocol

import torch
from torch import nn

from skipstone.core.counts import Amount, TokenCounts
from skipstone.core.records import DepthRecord, Records, find
from skipstone.core.unpad import pays
from skipstone.model.build import SEGMENT, Block, Blocks

Kept = Mapping[int, Mapping[str, Amount]]


class Weighted(Protocol):
    """The interface of an object with a method `parameters()`, such as an nn.Module."""

    def parameters(self) -> Iterator[nn.Parameter]: ...


class DecoderLike(Protocol):
    """The interface of a decoder as the cost model reads it: blocks, token embedding and positions."""

    @property
    def layers(self) -> Blocks: ...
    @property
    def embed_tokens(self) -> Weighted: ...
    @property
    def positions(self) -> Weighted: ...


class ModelLike(Weighted, Protocol):
    """The interface of a decoder, or of a model that contains one, as the cost model reads it.

    decoder: the decoder, which may be the object itself. `get_output_embeddings` returns the head, None without one.
    """

    @property
    def decoder(self) -> DecoderLike: ...
    def get_output_embeddings(self) -> nn.Linear | None: ...


def kept_from_records(model: ModelLike, records: Sequence[Records], rows: Literal["widest", "mean"] = "widest") -> Kept:
    """Return how many tokens each mechanism kept in a forward pass, as {layer: {mechanism's name: counts}}.

    Counts are numbers of tokens per row or `TokenCounts`, and `cost` takes the result as `kept`. Mechanisms that no
    token reached are absent. model: the model that ran. records: decisions of the pass, a dict by mechanism name for
    each block. rows: "mean" counts the kept tokens of a row on average. "widest" counts what was executed: the kept
    tokens of all rows are gathered to the width of the row that keeps most, and attention computes all these columns,
    while projections and MLP leave out the padding where it is at least 10 %; rows that a mechanism leaves out whole
    (layer dropout) count in `TokenCounts.rows` only. In calls of one token per row, "widest" gives the same as "mean".
    """
    kept: dict[int, dict[str, Amount]] = {}
    for i, (block, decided) in enumerate(zip(model.decoder.layers, records, strict=True)):
        outer = [*block.sites[SEGMENT], *block.sites["block"]]
        paths = [outer, *([*outer, *block.sites[site]] for site in ("attention", "mlp"))]
        kept[i] = {name: counts for path in paths for name, counts in _along(block, path, decided, rows)}
        kept[i] |= block.mlp.measured(decided)
    return kept


def _along(block: Block, path: Sequence[str], decided: Records, rows: str) -> Iterator[tuple[str, TokenCounts]]:
    """Yield each mechanism on a path with the tokens that it keeps, for those that some token reached.

    path: names of mechanisms around the same sub-layer, outermost first. decided: the block's records by name. Query
    tokens are those that all mechanisms so far keep. rows is as in `kept_from_records`.
    """

    reached_BT = rows_B = None
    for name in path:
        record = find(decided, name, DepthRecord)
        if record is None:  # an outer mechanism kept no token
            continue
        reached_BT = record.kept_BT if reached_BT is None else reached_BT & record.kept_BT
        if block.mechanism(name).selects_rows and record.kept_BT.shape[1] > 1:
            rows_B = record.kept_BT.any(1)
        yield name, _counts(record.kept_BT, reached_BT, rows, rows_B)


def _counts(
    given_BT: torch.Tensor, reached_BT: torch.Tensor, rows: str, rows_B: torch.Tensor | None = None
) -> TokenCounts:
    """Return the numbers of kept tokens and of query tokens per row.

    given_BT: bool, the tokens that the mechanism keeps. reached_BT: bool, the query tokens, which all outer mechanisms
    keep too. rows is as in `kept_from_records`. rows_B: bool, the rows that are computed at all; None means all.
    """
    if rows_B is not None and not rows_B.all():
        share = Fraction(int(rows_B.sum()), len(rows_B))
        if not share:
            return TokenCounts(kv_tokens=0, query_tokens=0, rows=share)
        found = _counts(given_BT[rows_B], reached_BT[rows_B], rows)
        return replace(found, rows=share, unpadded=found.unpadded and replace(found.unpadded, rows=share))

    def mean(kept_BT: torch.Tensor) -> float:
        return Fraction(int(kept_BT.sum()), len(kept_BT))  # type: ignore[return-value]

    def columns(kept_BT: torch.Tensor) -> int:
        return int(kept_BT.sum(1).max())

    def computed(kept_BT: torch.Tensor) -> float:
        packs = pays(int(kept_BT.sum()), len(kept_BT) * columns(kept_BT))
        return mean(kept_BT) if packs else columns(kept_BT)

    if rows == "mean" or given_BT.shape[1] == 1:
        return TokenCounts(kv_tokens=mean(given_BT), query_tokens=mean(reached_BT))
    unpadded = TokenCounts(kv_tokens=computed(given_BT), query_tokens=computed(reached_BT))
    return TokenCounts(kv_tokens=columns(given_BT), query_tokens=columns(reached_BT), unpadded=unpadded)
