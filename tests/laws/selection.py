"""The choice of quick cases for each law: a small set that covers all pairs of parts.

A law is tested on every composition of `laws.builders`, most of which repeat each other. The quick suite keeps a set
that covers every two parts that occur together in some case (mechanisms at their sites, the outer one first;
activations; experts; neuron groups; the law's other parameters). Pairs without two mechanisms are kept by one law in
`PAIRS`, option values by one in `VALUES`, chosen by the law's name, which also breaks ties, so that different laws keep
different cases. Other tests that use the cases keep every part once. `make test-all` runs the whole product.
"""

from __future__ import annotations

import itertools
import zlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import pytest

from laws.builders import Case

PAIRS, VALUES = 4, 12
# Parts of a decoder that no mechanism can see: one law in twice PAIRS keeps each.
UNSEEN = ("attention_window", "norm_placement", "parallel_residual")
SLOW_PARTS = {"neuron_groups": 4.0, "experts": 2.0}  # how many times as long as others


def drawn(one_in: int, *words: object) -> bool:
    """Depends on these words only, on every machine and in every process."""
    return zlib.crc32(" ".join(map(str, words)).encode()) % one_in == 0


def mechanisms(chosen: Case) -> list[str]:
    """At their sites, the outer one first."""
    return list(dict.fromkeys(f"{entry['name']}@{entry.get('on', 'block')}" for entry in chosen.entries))


def parts(chosen: Case) -> list[str]:
    """What a case is composed of."""
    return [*mechanisms(chosen), chosen.activation, *(key for key, _ in chosen.more)]


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
    chosen = _case(params)
    if shown := [key for key in UNSEEN if key in dict(chosen.more)]:
        return frozenset(key for key in shown if drawn(2 * PAIRS, law, key))
    found: set[Hashable] = {*parts(chosen)}
    if "/laws/" not in law:
        return frozenset(found)
    others = [f"{name}={value!r}" for name, value in params.items() if not isinstance(value, Case)]
    found |= {*itertools.combinations(mechanisms(chosen), 2), *others}
    pairs = itertools.combinations((*parts(chosen), *others), 2)
    found |= {pair for pair in pairs if drawn(PAIRS, law, *pair)}
    return frozenset(found | {value for value in values(chosen) if drawn(VALUES, law, value)})


def cost(params: dict[str, Any]) -> float:
    """Of one run, about, in runs of a dense model."""
    return 2.0 + sum(SLOW_PARTS.get(part, 1.0) for part in parts(_case(params)))


def cover(law: str, runs: dict[str, dict[str, Any]]) -> set[str]:
    """Greedily, by what is new for its cost, until nothing is missing; always the same for the same law."""
    order = sorted(runs, key=lambda key: zlib.crc32(f"{law} {key}".encode()))
    held = {key: goals(law, params) for key, params in runs.items()}
    missing = set().union(*held.values())
    chosen: set[str] = set()
    while missing:
        best = max(order, key=lambda key: len(held[key] & missing) / cost(runs[key]))
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
        for key in runs.keys() - cover(law, {key: item.callspec.params for key, item in runs.items()}):
            runs[key].add_marker("slow")


def _case(params: dict[str, Any]) -> Case:
    return next(value for value in params.values() if isinstance(value, Case))
