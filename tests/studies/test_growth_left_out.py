"""What the page on growth says beside the FLOPs: exponents that a fixed cost or a mixture explains are told so."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from skipstone_studies.speed.growth import left_out
from skipstone_studies.speed.growth.curves import with_exponents
from skipstone_studies.study import Figures

NEURONS = {64: 192, 256: 704}


def curve(
    sizes: list[int], tokens: Callable[[int], int], width: int, seconds: Callable[[float, int], float]
) -> Figures:
    points = []
    for size in sizes:
        flops, count = 1e6 * tokens(size) * (1 + size / 1e4), tokens(size)
        largest = 4.0 * count * (2 * width + 3 * NEURONS[width])
        told = {"size": float(size), "flops": flops, "bytes": largest, "peak": largest}
        points.append({**told, "seconds": seconds(flops, count)})
    return with_exponents(points)


def lines(fixed: float, mixing: float) -> dict[str, Figures]:
    def dense(flops: float, tokens: int) -> float:
        return fixed + flops / 2e10

    def by_rows(size: int) -> int:
        return 256 * size

    def polyglu(width: int) -> Callable[[float, int], float]:
        return lambda flops, tokens: flops / 2e10 + mixing * 2 * tokens * NEURONS[width]

    rows, context = [1, 2, 4, 8, 16, 32, 64], [256, 512, 1024, 2048, 4096, 8192]
    return {
        "rows, dense": curve(rows, by_rows, 64, dense),
        "rows, polyglu": curve(rows, by_rows, 64, lambda f, t: fixed + polyglu(64)(f, t)),
        "context, dense": curve(context, int, 256, lambda f, t: f / 2e10),
        "context, polyglu": curve(context, int, 256, polyglu(256)),
    }


def test_a_fixed_cost_and_a_mixture_are_found_and_explain_the_exponents() -> None:
    given = lines(fixed=0.1, mixing=2.5e-8)
    assert left_out.mixing(given) == pytest.approx(2.5e-8)
    assert given["rows, dense"]["apart"]["time"] < -0.05
    assert given["context, polyglu"]["apart"]["time"] < -0.05
    found = left_out.apart(given)
    assert set(found) == {"rows, dense", "rows, polyglu", "context, polyglu"}
    assert max(map(abs, found.values())) < 0.005
    assert "So 3 of the 3 curves are as arithmetic expects" in left_out.text(given, 0.05)


def test_what_they_do_not_explain_stays_apart() -> None:
    given = lines(fixed=0.1, mixing=2.5e-8)
    points = [{**p, "seconds": p["seconds"] * p["size"] ** 0.2} for p in given["context, polyglu"]["points"]]
    given["context, polyglu"] = with_exponents(points)
    assert left_out.apart(given)["context, polyglu"] == pytest.approx(0.2, abs=0.01)
    assert "not so context, polyglu" in left_out.text(given, 0.05)
    assert left_out.text({"context, dense": given["context, dense"]}, 0.05) == ""
