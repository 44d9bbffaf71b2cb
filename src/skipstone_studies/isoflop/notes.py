"""Notes that readers of an isoFLOP table need."""

from __future__ import annotations

from skipstone.evaluate.tables import amount
from skipstone_studies.isoflop.curves import INSIDE
from skipstone_studies.isoflop.grid import compact
from skipstone_studies.isoflop.result import IsoFlopResult

ALONE = 0.9  # a run that had less than this share of its cores shared the machine


def notes(result: IsoFlopResult) -> list[str]:
    """Return the notes below the tables of an isoFLOP result, one sentence each."""
    return [
        *_unfinished(result),
        *_scale(result),
        *_optima(result),
        *_noise(result),
        *_rates(result),
        *_runs(result),
    ]


def _scale(result: IsoFlopResult) -> list[str]:
    """Say how small the models are, and whether their depth was varied."""
    points, grid = list(result.collected), result.collected.grid
    if not points:
        return []
    counts = [point.parameters for point in points]
    found = [
        f"Models have {amount(min(counts))} to {amount(max(counts))} parameters; larger ones may behave differently."
    ]
    depths = {size.blocks for size in grid.sizes}
    if len(depths) == 1 and any(grid.spec.known[arm].get("mechanisms") for arm in grid.spec.arms):
        found.append(
            f"All sizes have {depths.pop()} blocks, so it is not known whether depth pays here; without that, a router "
            "that skips blocks has nothing to gain, and no verdict is given. Add a size of the same width with fewer "
            "blocks."
        )
    return found


def _unfinished(result: IsoFlopResult) -> list[str]:
    collected = result.collected
    spec, there = collected.grid.spec, len(list(collected))
    total = len(spec.arms) * len(spec.budgets) * len(spec.sizes)
    return [f"Not finished: {there} of the grid's {total} cells are recorded."] if there < total else []


def _optima(result: IsoFlopResult) -> list[str]:
    outside = [
        f"{arm} at {compact(budget)}"
        for budget, curves in result.curves.items()
        for arm, curve in curves.items()
        if curve.fit.optimum.where != INSIDE
    ]
    if not outside:
        return ["Every optimum lies inside the grid."]
    return [
        (
            f"The optimum does not lie inside the grid for {', '.join(outside)}: a better size may be beyond its "
            "edge, so losses and shares that depend on it are properties of the grid, not of the arm."
        )
    ]


def _noise(result: IsoFlopResult) -> list[str]:
    spread = result.noise
    if spread is None:
        return ["There are no intervals, because nothing measures the noise (no second seed, and too few sizes)."]
    source = "seeds of the same run" if spread.source == "seeds" else "the parabolas' residuals (no second seed yet)"
    return [
        (
            f"The noise of one run's loss has a standard deviation of {spread.deviation:.4f} nats, estimated from "
            f"{source} with {spread.degrees} degrees of freedom. It does not cover the error of fitting a parabola, or "
            "other corpora."
        ),
        *_many(result),
    ]


def _many(result: IsoFlopResult) -> list[str]:
    compared = sum(map(len, result.same.values()))
    if compared < 2:
        return []
    return [
        (
            f"There are {compared} comparisons with {result.base}, each with its own 90 % interval: if nothing "
            f"differed, about {compared / 10:g} of them would still exclude 0."
        )
    ]


def _rates(result: IsoFlopResult) -> list[str]:
    collected = result.collected
    if len(collected.grid.spec.rates) < 2:
        return ["All arms use one learning rate; none was tuned."]
    grid, ends = (
        collected.grid,
        [arm for arm, rate in collected.chosen.items() if rate in _ends(list(collected.sweep[arm]))],
    )
    found = [
        (
            f"Learning rates were tuned at one size ({grid.middle}), one budget and one seed. At other sizes, an arm's "
            "loss also depends on how well that rate suits them, so arms differ in their tuning as well."
        )
    ]
    beyond = f"The best learning rate is at an end of the list for {', '.join(ends)}; one beyond it might be better."
    return [*found, *([beyond] if ends else [])]


def _ends(rates: list[float]) -> tuple[float, float]:
    return min(rates), max(rates)


def _runs(result: IsoFlopResult) -> list[str]:
    collected = result.collected
    records = collected.records
    if not records:
        return []
    executed = [r.figures["training_flops"]["executed"] / r.figures["cell"]["budget"] for r in records]
    seen = [r.figures["corpus"]["seen"] for r in records if r.figures["corpus"]["seen"] is not None]
    found = [
        (
            f"Training FLOPs at the realised capacities are {min(executed):.3f} to {max(executed):.3f} of the budget "
            "(they differ for an arm whose decision keeps more or fewer tokens than its capacity)."
        )
    ]
    once = (
        " Windows do not overlap, and none is read twice."
        if collected.grid.once
        else " Windows are at random positions."
    )
    found += [f"No run reads more than {max(seen):.1%} of the corpus.{once}"] if seen else []
    shared = sum(r.figures["sharing"]["busy"] < ALONE for r in records)
    if shared:
        found.append(
            f"{shared} of {len(records)} runs had less than {ALONE:.0%} of the cores that they requested, because the "
            "machine was shared; the seconds of single runs are therefore not comparable."
        )
    timed = len(collected.speeds) == len(collected.grid.sizes) * len(collected.grid.spec.arms)
    found.append(
        "Times are tokens divided by the training speed of each arm and size, timed with the arms of a size "
        "interleaved."
        if timed
        else "Times are those of the runs themselves, which ran one after the other."
    )
    base = collected.grid.spec.base
    return [*found, *([] if base in collected.grid.spec.arms else [f"There is no arm {base!r} to compare with."])]
