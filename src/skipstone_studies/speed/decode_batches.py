"""A study of the speed of decoding steps, by rows and by context, and of prompts: ours, transformers and llama.cpp.

An arm is one setting (so many rows after so many tokens, or a prompt of some length), and times all ways to compute it
in turns (a turn of all is a lap), so every ratio is of one process and one lap.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import pydoc_data.topics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipstone.core.strict import PlainDict
from skipstone.measure.speed import Lap, Task, take_turns
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone_studies.speed.decode_rivals import weights_of
from skipstone_studies.speed.interleaved import ratio, spread
from skipstone_studies.speed.rivals import batches_page
from skipstone_studies.speed.rivals.batches_page import BASE, TITLES, WAYS
from skipstone_studies.speed.rivals.by_candidates import theirs
from skipstone_studies.speed.rivals.contexts import Contexts, LlamaContexts, TorchContexts
from skipstone_studies.speed.rivals.engines import gguf
from skipstone_studies.speed.rivals.source import tokenizer
from skipstone_studies.study import Column, Figures, RecipeDict, Study

SOURCE = "SmolLM2-135M-Instruct"
ROWS, CONTEXT = (1, 2, 4, 8, 16), 32
CONTEXTS, TOGETHER = (1000, 2000, 4000), (4, 1000)  # the latter: rows and context of an arm that has many of both
PROMPTS = (128, 512, 1500)
STEP = {"kind": "step", "steps": 8, "laps": 5, "threads": 1}
PROMPT = {"kind": "prompt", "rows": 1, "steps": 0, "flash": True, "laps": 4, "threads": 1}
SMALL: PlainDict = {"source": "stories260K", "laps": 1}  # scale quick: no GGUF file, so llama.cpp has no part in it
PLAIN_FROM = 1000  # tokens of context from which llama.cpp's steps are faster without flash attention
LETTERS = 200_000  # of the text: some 50,000 tokens, of which all rows together read a tenth


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the settings of every measurement by its name: rows and context of a step, or the length of a prompt.

    Each is a dict that `measured` takes. scale: "laptop", or "quick" for a checkpoint of 260 K parameters, two numbers
    of rows and short contexts and prompts, without llama.cpp.
    """
    steps = [*((rows, CONTEXT) for rows in ROWS), *((1, context) for context in CONTEXTS), TOGETHER]
    prompts, common = list(PROMPTS), dict[str, Any](ways=WAYS, source=SOURCE)
    if scale == "quick":
        ours = {way: options for way, options in WAYS.items() if options["way"] != "llama.cpp"}
        steps, prompts, common = [(1, 4), (2, 4), (1, 100)], [16], {"ways": ours, **SMALL}
    found: dict[str, RecipeDict] = {}
    for rows, context in steps:
        size = {"rows": rows, "context": context, "flash": context < PLAIN_FROM}
        found[_named(rows, context)] = {**STEP, **size, **common}
    return {**found, **{f"prompt-{length}": {**PROMPT, "context": length, **common} for length in prompts}}


def _named(rows: int, context: int) -> str:
    """Return the name of the arm with so many rows after so many tokens; what it shares with others is left out."""
    if context <= CONTEXT:
        return f"rows-{rows}"
    return f"context-{context}" if rows == 1 else f"rows-{rows}-context-{context}"


def measured(recipe: RecipeDict) -> Figures:
    """Time decoding steps, or reading a prompt, by transformers, our model in several formats and llama.cpp, in turns.

    recipe: an entry of `arms`: "kind" ("step" or "prompt"), "source" (name of the checkpoint), "rows", "context"
    (tokens before the steps, or of the prompt), "steps" (decoding steps of a lap), "laps", "threads", "flash" (whether
    llama.cpp's attention is one kernel) and "ways" (the way and its options by key). Keys of the result: `rows` and
    `tokens` (the context); `ways`, for each by its key `seconds` (wall clock, of a step or a prompt) and `cpu` (the
    same of CPU time), `speed` (transformers' wall seconds divided by its own, lap by lap) and `beside` (the same for
    the way of llama.cpp that it is compared with, if any), each as {"median", "min", "max"} over laps, and `same`, the
    share of steps after which it finds the same token likeliest as transformers (absent for prompts); `left_out`, the
    reason for each way that could not be measured; `versions`, those of numba and llama.cpp, as `versions` returns
    them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe["threads"])
    try:
        ids_RT = text(recipe["source"], recipe["rows"], recipe["context"] + recipe["steps"])
        missing = _missing(recipe["ways"])
        for reason in dict.fromkeys(missing.values()):
            warnings.warn(f"some ways are left out: {reason}", stacklevel=2)
        with engines(recipe, missing) as found:
            ways = _timed(recipe, found, ids_RT)
    finally:
        torch.set_num_threads(threads)
    told = {"rows": recipe["rows"], "tokens": recipe["context"], "left_out": missing, "versions": versions()}
    return {**told, "ways": ways}


def _missing(ways: Mapping[str, PlainDict]) -> dict[str, str]:
    """Return the reason for each way that cannot be measured here, by its key."""
    if importlib.util.find_spec("llama_cpp") is not None:
        return {}
    needed = [way for way, options in ways.items() if options["way"] == "llama.cpp"]
    return dict.fromkeys(needed, "they need llama.cpp (pip install llama-cpp-python)")


@contextmanager
def engines(recipe: RecipeDict, left_out: Mapping[str, str]) -> Iterator[dict[str, Contexts]]:
    """Load the engine of every way to compute, and give them in a `with` block as {key of the way: engine}.

    At the end of the block, what llama.cpp holds is freed. recipe: as `measured` takes it. left_out: the keys of ways
    that are not loaded.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as open_until_the_end:
        found: dict[str, Contexts] = {}
        for way, options in recipe["ways"].items():
            if way in left_out:
                continue
            if options["way"] != "llama.cpp":
                found[way] = _torch(recipe["source"], options)
                continue
            file = gguf(recipe["source"], options["format"], Path(folder), recipe["threads"])
            held = recipe["context"] + recipe["steps"]
            other = LlamaContexts(file, recipe["rows"], held, recipe["threads"], recipe["flash"])
            open_until_the_end.callback(other.close)
            found[way] = other
        yield found


def _torch(name: str, options: PlainDict) -> TorchContexts:
    """Return the engine of transformers' model or ours, with the options of its configuration that a way names."""
    if options["way"] == "transformers":
        return TorchContexts(theirs(name))
    return TorchContexts(_ours(name, options["way"], tuple(sorted(options.get("config", {}).items()))))


@cache  # rounding takes longer than the steps of an arm
def _ours(name: str, way: str, changes: tuple[tuple[str, Any], ...]) -> SkipstoneForCausalLM:
    """Return our model, its weights as a way stores them; `changes` are names and values for its configuration."""
    model = weights_of(name, way)
    if not changes:
        return model
    model = copy.deepcopy(model)  # weights in fp32 are those of the source itself
    for field, value in changes:
        getattr(model.config, field)  # a name that it does not have is a mistake
        setattr(model.config, field, value)
    return model


def text(name: str, rows: int, length: int) -> Tensor:
    """Return the tokens that are read and decoded, int64 [rows, length]: rows from all over Python's own manual.

    name: the name of the checkpoint, whose tokenizer is used. rows, length: number of rows, and tokens of each.
    """
    manual = "\n\n".join(pydoc_data.topics.topics.values())[:LETTERS]
    ids = tokenizer(name)(manual, return_tensors="pt", verbose=False)["input_ids"][0]
    apart = (len(ids) - length) // rows
    return torch.stack([ids[row * apart : row * apart + length] for row in range(rows)])


def _timed(recipe: RecipeDict, found: Mapping[str, Contexts], ids_RT: Tensor) -> PlainDict:
    """Return the figures of every way, by its key. ids_RT: the prompts, and for steps what they continue with."""
    prompts_RT, fed_RS = ids_RT.split((recipe["context"], recipe["steps"]), dim=1)
    step = recipe["kind"] == "step"
    count = recipe["steps"] if step else 1
    cpu: dict[str, list[float]] = {way: [] for way in found}
    chosen: dict[str, Tensor] = {}

    def task(way: str, engine: Contexts) -> Task:
        def run() -> Tensor:
            return engine.steps(fed_RS) if step else engine.read(prompts_RT)

        def after(tokens: Tensor) -> None:
            chosen[way] = tokens
            if step:
                engine.back(recipe["steps"])

        if step:
            engine.read(prompts_RT)
        return _task(run, after, cpu[way], recipe["rows"] * (recipe["steps"] if step else recipe["context"]))

    rates = take_turns({way: task(way, engine) for way, engine in found.items()}, recipe["laps"])
    wall = {way: [lap.seconds / count for lap in rate.laps] for way, rate in rates.items()}
    return {way: _figures(recipe, way, wall, cpu[way][1:], count, chosen if step else {}) for way in found}


def _task(run: Callable[[], Tensor], after: Callable[[Tensor], None], cpu: list[float], tokens: int) -> Task:
    """Return a function that times `run` by the wall clock, notes its CPU seconds in `cpu`, and then calls `after`."""

    def lap() -> Lap:
        wall, spent = time.perf_counter(), time.process_time()
        found = run()
        seconds = time.perf_counter() - wall
        cpu.append(time.process_time() - spent)
        after(found)
        return Lap(tokens=tokens, seconds=seconds, joules=None)

    return lap


def _figures(
    recipe: RecipeDict,
    way: str,
    wall: Mapping[str, list[float]],
    cpu: list[float],
    count: int,
    chosen: Mapping[str, Tensor],
) -> PlainDict:
    """Return the figures of one way.

    wall: the wall seconds of a step or prompt in each lap, by way. cpu: the CPU seconds of each lap of this way, which
    has `count` steps. chosen: the likeliest tokens after each step, by way; empty for prompts.
    """
    beside = recipe["ways"][way].get("beside")
    return {
        "seconds": spread(wall[way]),
        "cpu": spread([seconds / count for seconds in cpu]),
        **({"speed": ratio(wall[BASE], wall[way])} if way != BASE else {}),
        **({"beside": ratio(wall[beside], wall[way])} if beside in wall else {}),
        **({"same": float((chosen[way] == chosen[BASE]).float().mean())} if chosen else {}),
    }


def versions() -> dict[str, str]:
    """Return {"numba", "llama_cpp"}, versions of numba and of llama.cpp's bindings, and "llama_cpp_for".

    The latter names the processor features that llama.cpp was compiled for. What is not installed is "".
    """
    found = {}
    for key, package in (("numba", "numba"), ("llama_cpp", "llama-cpp-python")):
        try:
            found[key] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[key] = ""
    if importlib.util.find_spec("llama_cpp") is None:
        return {**found, "llama_cpp_for": ""}
    import llama_cpp  # type: ignore[import-not-found]

    told = llama_cpp.llama_print_system_info().decode().partition(":")[2]
    parts = [part.partition("=") for part in told.split("|")]
    return {**found, "llama_cpp_for": ", ".join(name.strip() for name, _, on in parts if on.strip() == "1")}


DECODE_BATCHES = Study(
    name="decode_batches",
    purpose="Batches, long contexts and prompts on a CPU: ours beside transformers and llama.cpp",
    about=(
        f"The source, {SOURCE}, is a GGUF file of four-bit blocks (Q4_1). Its weights are restored to fp32 "
        "(transformers and ours), rounded to fp16 (*16 bits*) or int8, or multiplied as the file has them (*4 bits*; "
        "*llama.cpp, the file*); llama.cpp also writes them as Q8_0. Its bindings were built from source by pip. One "
        "thread. An arm is one setting, and all ways to compute it are timed in turns in one process: `rows-N` is a "
        f"decoding step of N rows after {CONTEXT} tokens each, `context-N` one of a single row after N tokens, "
        "`rows-4-context-1000` one of four rows after 1,000 tokens each, `prompt-N` a pass over N tokens up to the "
        f"first new one. A lap has {STEP['steps']} steps; they continue the text with its own tokens, find the "
        "likeliest token after each, and are then cut off the cache. The text is Python's manual, each row another "
        "part of it. *Speed* is relative to transformers' Llama in fp32, by the wall clock and lap by lap: medians of "
        f"{STEP['laps']} laps ({PROMPT['laps']} for prompts), with the least and the greatest. The last columns "
        "are relative to llama.cpp instead. transformers and ours store keys and values in fp32 unless a way says "
        "otherwise, llama.cpp in F16, its default. It decodes all rows in one call, each row a sequence with a buffer "
        "of its own (`n_ctx`: the tokens of a row rounded up to 256, times the rows), with flash attention except in "
        f"steps after {PLAIN_FROM:,} tokens or more, which are faster without. The model was made for up to 8,192 "
        "tokens."
    ),
    arms=arms,
    seeds={"laptop": (0,), "quick": (0,)},
    clock=measured,
    details=batches_page.details,
    columns=(
        *(Column(key=f"ways.{way}.speed", title=TITLES[way], format=".2f", spread=True) for way in WAYS if way != BASE),
        *(
            Column(
                key=f"ways.{way}.beside",
                title=f"{TITLES[way]} / {TITLES[options['beside']]}",
                format=".2f",
                spread=True,
            )
            for way, options in WAYS.items()
            if "beside" in options
        ),
    ),
)
