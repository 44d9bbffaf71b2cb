"""Checks, on training passes, of whether routers decide anything: which are dead, constant or saturated.

Dead: it never chooses something (a token, or an expert). Constant: it chooses the same for every token. Saturated: its
scores are so large, or its probabilities so close to 1, that hardly any gradient reaches it.

Shape letters: B rows, T tokens, X experts, G groups of neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from skipstone.core.depth import DepthModule
from skipstone.core.records import DepthRecord, ExpertsRecord, NeuronGroupsRecord, Record, Records
from skipstone.core.routing_module import RoutingModule

STEEP = 10.0  # a sigmoid's slope at a score of this size is 5e-5: hardly any gradient reaches the router
ALMOST_ALL = 0.99  # share of the tokens that have to be so
CERTAIN = 0.9999  # probability of a token's most probable expert


def bad_scores(records: Iterable[Records]) -> dict[str, Tensor]:
    """Return whether each router gave a NaN or infinite score to a token that reached it, by `block L NAME`.

    L is the index of the block and NAME the mechanism's name in it. The values are bool scalars on the device, so that
    the host does not wait. Records of one shape are checked together, which keeps the number of operations small.
    records: decisions of a pass, a dict by mechanism name for each block.
    """
    groups: dict[torch.Size, list[tuple[str, Record]]] = {}
    for layer, decided in enumerate(records):
        for name, record in decided.items():
            groups.setdefault(record[0].shape, []).append((f"block {layer} {name}", record))
    found: dict[str, Tensor] = {}
    for group in groups.values():
        wrong_NBT = ~torch.stack([record[0].detach() for _, record in group]).isfinite()
        wrong_NBT = wrong_NBT.flatten(3).any(-1) if wrong_NBT.dim() > 3 else wrong_NBT
        wrong_N = (wrong_NBT & torch.stack([record.reached_BT for _, record in group])).flatten(1).any(1)
        found |= dict(zip((name for name, _ in group), wrong_N.unbind(), strict=True))
    return found


class RouterHealth:
    """Collects what every router decided in training passes; `read` names those that are dead, constant or saturated.

    Adding a pass costs a few sums over [B, T] (rows, tokens) for each router, and the host does not wait.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[RoutingModule, Judge, Tensor]] = {}

    @torch.no_grad()
    def add(self, modules: Iterable[RoutingModule], records: Sequence[Records]) -> None:
        """Add the decisions of one training pass to the collection.

        modules: the model's mechanisms. records: decisions of the pass, a dict by mechanism name for each block.
        """
        for module in modules:
            place = module.placement
            record = records[place.layer].get(place.name)
            if record is None or type(record) not in KINDS:
                continue
            count, judge = KINDS[type(record)]
            sums, name = count(record), f"block {place.layer} {place.name}"
            before = self._sums.get(name)
            self._sums[name] = (module, judge, sums if before is None else before[2] + sums)

    def read(self, summed: Callable[[Tensor], Tensor], late: bool) -> dict[str, str]:
        """Return the routers that are dead, constant or saturated, and empty the collection.

        Keys are `block L NAME`, with the index of the block and the mechanism's name in it; values say in words what is
        wrong: a block or an expert that gets no token (dead), the same choice for every token (constant), or scores so
        large that the router hardly learns (saturated). Healthy routers are left out. summed: sums a tensor over the
        processes that train together, all of which have to call this method. late: whether at least half of the
        training is over; some faults are reported only then, because routers that start by keeping everything need time
        to begin to choose.
        """
        names, found = list(self._sums), {}
        if names:
            flat = summed(torch.cat([self._sums[name][2] for name in names])).tolist()
            for name in names:
                module, judge, sums = self._sums[name]
                own, flat = flat[: len(sums)], flat[len(sums) :]
                if own[0] and (said := judge(module, own, late)):
                    found[name] = said
        self._sums = {}
        return found


Judge = Callable[[RoutingModule, list[float], bool], str | None]


def _count_depth(record: DepthRecord) -> Tensor:
    taken_BT = record.kept_BT & (record.weight_BT != 0)
    flat_BT = (record.score_BT.abs() > STEEP) & record.reached_BT
    return torch.stack([mask.sum() for mask in (record.reached_BT, taken_BT, flat_BT)]).double()


def _judge_depth(module: RoutingModule, sums: list[float], late: bool) -> str | None:
    reached, taken, flat = sums
    assert isinstance(module, DepthModule)
    wanted = module.intended_share
    if wanted == 0 or not module.chooses_by_score:
        return None
    if taken == 0:
        return f"keeps no token of {reached:,.0f}: its block is dead"
    if wanted is not None and wanted < ALMOST_ALL and taken == reached:
        return f"keeps every token of {reached:,.0f}, although it is to keep {wanted:.0%}: it skips nothing"
    if flat >= ALMOST_ALL * reached and (late or wanted is not None):
        return f"is saturated: {flat / reached:.0%} of its scores exceed {STEEP:.0f} in size, where it hardly learns"
    return None


def _count_experts(record: ExpertsRecord) -> Tensor:
    certain_BT = record.logits_BTX.softmax(-1).amax(-1) > CERTAIN
    first = [mask.sum() for mask in (record.reached_BT, certain_BT & record.reached_BT)]
    return torch.cat([torch.stack(first), record.chosen_BTX.flatten(0, -2).sum(0)]).double()


def _judge_experts(module: RoutingModule, sums: list[float], late: bool) -> str | None:
    reached, certain, *chosen = sums
    dead = [i for i, count in enumerate(chosen) if not count]
    if dead:
        shown = ", ".join(map(str, dead[:5])) + (f" and {len(dead) - 5} more" if len(dead) > 5 else "")
        return f"sends no token of {reached:,.0f} to expert {shown} of {len(chosen)}: dead"
    if certain >= ALMOST_ALL * reached:
        return (
            f"is saturated: {certain / reached:.0%} of the tokens choose an expert with a probability above {CERTAIN}"
        )
    return None


def _count_groups(record: NeuronGroupsRecord) -> Tensor:
    reached = record.reached_BT.sum()[None]
    return torch.cat([reached, (record.kept_BTG & record.reached_BT[..., None]).flatten(0, -2).sum(0)]).double()


def _judge_groups(module: RoutingModule, sums: list[float], late: bool) -> str | None:
    reached, *on = sums
    if late and 0 < sum(on) < reached * len(on) and all(count in (0, reached) for count in on):
        return f"chooses the same groups of neurons for every token of {reached:,.0f}"
    return None


KINDS: dict[type, tuple[Callable[..., Tensor], Judge]] = {
    DepthRecord: (_count_depth, _judge_depth),
    ExpertsRecord: (_count_experts, _judge_experts),
    NeuronGroupsRecord: (_count_groups, _judge_groups),
}
