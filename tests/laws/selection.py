"""The choice of quick cases for the laws: a small set per file that covers all pairs of mechanisms.

A law is tested on every composition of `laws.builders`, most of which repeat each other. The quick suite keeps a cover.
Every law keeps each mechanism of the table, PolyGLU, experts, neuron groups, learned positions (rotary ones hide a
shift) and its own other parameters once. The laws of a file together keep, each in whichever law comes cheapest: every
part (a mechanism at a site, an activation), every two mechanisms of one case (the outer one first), one in `PAIRS` of
the other pairs, and one in `VALUES` of the option values. These are chosen by the file's name, which also breaks ties,
so that different files keep different cases. Other tests that use the cases keep every part once. `make test-all` runs
the whole product.
"""

from __future__ import annotations

import itertools
import zlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from functools import cache
from typing import Any

import pytest

from laws.builders import Case

PAIRS, VALUES = 12, 24
# Parts of a decoder that no mechanism can see: one file in two keeps each, in one law.
UNSEEN = ("attention_window", "norm_placement", "parallel_residual")
SLOW_PARTS = {"neuron_groups": 4.0, "experts": 2.0}  # how many times as long as others


@cache
def drawn(one_in: int, *words: object) -> bool:
    """Return True for one in `one_in` of all words, the same words on every machine and in every process."""
    return zlib.crc32(" ".join(map(str, words)).encode()) % one_in == 0


def mechanisms(chosen: Case) -> list[str]:
    """Return the mechanisms of a case with their sites, such as "early_exit@block", the outermost first."""
    return list(dict.fromkeys(f"{entry['name']}@{entry.get('on', 'block')}" for entry in chosen.entries))


def parts(chosen: Case) -> list[str]:
    """Return what a case is composed of: its mechanisms, its activation and the names of its further options."""
    return [*mechanisms(chosen), chosen.activation, *(key for key, _ in chosen.more)]


def values(chosen: Case) -> Iterator[str]:
    """Yield every option of a case with its value as text, and a text if the case has one part only."""
    if len(chosen.entries) + len(chosen.more) + (chosen.activation != "silu") == 1:
        yield f"{'/'.join(parts(chosen))} alone"
    for entry in chosen.entries:
        yield from (f"{entry['name']} {key}={value}" for key, value in entry.items() if key != "name")
    for key, value in chosen.more:
        inner = value.items() if isinstance(value, dict) else [("", value)]
        yield from (f"{key} {name}={found}" for name, found in inner)


def goals(key: str, params: dict[str, Any]) -> frozenset[Hashable]:
    """Return what one run of a test covers: goals of its law, which contain the law's name, and goals of its file.

    key: the test's id. params: its parameters, of which one is a case.
    """
    chosen, law, file = _case(params), key.partition("[")[0], key.partition("::")[0]
    if shown := [name for name in UNSEEN if name in dict(chosen.more)]:
        return frozenset(name for name in shown if drawn(2, file, name))
    if "/laws/" not in file:
        return frozenset({*parts(chosen), *((law, entry["name"]) for entry in chosen.entries)})
    others = [f"{name}={value!r}" for name, value in params.items() if not isinstance(value, Case)]
    kinds = {entry["name"] for entry in chosen.entries} | {"polyglu", "positions", *SLOW_PARTS} & {*parts(chosen)}
    found: set[Hashable] = {(law, goal) for goal in (*kinds, *others)}
    found |= {*parts(chosen), *itertools.combinations(mechanisms(chosen), 2)}
    pairs = itertools.combinations((*parts(chosen), *others), 2)
    found |= {pair for pair in pairs if drawn(PAIRS, file, *pair)}
    return frozenset(found | {value for value in values(chosen) if drawn(VALUES, file, value)})


def cost(params: dict[str, Any]) -> float:
    """Return about how long one run of a test takes, in units of a run with a dense model."""
    return 2.0 + sum(SLOW_PARTS.get(part, 1.0) for part in parts(_case(params)))


def cover(file: str, runs: dict[str, dict[str, Any]]) -> set[str]:
    """Return a small set of a file's runs that cover what all cover, chosen greedily by what is new for its cost.

    file: name of the file, which decides ties. runs: the parameters of each run by its id.
    """
    held = {key: goals(key, params) for key, params in runs.items()}
    costs = {key: cost(params) for key, params in runs.items()}
    order = sorted(runs, key=lambda key: zlib.crc32(f"{file} {key}".encode()))
    missing = set().union(*held.values())
    chosen: set[str] = set()
    while missing:
        best = max(order, key=lambda key: len(held[key] & missing) / costs[key])
        chosen.add(best)
        missing -= held[best]
        order = [key for key in order if not held[key].isdisjoint(missing)]
    return chosen


def leave_out(items: Iterable[pytest.Item]) -> None:
    """Mark as slow the runs of laws that the quick suite leaves out, because what they cover is covered by others."""
    files: dict[str, dict[str, pytest.Function]] = defaultdict(dict)
    for item in items:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if any(isinstance(value, Case) for value in params.values()) and not item.get_closest_marker("slow"):
            files[item.nodeid.partition("::")[0]][item.nodeid] = item
    for file, runs in files.items():
        for key in runs.keys() - cover(file, {key: item.callspec.params for key, item in runs.items()}):
            runs[key].add_marker("slow")


def _case(params: dict[str, Any]) -> Case:
    return next(value for value in params.values() if isinstance(value, Case))
