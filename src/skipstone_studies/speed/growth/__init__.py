"""A study of how time and memory grow with context, rows, blocks, vocabulary and processes.

Loading a large checkpoint and imports are measured, too.
"""

from __future__ import annotations

from collections.abc import Sequence

from skipstone.evaluate.tables import Section, markdown
from skipstone_studies.claims import ByArm
from skipstone_studies.speed.growth import curves, left_out, loading, processes
from skipstone_studies.study import Column, Figures, RecipeDict, Study

WITHIN = 0.05  # of the exponents of arithmetic
KINDS = {
    "curve": curves.measured,
    "processes": processes.measured,
    "memory": loading.memory,
    "imports": loading.imports,
}


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the recipes by name: curves over sizes and over processes, three ways to read a checkpoint, and imports.

    A curve is the time and memory of a pass by one size of the model or its input. scale: not used.
    """
    return {**curves.arms(), **processes.arms(), **loading.arms()}


def measured(recipe: RecipeDict) -> Figures:
    """Measure one arm (recipe of the study): a cost curve, the memory of reading a checkpoint, or the time of imports.

    recipe: an entry of `arms` with a key "seed". The result depends on its "kind": for "curve" and "processes", the
    points of the curve and the exponents with which time and memory grow, as `curves.with_exponents` returns them; for
    "memory", sizes in MB, as `loading.memory` returns them; for "imports", CPU seconds, as `loading.imports` returns
    them.
    """
    return KINDS[recipe["kind"]](recipe)


def details(figures: ByArm) -> str:
    """Return the text and tables below the study's main table: every cost curve in seconds, and imports.

    The text says how many curves grow in time with the exponent of their FLOPs. figures: {arm (a curve or another
    measurement): {seed: what `measured` returned}}.
    """
    found = {arm: next(iter(seeds.values())) for arm, seeds in figures.items()}
    lines = {arm: one for arm, one in found.items() if "points" in one}
    parts = []
    if lines:
        near = [arm for arm, one in lines.items() if abs(one["apart"]["time"]) <= WITHIN]
        parts.append(
            f"Of {len(lines)} curves, {len(near)} grow in time within {WITHIN:g} of their FLOPs' exponent. In the "
            "others the rate in GFLOP/s is still changing at the upper end, by exactly the difference."
        )
        parts += [told] if (told := left_out.text(lines, WITHIN)) else []
    axes = {**curves.AXES, "processes": processes.COUNTS}
    parts += [_curves(axis, axes[axis], lines) for axis in axes if any(arm.startswith(f"{axis},") for arm in lines)]
    if "imports" in found:
        rows = [[name, f"{seconds:.3f}"] for name, seconds in found["imports"]["imports"].items()]
        parts.append(markdown([Section(title="Imports", columns=["", "CPU s"], rows=rows, notes=[])]).strip("\n"))
    return "\n\n".join(parts)


def _curves(axis: str, values: Sequence[int], lines: Figures) -> str:
    rows = []
    for arm, one in lines.items():
        if arm.startswith(f"{axis},"):
            by_size = {int(point["size"]): point for point in one["points"]}
            cells = [
                f"{by_size[v]['seconds'] * 1e3:.1f}, {by_size[v]['peak'] / 1e6:.1f}" if v in by_size else "–"
                for v in values
            ]
            rows.append([arm.partition(", ")[2], *cells])
    section = Section(
        title=f"By {axis}", columns=["", *(f"{value:,}" for value in values)], rows=rows, notes=["CPU ms, peak MB."]
    )
    return markdown([section]).strip("\n")


GROWTH = Study(
    name="growth",
    purpose="Growth of time and memory by context, rows, blocks, vocabulary, processes; loading 1B parameters; imports",
    about=(
        "**Random weights and tokens**, one thread, forward passes in fp32 without a cache, width 64; 2 blocks, 8 "
        "rows of 256 tokens and a vocabulary of 256 where these do not grow (by context and by rows, one row; by "
        "vocabulary, two; by context, width 256). Decisions are those of training (top-k for Mixture-of-Depths; gates "
        "are soft and compute everything). Times are the least CPU seconds of some passes. *By processes*, training "
        "steps by FSDP2 of width 128 and 128 rows in all, by the process that spends most; messages (gloo) are part "
        "of its time. Exponents are fitted to the last three points of a curve (by processes, to those that have a "
        "core each) and stand beside those of the cost model's FLOPs, without the pairs that the causal mask hides, "
        "and of the bytes of the largest tensors that a pass holds at once (the stream and the MLP's, or the logits). "
        "Memory is the rise of the process's peak resident size. For checkpoints it is relative to the size of the "
        "weights, and pages of mapped files count."
    ),
    arms=arms,
    seeds={"laptop": (0,)},
    clock=measured,
    details=details,
    columns=(
        Column(key="exponents.seconds", title="exponent of time", format=".2f"),
        Column(key="exponents.flops", title="of FLOPs", format=".2f"),
        Column(key="apart.time", title="apart", format="+.2f"),
        Column(key="rate.first", title="GFLOP/s, smallest", format=".1f"),
        Column(key="rate.last", title="largest", format=".1f"),
        Column(key="exponents.peak", title="exponent of memory", format=".2f"),
        Column(key="exponents.bytes", title="of the largest tensors", format=".2f"),
        Column(key="peak_mb", title="peak, MB", format=",.1f"),
        Column(key="size_mb", title="weights, MB", format=",.0f"),
        Column(key="of_size", title="peak / weights", format=".2f"),
        Column(key="of_transformers", title="/ import transformers", format=".2f"),
        Column(key="of_class", title="/ import of a class", format=".2f"),
        Column(key="help", title="--help, CPU s", format=".3f"),
    ),
)
