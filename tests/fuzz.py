"""Hostile input to everything that reads a user's or a stranger's text: errors in one line, no traceback, no hang.

    python tests/fuzz.py --inputs 1000          # so many inputs to each target, by mutation of valid ones
    python tests/fuzz.py --hypothesis 500       # so many to each target, drawn by hypothesis

Every target may return, or raise ValueError or OSError with a message; anything else, an input that takes longer than
SLOW seconds, and growth of the process beyond MEMORY is a fault. The inputs are counted where they are used.
`fuzz_coverage.py` feeds the parsers with input that is guided by coverage.
"""

from __future__ import annotations

import copy
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from attacks import markdown, memory, parser_of

SLOW = 2.0  # seconds of CPU time
MEMORY = 512  # MiB by which the process may grow over all inputs to one target
ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**30,
    -(10**30),
    1e308,
    -1e308,
    float("inf"),
    float("nan"),
    0.5,
    1e-300,
    "",
    " ",
    "a",
    "\0",
    "../..",
    "/etc/passwd",
    "a/b",
    "<script>alert(1)</script>",
    "\"'`&<>",
    "\ud800",
    "\u202e",
    "x" * 5000,
    "${model}",
    "*a",
    "!!python/object:x",
    "1e3",
    "nan",
    [],
    {},
    [[]],
    [0],
    {"": 0},
    {"name": "x"},
    [None] * 50,
]


PIECES = ("{", "}", "[" * 9, ":", "\n", "- ", "*a ", "&a ", "#", "\0", "\ud800", "9" * 30, "<i>", ".", "<img src=x>")
NEAR = ("", "x", "é", ".", "/", "\0", "<b>", "'", " ")


@dataclass
class Target:
    """Something that reads input, with its outcomes so far.

    seeds: valid inputs, plain values or texts. use: reads one of them, mutated. share: number of its inputs relative to
    the fastest targets'. faults: a line for each fault. counts: inputs by how they ended, and MiB by which the process
    grew.
    """

    name: str
    seeds: Sequence[Any]
    use: Callable[[Any], object]
    share: float = 1.0  # of the inputs that the fastest targets get
    faults: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def mutated(value: Any, chance: random.Random) -> Any:
    """Return a copy of a plain value, text or bytes, in which a few places are changed."""
    if isinstance(value, str | bytes):
        return mutated_text(value, chance)
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        value = _changed(value, chance)
    return value


def _changed(value: Any, chance: random.Random) -> Any:
    places = list(_places(value))
    if not places or chance.random() < 0.02:
        return copy.deepcopy(chance.choice(ODD))
    holder, key = chance.choice(places)
    act = chance.randrange(6)
    if act == 0 and isinstance(holder, dict):
        del holder[key]
    elif act == 1 and isinstance(holder, dict):
        holder[_near(str(key), chance)] = holder.pop(key)
    elif act == 2:
        other, name = chance.choice(places)
        holder[key] = copy.deepcopy(other[name])
    elif act == 3 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        holder[key] = holder[key] * chance.choice((-1, 0, 0.5, 2, 10, 1e9, 1e30))
    elif act == 4 and isinstance(holder[key], str):
        holder[key] = _near(holder[key], chance)
    else:
        holder[key] = copy.deepcopy(chance.choice(ODD))
    return value


def _places(value: Any) -> Any:
    for key in range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else ():
        yield value, key
        yield from _places(value[key])


def _near(text: str, chance: random.Random) -> str:
    place = chance.randint(0, len(text))
    return text[:place] + chance.choice(NEAR) + text[place + chance.randint(0, 2) :]


def mutated_text(text: Any, chance: random.Random) -> Any:
    """Return a text or bytes in which a few pieces are changed, cut out, repeated or inserted."""
    for _ in range(chance.choice((1, 1, 2, 4))):
        a, b = sorted((chance.randint(0, len(text)), chance.randint(0, len(text))))
        act = chance.randrange(5)
        if act == 0:
            text = text[:a] + text[min(b, a + 8) :]
        elif act == 1:
            text = text[:b] + text[a:b] * chance.choice((1, 2, 50)) + text[b:]
        elif act == 2:
            text = text[:a]
        elif isinstance(text, bytes):
            text = text[:a] + bytes(chance.randrange(256) for _ in range(chance.randint(1, 4))) + text[a + 1 :]
        else:
            text = text[:a] + chance.choice(PIECES) + text[a + 1 :]
    return text[:100_000]


def fed(target: Target, value: Any) -> None:
    """Give one input to a target, and note how that ended."""
    began = time.process_time()
    try:
        target.use(value)
        target.counts["taken"] += 1
    except (ValueError, OSError) as error:
        target.counts["refused"] += 1
        if not str(error).strip():
            target.faults.append(f"{target.name}: an error without a message: {value!r:.300}")
    except Exception:
        target.counts["traceback"] += 1
        target.faults.append(f"{target.name}: {traceback.format_exc(limit=-3)}\n    {value!r:.300}")
    if time.process_time() - began > SLOW:
        target.counts["slow"] += 1
        target.faults.append(f"{target.name}: {time.process_time() - began:.1f} s: {value!r:.300}")


def mebibytes() -> float:
    """Return the largest memory that this process has used so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def attack(target: Target, inputs: int, seed: int = 0) -> None:
    """Feed a target its seeds, and then `inputs` times its share mutations of them."""
    chance = random.Random(f"{target.name} {seed}")
    for value in target.seeds:
        fed(target, copy.deepcopy(value))
    before = mebibytes()
    for _ in range(max(1, int(inputs * target.share))):
        fed(target, mutated(chance.choice(target.seeds), chance))
    grown = mebibytes() - before
    target.counts["MiB"] = max(target.counts["MiB"], round(grown))
    if grown > MEMORY:
        target.faults.append(f"{target.name}: the process grew by {grown:.0f} MiB")


def drawn(target: Target, inputs: int) -> None:
    """Feed a target with what hypothesis draws: any plain value, or a seed with one of its values replaced."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    text = st.text(max_size=30)
    leaf = st.none() | st.booleans() | st.integers() | st.floats() | text | st.sampled_from(ODD)
    plain = st.recursive(leaf, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4))
    texts = isinstance(target.seeds[0], str | bytes)

    @settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(range(len(target.seeds))), st.integers(0, 10_000), plain, st.text(), st.binary())
    def feed(which: int, place: int, value: Any, word: str, raw: bytes) -> None:
        seed = copy.deepcopy(target.seeds[which])
        if texts:
            part: Any = raw if isinstance(seed, bytes) else word
            fed(target, seed[: place % (len(seed) + 1)] + part + seed[place % (len(seed) + 1) :])
            return
        places = list(_places(seed))
        if not places or place % 7 == 0:
            fed(target, value)
            return
        holder, key = places[place % len(places)]
        holder[key] = value
        fed(target, seed)

    feed()


class Tags(HTMLParser):
    """A parser that lists the elements of a page, each with the names of its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))


def table(targets: Sequence[Target]) -> str:
    """Return a Markdown table of how many inputs each target got, and how they ended."""
    ends = ("taken", "refused", "traceback", "slow", "MiB")
    rows = [[t.name, sum(t.counts[end] for end in ends[:3]), *(f"{t.counts[end]:,}" for end in ends)] for t in targets]
    total = ["**all**", f"{sum(row[1] for row in rows):,}", *[""] * 5]
    return markdown(["target", "inputs", *ends[:4], "grew by MiB"], [*rows, total])


def main(arguments: Sequence[str] | None = None) -> int:
    from fuzz_targets import targets

    parser = parser_of(__doc__)
    parser.add_argument("names", nargs="*", metavar="TARGET")
    parser.add_argument("--inputs", type=int, default=0)
    parser.add_argument("--hypothesis", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="skipstone-fuzz-", dir=memory()) as folder:
        chosen = [t for t in targets(Path(folder)) if not options.names or t.name in options.names]
        for target in chosen:
            if options.inputs:
                attack(target, options.inputs, options.seed)
            if options.hypothesis:
                drawn(target, options.hypothesis)
            for fault in target.faults[:3]:
                sys.stdout.write(f"{fault}\n")
            sys.stdout.write(f"{target.name}: {dict(target.counts)}\n")
            sys.stdout.flush()
    sys.stdout.write(table(chosen))
    return sum(len(target.faults) for target in chosen)


if __name__ == "__main__":
    sys.exit(min(main(), 100))
