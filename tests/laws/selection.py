"""Which cases of a law are quick: few that hold every pair, chosen anew for every law.

A law is tried on every composition of `laws.builders`; most of them repeat each other. The quick suite keeps a cover:
every two parts that some case has together (mechanisms at their sites, the outer one first; activations; experts;
groups of neurons; the law's other parameters). Every option value is kept by one law in `SHARE`, drawn by the law's
name, and ties are broken by it, too: different laws keep different cases. `make test-all` runs the whole product.
"""

from __future__ import annotations

import itertools
import zlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import pytest

from laws.builders import Case

SHARE = 3


def drawn(*words: object) -> int:
    """A number that depends on these words only, on every machine and in every process."""
    return zlib.crc32(" ".join(map(str, words)).encode())


def parts(chosen: Case) -> list[str]:
    """What a case is composed of, outer mechanisms first."""
    names = [f"{entry['name']}@{entry.get('on', 'block')}" for entry in chosen.entries]
    return [*dict.fromkeys(names), chosen.activation, *(key for key, _ in chosen.more)]


def values(chosen: Case) -> Iterator[str]:
    """Every option of a case with its value, and whether a part stands alone."""
    if len(chosen.entries) + len(chosen.more) + (chosen.activation != "silu") == 1:
        yield f"{'/'.join(parts(chosen))} alone"
    for entry in chosen.entries:
        yield from (f"{entry['name']} {key}={value}" for key, value in entry.items() if key != "name")
    for key, value in chosen.more:
        inner = value.items() if isinstance(value, dict) else [("", value)]
        yield from (f"{key} {name}={found}" for name, found in inner)


def goals(law: str, params: dict[str, Any]) -> frozenset[Hashable]:
    """What one run of a law is there for."""
    [chosen] = [value for value in params.values() if isinstance(value, Case)]
    others = [f"{name}={value!r}" for name, value in params.items() if not isinstance(value, Case)]
    pairs = itertools.combinations((*parts(chosen), *others), 2)
    return frozenset((*pairs, *parts(chosen), *(v for v in values(chosen) if drawn(law, v) % SHARE == 0)))


def cover(law: str, held: dict[str, frozenset[Hashable]], cost: dict[str, float]) -> set[str]:
    """Greedily, by what is new for its cost, until nothing is missing; always the same for the same law."""
    order = sorted(held, key=lambda key: drawn(law, key))
    missing = set().union(*held.values())
    chosen: set[str] = set()
    while missing:
        best = max(order, key=lambda key: len(held[key] & missing) / cost[key])
        chosen.add(best)
        missing -= held[best]
    return chosen


def leave_out(items: Iterable[pytest.Item]) -> None:
    """Mark as slow what the quick suite does without: runs of a law over cases that others cover."""
    laws: dict[str, dict[str, pytest.Function]] = defaultdict(dict)
    for item in items:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if any(isinstance(value, Case) for value in params.values()):
            laws[item.nodeid.partition("[")[0]][item.nodeid] = item
    for law, runs in laws.items():
        held = {key: goals(law, item.callspec.params) for key, item in runs.items()}
        cost = {key: 2.0 + len(parts(_case(item))) for key, item in runs.items()}
        for key in runs.keys() - cover(law, held, cost):
            runs[key].add_marker("slow")


def _case(item: pytest.Function) -> Case:
    return next(value for value in item.callspec.params.values() if isinstance(value, Case))
