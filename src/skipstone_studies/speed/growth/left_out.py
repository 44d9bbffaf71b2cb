"""The time that a pass takes beyond its FLOPs: a fixed time of each pass, and PolyGLU's mixing of activations.

Both are estimated from cost curves (the time of a pass over one size of the model or its input): the fixed time from a
curve's first two points, the mixing from PolyGLU's curve by number of rows beside the dense model's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from skipstone_studies.speed.growth.curves import LAST, MODELS, SIZE, SIZES, exponent
from skipstone_studies.study import Figures

Points = Sequence[Mapping[str, float]]


def apart(lines: Mapping[str, Figures]) -> dict[str, float]:
    """Return the measured exponent of time minus the expected one, {arm: difference}, for some cost curves.

    A cost curve is the time of a pass over one size; an exponent is its slope in logarithms over the last points. In
    the curves by rows, the expected time is a fixed time of each pass, which follows from the first two points, plus
    the FLOPs at a constant rate. In PolyGLU's curve by context, it is the FLOPs at a constant rate plus the mixing of
    activations at the cost that `mixing` finds. Other curves are absent from the result. lines: the figures of the
    curves by arm (compared recipe), with `points`, `exponents`, `rate` and others.
    """
    found = {}
    for arm, one in lines.items():
        points = one["points"]
        if arm.startswith("rows,") and len(points) >= LAST + 2:
            fixed, second = _line(points[0], points[1])
            expected = [fixed + point["flops"] * second for point in points[-LAST:]]
        elif arm == "context, polyglu" and "context, dense" in lines and (each := mixing(lines)) is not None:
            flops = lines["context, dense"]["rate"]["last"] * 1e9
            width = SIZES["context"]["width"]
            expected = [p["flops"] / flops + each * _mixed(p, p["size"], width) for p in points[-LAST:]]
        else:
            continue
        ends = points[-LAST:]
        found[arm] = one["exponents"]["seconds"] - exponent([point["size"] for point in ends], expected)
    return found


def mixing(lines: Mapping[str, Figures]) -> float | None:
    """Return the seconds that PolyGLU's mixture takes for a neuron and token, from the cost curves by rows.

    The seconds are those at the largest number of rows: PolyGLU's minus the dense model's, minus the time that
    PolyGLU's additional FLOPs take at the dense model's rate. None if one of the two curves is missing. lines: the
    figures of the cost curves (time over one size) by arm (compared recipe), with `points` and others.
    """
    if not {"rows, polyglu", "rows, dense"} <= set(lines):
        return None
    dense, mixed = (lines[f"rows, {name}"]["points"][-1] for name in ("dense", "polyglu"))
    rate = dense["flops"] / dense["seconds"]
    more = mixed["seconds"] - dense["seconds"] - (mixed["flops"] - dense["flops"]) / rate
    return float(more / _mixed(mixed, mixed["size"] * SIZE["context"], SIZE["width"]))


def text(lines: Mapping[str, Figures], within: float) -> str:
    """Return a section of the page on the time of passes that their FLOPs do not explain; "" if no curve shows it.

    lines: the figures of the cost curves (time over one size) by arm (compared recipe), with `points`, `exponents` and
    others. within: largest difference between measured and expected exponent that counts as agreement.
    """
    found, parts = apart(lines), []
    if rows := [value for arm, value in found.items() if arm.startswith("rows,")]:
        parts.append(
            "*By rows*, a pass also costs what does not grow, the calls of its operations. With the fixed seconds and "
            f"the rate that 1 and 2 rows tell, the exponents of the last points are {_span(rows)} apart from expected."
        )
    if "context, polyglu" in found:
        each = mixing(lines)
        assert each is not None  # or `apart` would not have it
        parts.append(
            f"*PolyGLU by context* also mixes activations, {each * 1e9:.0f} ns for each neuron and token by its curve "
            f"by rows beside dense. With that at every length, it is {found['context, polyglu']:+.2f} apart."
        )
    if steps := _steps(lines, "processes"):
        parts.append(
            "*By processes*, exponents are fitted to as many processes as the machine has cores, which the last line "
            f"of this page states. From 2 to 4 processes, they are {_span([pair[-1] for pair in steps])} apart: a CPU "
            "second presumably does less where processes share cores."
        )
    if not parts:
        return ""
    beyond = [arm for arm, one in lines.items() if abs(one["apart"]["time"]) > within]
    known = [arm for arm in beyond if abs(found.get(arm, math.inf)) <= within]
    told = f"So {len(known)} of the {len(beyond)} curves are as arithmetic expects, once all their work is counted"
    rest = [arm for arm in beyond if arm not in known]
    end = f"; not so {'; '.join(rest)}, whose conditions change from point to point." if rest else "."
    return "### What the FLOPs leave out\n\n" + " ".join(parts) + f" {told}{end}"


def _line(one: Mapping[str, float], other: Mapping[str, float]) -> tuple[float, float]:
    """Return the seconds at no FLOPs, and for each FLOP, of the line through two points."""
    slope = (other["seconds"] - one["seconds"]) / (other["flops"] - one["flops"])
    return one["seconds"] - slope * one["flops"], slope


def _mixed(point: Mapping[str, float], tokens: float, width: int) -> float:
    """Return the neurons that PolyGLU mixes in a pass, over tokens and blocks; `bytes` of the point tells their number.

    The largest tensors of a pass by rows or context are the stream, twice, and three of the MLP.
    """
    neurons = (point["bytes"] / 4 / tokens - 2 * width) / 3
    return float(SIZE["blocks"] * tokens * neurons)


def _steps(lines: Mapping[str, Figures], axis: str) -> list[list[float]]:
    """Return, for each curve along an axis, by how much the exponents of time and FLOPs differ from point to point."""
    found = []
    for model in MODELS:
        points = lines.get(f"{axis}, {model}", {}).get("points", [])
        pairs = itertools.pairwise(points)
        rates = [(a["flops"] / a["seconds"], b["flops"] / b["seconds"], b["size"] / a["size"]) for a, b in pairs]
        if len(rates) > 1:
            found.append([-math.log(b / a) / math.log(grown) for a, b, grown in rates])
    return found


def _span(values: Sequence[float]) -> str:
    return f"{min(values):+.2f} to {max(values):+.2f}"
