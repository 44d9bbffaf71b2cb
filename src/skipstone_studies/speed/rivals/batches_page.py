"""The ways to decode several rows at a time that the study `decode_batches` times, and the tables of its page.

The ways are transformers, our model with weights in 32, 16, 8 or 4 bits, and llama.cpp. The tables have milliseconds of
a decoding step and tokens per second of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean

from skipstone.core.strict import PlainDict, PlainMapping
from skipstone.evaluate.tables import UNKNOWN, Section, markdown
from skipstone_studies.claims import ByArm

BASE = "transformers"  # the way by whose speed the others' is divided
# By key: the way, its options, and the way of llama.cpp beside which it is shown. What is to be changed in our model's
# configuration goes under "config".
WAYS: dict[str, PlainDict] = {
    BASE: {"way": "transformers"},
    "ours": {"way": "ours"},
    "float16": {"way": "float16"},
    "int8": {"way": "int8", "beside": "llama_q8_0"},
    "int4": {"way": "int4", "beside": "llama_file"},
    "int8_cache": {"way": "int8", "config": {"cache_format": "float16"}, "beside": "llama_q8_0"},
    "llama_q8_0": {"way": "llama.cpp", "format": "Q8_0"},
    "llama_file": {"way": "llama.cpp", "format": "as it is"},
}
TITLES = {
    BASE: "transformers, fp32",
    "ours": "ours, fp32",
    "float16": "16 bits",
    "int8": "int8",
    "int4": "4 bits",
    "int8_cache": "int8, fp16 cache",
    "llama_q8_0": "llama.cpp, Q8_0",
    "llama_file": "llama.cpp, the file",
}


def details(figures: ByArm) -> str:
    """Return the text and tables below the study's table: ms of steps, tokens/s of prompts, versions.

    figures: {arm: {seed: what `decode_batches.measured` returned}}.
    """
    found = {arm: next(iter(seeds.values())) for arm, seeds in figures.items()}
    steps = [one for arm, one in found.items() if not arm.startswith("prompt")]
    prompts = [one for arm, one in found.items() if arm.startswith("prompt")]
    parts = []
    if steps:
        rows = [[f"{one['rows']}", f"{one['tokens']:,}", *(_ms(one, way) for way in WAYS)] for one in steps]
        parts.append(_table("A decoding step, in ms", ["rows", "context"], rows))
    if prompts:
        rows = [[f"{one['tokens']:,}", *(_rate(one, way) for way in WAYS)] for one in prompts]
        parts.append(_table("Prompts, in tokens/s", ["tokens"], rows))
    return "\n\n".join([*parts, *_sentences(found.values())])


def _table(title: str, first: list[str], rows: list[list[str]]) -> str:
    columns = [*first, *TITLES.values()]
    return markdown([Section(title=title, columns=columns, rows=rows)]).strip("\n")


def _ms(one: PlainMapping, way: str) -> str:
    """Return median, least and greatest ms of a step; a dash if the way was not measured."""
    taken = one["ways"].get(way)
    if taken is None:
        return UNKNOWN
    middle, least, greatest = (f"{taken['seconds'][end] * 1e3:.1f}" for end in ("median", "min", "max"))
    return f"{middle} ({least} to {greatest})"


def _rate(one: PlainMapping, way: str) -> str:
    """Return median, least and greatest tokens/s of a prompt; a dash if the way was not measured."""
    taken = one["ways"].get(way)
    if taken is None:
        return UNKNOWN
    middle, least, greatest = (f"{one['tokens'] / taken['seconds'][end]:,.0f}" for end in ("median", "max", "min"))
    return f"{middle} ({least} to {greatest})"


def _sentences(found: Iterable[PlainMapping]) -> list[str]:
    """Return what the page says below the tables: CPU time, equal tokens, versions, and what was left out."""
    ones = list(found)
    ways = [taken for one in ones for taken in one["ways"].values()]
    busy = [taken["cpu"]["median"] / taken["seconds"]["median"] for taken in ways]
    text = [f"CPU time is {min(busy):.0%} to {max(busy):.0%} of the wall clock's (medians)."]
    same = {way: [one["ways"][way]["same"] for one in ones if "same" in one["ways"].get(way, {})] for way in TITLES}
    shares = [f"{TITLES[way]} {fmean(each):.1%}" for way, each in same.items() if each and way != BASE]
    if shares:
        text.append(f"Steps with the same likeliest token as transformers, a mean over arms: {', '.join(shares)}.")
    reasons = dict.fromkeys(
        f"{TITLES[way]}: not measured, {why}" for one in ones for way, why in one["left_out"].items()
    )
    told = dict.fromkeys(_versions(one["versions"]) for one in ones)
    return [" ".join(text), *([f"{'; '.join(reasons)}."] if reasons else []), "; and ".join(told) + "."]


def _versions(versions: Mapping[str, str]) -> str:
    numba = f"numba {versions['numba']}" if versions["numba"] else "Without numba"
    if not versions["llama_cpp"]:
        return numba
    return f"{numba}, llama-cpp-python {versions['llama_cpp']} (compiled for {versions['llama_cpp_for']})"
