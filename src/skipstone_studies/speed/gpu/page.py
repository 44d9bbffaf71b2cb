"""The page of the GPU study: a table of figures for each part, failed measurements, and the device that it ran on."""

from __future__ import annotations

import re
from collections.abc import Mapping

from skipstone.core.strict import PlainMapping
from skipstone.evaluate.tables import UNKNOWN, Section, markdown
from skipstone_studies.claims import ByArm
from skipstone_studies.speed.gpu.parts import PARTS

# key of a figure: (title, format). What follows an underscore and a number is a length of prompts.
TITLES = {
    "error": ("error", ".1e"),
    "tolerance": ("tolerance", ".0e"),
    "equal": ("equal", "yes"),
    "passed": ("passed", "d"),
    "failed": ("failed", "d"),
    "of": ("of these", ""),
    "reference_ms": ("reference, ms", ".2f"),
    "compiled_ms": ("compiled, ms", ".2f"),
    "triton_ms": ("Triton, ms", ".2f"),
    "dense_ms": ("dense, ms", ".2f"),
    "routed_ms": ("routed, ms", ".2f"),
    "swiglu_ms": ("SwiGLU, ms", ".2f"),
    "polyglu_ms": ("PolyGLU, ms", ".2f"),
    "dense_eager_ms": ("dense, eager, ms", ".2f"),
    "dense_graph_ms": ("dense, graph, ms", ".2f"),
    "routed_eager_ms": ("routed, eager, ms", ".2f"),
    "routed_graph_ms": ("routed, graph, ms", ".2f"),
    "ms": ("ms", ".1f"),
    "time": ("time", ".2f"),
    "flops": ("FLOPs", ".2f"),
    "speed": ("speed", ".2f"),
    "share": ("share", ".1%"),
    "saved": ("saved", ".2f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "tflops_per_second": ("TFLOP/s", ",.1f"),
    "mfu": ("MFU", ".1%"),
    "dense_mfu": ("MFU, dense", ".1%"),
    "routed_mfu": ("MFU, routed", ".1%"),
    "parameters": ("parameters", ",d"),
    "first_loss": ("first loss", ".4f"),
    "last_loss": ("last loss", ".4f"),
    "evaluated_loss": ("loss, evaluated", ".4f"),
    "pieces": ("pieces of text", "d"),
    "difference": ("difference", ".1e"),
    "peak_gb": ("peak, GB", ".1f"),
}
KINDS = {"dense": ("dense, {} tokens, ms", ".2f"), "adapted": ("{} tokens, ms", ".2f"), "speed": ("speed, {}", ".2f")}


def details(figures: ByArm) -> str:
    """Return the Markdown below the study's table: where the parts were run, a table for each, and what failed.

    figures: {part: {seed: figures}}, with the keys `device`, `products`, `measurements`, `failures` and others that
    `runner.measured` returns.
    """
    found = {arm: next(iter(seeds.values())) for arm, seeds in figures.items()}
    parts = [_where(found)]
    parts += [_table(arm, one) for arm, one in found.items() if one["measurements"]]
    failed = [
        f"* {arm}, {name}: `{_shown(text, '')}`" for arm, one in found.items() for name, text in one["failures"].items()
    ]
    parts.append("### What failed\n\n" + ("\n".join(failed) if failed else "Nothing."))
    return "\n\n".join(parts)


def _where(found: Mapping[str, PlainMapping]) -> str:
    devices = sorted({one["device"] for one in found.values()})
    missing = [name for name in PARTS if name not in found]
    if devices == ["cpu"]:
        text = "**Rehearsed on a CPU only, with tiny sizes; these figures say nothing about a GPU.**"
    else:
        products = sorted({one["products"] for one in found.values()})
        exact = "without TF32" if products == ["highest"] else f"with precision {', '.join(products)!r}"
        text = f"**Run on {', '.join(devices)}**; products of fp32 {exact}."
    return text + (f" Not run yet: {'; '.join(missing)}." if missing else "")


def _table(arm: str, figures: PlainMapping) -> str:
    rows = figures["measurements"]
    order = list(TITLES)
    keys = sorted({key for row in rows.values() for key in row}, key=_natural)
    keys.sort(key=lambda key: order.index(key) if key in order else len(order))
    columns = [_column(key) for key in keys]
    cells = [
        [name, *(_shown(row.get(key), form) for key, (_, form) in zip(keys, columns, strict=True))]
        for name, row in sorted(rows.items(), key=lambda item: _natural(item[0]))  # records sort their keys
    ]
    section = Section(title=arm, columns=["", *(title for title, _ in columns)], rows=cells, notes=[PARTS[arm].about])
    return markdown([section]).strip("\n")


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key for names, by which numbers inside of them are compared by value."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _column(key: str) -> tuple[str, str]:
    if key in TITLES:
        return TITLES[key]
    kind, _, length = key.removesuffix("_ms").partition("_")
    title, form = KINDS[kind]
    return title.format(length), form


def _shown(value: object, form: str) -> str:
    if value is None:
        return UNKNOWN
    if form == "yes":
        return "yes" if value else "**no**"
    if isinstance(value, str):
        return value.replace("|", "/").replace("`", "'") or UNKNOWN
    return format(value, form)
