"""Studies of ways to decode one row on a CPU with less work: speed, and how far predictions are from the checkpoint's.

The checkpoint as it is, whose decoding they make cheaper, is called the source. The ways are other weight formats, a
head that computes few exact logits, drafts, fewer neurons or blocks, transformers and llama.cpp.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from skipstone.measure.speed import take_turns
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.pretrained import four_bit_rows
from skipstone.model.quantise import quantise
from skipstone_studies.adapting import source_path
from skipstone_studies.speed.interleaved import ratio
from skipstone_studies.speed.rivals import thin
from skipstone_studies.speed.rivals.by_candidates import by_candidates, bytes_read, logits_of_steps, theirs
from skipstone_studies.speed.rivals.engines import Drafted, Engine, LlamaCpp, PromptLookup, Torch, llama, torchao
from skipstone_studies.speed.rivals.source import LENGTH, ROWS, Logits, distance, rows, source
from skipstone_studies.study import Column, Figures, RecipeDict, Study

SOURCE = "SmolLM2-135M-Instruct"
STEPS = {"prompt": 32, "new": 16, "turns": 3, "threads": 1}
LONGER = {"prompt": 64, "new": 64}  # the number of drafted tokens is learned within a text
HEAD = {"candidates": 8192, "directions": 256}
WAYS: dict[str, RecipeDict] = {
    "ours, int8": {"way": "int8"},
    "ours, int8, head by candidates": {"way": "candidates", "weights": "int8", **HEAD},
    "llama.cpp, Q8_0": {"way": "llama.cpp", "format": "Q8_0"},
    "ours, the file's four bits": {"way": "int4"},
    "llama.cpp, the file": {"way": "llama.cpp", "format": "as it is"},
    "ours, fp32": {"way": "ours"},
    "ours, fp32, head by candidates": {"way": "candidates", "weights": "float", **HEAD},
    "ours, 16 bits": {"way": "float16"},
    "llama.cpp, F16": {"way": "llama.cpp", "format": "F16"},
    "transformers, bf16": {"way": "bf16"},
    "ours, int8, draft lookup": {"way": "drafted", "draft": "lookup", **LONGER},
    "ours, int8, draft exit": {"way": "drafted", "draft": "exit", **LONGER},
    "ours, int8, draft skip": {"way": "drafted", "draft": "skip", **LONGER},
    "ours, int8, no draft": {"way": "int8", **LONGER},
    "ours, 16 bits, draft lookup": {"way": "drafted", "draft": "lookup", "weights": "float16", **LONGER},
    "ours, 16 bits, draft int8": {"way": "drafted", "draft": "int8", "weights": "float16", **LONGER},
    "ours, 16 bits, no draft": {"way": "float16", **LONGER},
    "ours, fp32, draft lookup": {"way": "drafted", "draft": "lookup", "weights": "float", **LONGER},
    "ours, fp32, draft int8": {"way": "drafted", "draft": "int8", "weights": "float", **LONGER},
    "ours, fp32, draft exit": {"way": "drafted", "draft": "exit", "weights": "float", **LONGER},
    "ours, fp32, no draft": {"way": "ours", **LONGER},
    "transformers, prompt lookup": {"way": "lookup", "count": 4, **LONGER},
    "ours, int8, two threads": {"way": "int8", "threads": 2},
    "llama.cpp, Q8_0, two threads": {"way": "llama.cpp", "format": "Q8_0", "threads": 2},
    "ours, the file's four bits, two threads": {"way": "int4", "threads": 2},
    "llama.cpp, the file, two threads": {"way": "llama.cpp", "format": "as it is", "threads": 2},
    "ours, 16 bits, two threads": {"way": "float16", "threads": 2},
    "llama.cpp, F16, two threads": {"way": "llama.cpp", "format": "F16", "threads": 2},
    "ours, fp32, two threads": {"way": "ours", "threads": 2},
    "torchao, int8": {"way": "torchao", "bits": 8},
    "torchao, int4": {"way": "torchao", "bits": 4},
    "TEAL, 25 %": {"way": "teal", "sparsity": 0.25},
    "CATS, 30 %": {"way": "cats", "sparsity": 0.3},
    "head by candidates, 256 directions": {"way": "previewed", "directions": 256, "exact": 2048},
    "10 % of the neurons removed": {"way": "narrower", "share": 0.1},
    "one block left out": {"way": "shorter", "blocks": 1},
    "TEAL, 40 %": {"way": "teal", "sparsity": 0.4},
    "head by candidates, 128 directions": {"way": "previewed", "directions": 128, "exact": 2048},
}
GEMMA = "gemma-3-270m"
WAYS_OF_GEMMA: dict[str, RecipeDict] = {
    "ours, int8": {"way": "int8"},
    "ours, the file's four bits": {"way": "int4"},
    "ours, int8, head by 16,384 candidates": {"way": "candidates", "weights": "int8", **HEAD, "candidates": 16384},
    "ours, int8, head by 32,768 candidates": {"way": "candidates", "weights": "int8", **HEAD, "candidates": 32768},
    "llama.cpp, Q8_0": {"way": "llama.cpp", "format": "Q8_0"},
    "llama.cpp, the file": {"way": "llama.cpp", "format": "as it is"},
    "ours, 16 bits": {"way": "float16"},
    "llama.cpp, F16": {"way": "llama.cpp", "format": "F16"},
    "transformers, bf16": {"way": "bf16"},
    "ours, fp32": {"way": "ours"},
    "ours, fp32, head by 16,384 candidates": {"way": "candidates", "weights": "float", **HEAD, "candidates": 16384},
}
LOSSLESS = ("ours", "drafted", "lookup")  # of what they start from: their text is that of the same weights without
THIN: dict[str, Callable[..., thin.Way]] = {"teal": thin.teal, "cats": thin.cats, "previewed": thin.previewed}
SMALLER: dict[str, Callable[..., SkipstoneForCausalLM]] = {"narrower": thin.narrower, "shorter": thin.shorter}


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the settings of every measurement by its name: one for each way to decode SmolLM2-135M-Instruct.

    Each is a dict that `measured` takes. scale: not used.
    """
    return {arm: {"source": SOURCE, **STEPS, **recipe} for arm, recipe in WAYS.items()}


def arms_of_gemma(scale: str) -> dict[str, RecipeDict]:
    """Return the settings of every measurement by its name: one for each way to decode Gemma 3 from its GGUF file.

    Each is a dict that `measured` takes. The weights in the file have four bits. scale: not used.
    """
    return {arm: {"source": GEMMA, **STEPS, **recipe} for arm, recipe in WAYS_OF_GEMMA.items()}


def measured(recipe: RecipeDict) -> Figures:
    """Measure one way to decode a checkpoint with less work.

    recipe: an entry of `arms` or `arms_of_gemma`, with the keys "way", "source" (name of the checkpoint), "prompt" and
    "new" (tokens), "turns" (number of timings), "threads", and options of the way. Keys of the result: `distance`, how
    far its predictions are from the source's: {title of a text: {"kl", "agreement", "perplexity", "increase"}, "worst":
    the largest KL}, and {} for ways that change no prediction; `bytes` of weights that decoding one token reads;
    `share`, these bytes divided by those of the source in fp32; `speed`, tokens per second divided by those of
    transformers' model in fp32, as {"median", "min", "max"} over timings, absent for ways that only compute what
    leaving out weights would give; `guessed`, in speculative decoding, the share of decoded tokens that a draft had
    proposed. Raises ValueError for the way llama.cpp without its Python bindings.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe["threads"])
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _measured(recipe, Path(folder))
    finally:
        torch.set_num_threads(threads)


def _measured(recipe: RecipeDict, folder: Path) -> Figures:
    name, way = recipe["source"], recipe["way"]
    whole = 4.0 * thin.weights(source(name))
    if way in THIN:
        options = {key: value for key, value in recipe.items() if key not in (*STEPS, "way", "source", "seed")}
        logits, read = THIN[way](name, **options)
        found = distance(name, logits)
        return {"distance": found, **_bytes(4.0 * read(), whole)}
    engine, logits, read_bytes = _engine(recipe, folder)
    found = distance(name, logits) if way not in LOSSLESS else {}
    taken = speed(recipe, engine)
    guessed = {"guessed": engine.guessed[0] / engine.guessed[1]} if isinstance(engine, Drafted) else {}
    return {"distance": found, **_bytes(read_bytes, whole), "speed": taken, **guessed}


def _bytes(read: float, whole: float) -> Figures:
    return {"bytes": read, "share": read / whole}


def _engine(recipe: RecipeDict, folder: Path) -> tuple[Engine, Logits, float]:
    """Return the engine of a way, the function that gives its logits, and the bytes of weights read for a token."""
    name, way = recipe["source"], recipe["way"]
    if way == "llama.cpp":
        if importlib.util.find_spec("llama_cpp") is None:
            raise ValueError("this arm needs llama.cpp: pip install llama-cpp-python")
        other = LlamaCpp(name, recipe["format"], folder, recipe["threads"])
        return other, other.logits, other.bytes()
    if way == "torchao":
        model, read = torchao(name, recipe["bits"])
        return Torch(model), thin.whole(model), read  # type: ignore[arg-type]
    if way == "bf16":
        half = copy.deepcopy(theirs(name)).to(torch.bfloat16)
        return Torch(half), thin.whole(half), 2.0 * thin.weights(source(name))  # type: ignore[arg-type]
    if way == "lookup":
        return PromptLookup(llama(name), recipe["count"]), thin.whole(source(name)), 4.0 * thin.weights(source(name))
    if way in SMALLER:
        share = recipe["share"] if way == "narrower" else recipe["blocks"]
        smaller = SMALLER[way](name, share)
        return Torch(smaller), thin.whole(smaller), 4.0 * thin.weights(smaller)
    if way == "candidates":
        fewer = by_candidates(name, recipe["weights"], recipe["candidates"], recipe["directions"])
        return Torch(fewer), logits_of_steps(fewer), bytes_read(fewer)
    ours = weights_of(name, way, recipe.get("weights"))
    read = sum(p.numel() * p.element_size() for p in ours.parameters())
    drafted = Drafted(ours, recipe["draft"]) if way == "drafted" else Torch(ours)
    return drafted, thin.whole(ours), float(read)


def weights_of(name: str, way: str, weights: str | None = None) -> SkipstoneForCausalLM:
    """Return our model of the checkpoint `name` with weights in the format of a way to decode it.

    way: "ours" (fp32, as they are), "float16", "int4" (four-bit blocks, those of its GGUF file), or anything else for
    int8. weights: the format, "float" (fp32) or "float16", of a way that names none; None means that the way decides.
    With fp32, the model is that which `source.source` returns, so callers must not change it.
    """
    if way == "ours" or weights == "float":
        return source(name)
    if way == "int4":
        return quantise(source(name), 4, four_bit_rows(source_path(name))).eval()
    return quantise(source(name), 16 if "float16" in (way, weights) else 8).eval()


def speed(recipe: RecipeDict, engine: Engine) -> Figures:
    """Return the tokens per second of an engine divided by those of transformers' model in fp32, timed in turns.

    recipe: has the keys "source" (name of the checkpoint), "prompt" and "new" (tokens of the prompt and of the greedy
    continuation) and "turns" (number of timings, whose prompts come from the texts of `source.rows` in turn). engine:
    decodes one row greedily and is timed. The result is {"median", "min", "max"} of the ratio over timings.
    """
    prompts = [ids_RT[:1, : recipe["prompt"]] for ids_RT in rows(recipe["source"]).values()]
    base = Torch(theirs(recipe["source"]))

    def task(of: Engine) -> Any:
        turns = iter(range(recipe["turns"] + 1))
        return lambda: of.lap(prompts[next(turns) % len(prompts)], recipe["new"])

    taken = take_turns({"ours": task(engine), "theirs": task(base)}, recipe["turns"])
    seconds = {who: [lap.seconds for lap in rate.laps] for who, rate in taken.items()}
    return ratio(seconds["theirs"], seconds["ours"])


COLUMNS = (
    Column(key="share", title="bytes", format=".1%"),
    Column(key="speed", title="speed (min to max)", format=".2f", spread=True),
    Column(key="guessed", title="guessed", format=".0%"),
    Column(key="distance.plays.kl", title="KL, plays", format=".4f"),
    Column(key="distance.manual.kl", title="KL, manual", format=".4f"),
    Column(key="distance.code.kl", title="KL, code", format=".4f"),
    Column(key="distance.plays.agreement", title="same token, plays", format=".1%"),
    Column(key="distance.manual.agreement", title="manual", format=".1%"),
    Column(key="distance.code.agreement", title="code", format=".1%"),
    Column(key="distance.plays.increase", title="perplexity, plays", format="+.1%"),
    Column(key="distance.manual.increase", title="manual", format="+.1%"),
    Column(key="distance.code.increase", title="code", format="+.1%"),
)

DECODE_RIVALS = Study(
    name="decode_rivals",
    purpose="Ways to decode one row on a CPU: speed and distance to the source",
    about=(
        f"The source, {SOURCE}, is a file of four-bit blocks restored to fp32, so four bits in the format of that file "
        "would lose nothing. *KL* is KL(source || way) in nats per token, and *same token* is the share of positions "
        f"with the same most likely token. Both are measured on {ROWS} rows of {LENGTH} tokens from each of three "
        "texts on which no arm was tuned: plays (Shakespeare), the reference manual of the Python language, and "
        "Python code. Thresholds, directions and the order of neurons and blocks come from wikitext-2. *Bytes* are "
        "those of the weights that are read for a token, relative to fp32. *Speed* is tokens per second relative to "
        "transformers' Llama in fp32 with the same weights, by CPU seconds of one thread, interleaved in one process: "
        f"{STEPS['new']} greedy steps after prompts of {STEPS['prompt']} tokens of the three texts; arms with drafts, "
        f"and that without one beside them, {LONGER['new']} tokens after {LONGER['prompt']}. With two threads, both "
        "sides have two, and the wall clock counts, which other processes of the machine disturb. Drafts change no "
        "token; *guessed* is the share of tokens that a draft had proposed. *Head by candidates*: a step previews the "
        f"logits from {HEAD['directions']} directions in four bits and reads {HEAD['candidates']:,} rows of the head "
        "whole; its KL is that of such steps. The arms so named without *ours* are "
        "the published form (SVD-softmax), in fp32. Arms without a "
        "speed decide for every token, but this implementation leaves nothing out. On a CPU, torchao stores int4 in "
        "one byte each, and its bytes are counted so. *16 bits* are fp16, to which the numbers of this "
        "file are rounded; a checkpoint that was published in bf16 or fp16 would lose nothing. "
        "transformers in bf16 also rounds activations."
    ),
    arms=arms,
    seeds={"laptop": (0,)},
    clock=measured,
    columns=COLUMNS,
)

DECODE_RIVALS_GEMMA = Study(
    name="decode_rivals_gemma",
    purpose="A model whose head is most of it, decoded on a CPU: speed and distance to the source",
    about=(
        f"The source, {GEMMA}, is a file of four- to eight-bit blocks (Q4_K_M) restored to fp32; its head, a "
        "vocabulary of 262,144 by a width of 640, is 63 % of the weights. Everything is measured as in decode_rivals, "
        "each row beginning with the token that begins a text. *Head by candidates*: a step previews the logits from "
        f"{HEAD['directions']} directions in four bits and reads that many rows of the head whole; its KL is that of "
        "such steps. llama.cpp decodes the file as it is, and written anew as F16 and as Q8_0."
    ),
    arms=arms_of_gemma,
    seeds={"laptop": (0,)},
    clock=measured,
    columns=tuple(column for column in COLUMNS if column.key != "guessed"),
)
