"""Whether depth pays in a grid, without which a routed arm gets no verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from skipstone_studies.headroom import LEAST
from skipstone_studies.isoflop.curves import GridPoint, GridRecords

Refusal = Literal["", "no headroom", "headroom not known"]


def gain(points: Sequence[GridPoint]) -> float | None:
    """Return by how many nats a deepest model beats the best shallower one of its width, at most over all widths.

    None if no width was run with two numbers of blocks.
    """
    found = []
    for width in {point.cell.size.width for point in points}:
        of_width = {point.cell.size.blocks: point.loss for point in points if point.cell.size.width == width}
        deepest = max(of_width)
        shallower = [loss for blocks, loss in of_width.items() if blocks < deepest]
        found += [min(shallower) - of_width[deepest]] if shallower else []
    return max(found, default=None)


def refusal(collected: GridRecords, arm: str, budget: float) -> Refusal:
    """Return why an arm gets no verdict at a budget; "" for an arm that routes nothing, or where depth pays."""
    if not collected.grid.spec.known[arm].get("mechanisms"):
        return ""
    base = collected.curves.get((collected.grid.spec.base, budget), [])
    known = gain(base)
    return "headroom not known" if known is None else "" if known >= LEAST else "no headroom"
