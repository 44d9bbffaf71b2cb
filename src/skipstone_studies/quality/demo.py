"""The study `demo`: a dense model and four with mechanisms, of one size, trained on real text for seconds or minutes.

The mechanisms are Mixture-of-Depths, Token-Selective Attention, PolyGLU, and all three together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from skipstone.runs import Run
from skipstone_studies import measure
from skipstone_studies.page import lookup
from skipstone_studies.study import Column, Figures, RecipeDict, Study


@dataclass(frozen=True, kw_only=True)
class Size:
    """The size of the demonstration's five models and of their training.

    hidden_size, num_hidden_layers, num_attention_heads: width of the residual stream, number of blocks, and number of
    attention heads. context: tokens per row. batch_size: rows per step. steps: number of training steps. learning_rate:
    its peak. capacity: share of tokens that Mixture-of-Depths keeps in every other block. eval_rows: validation rows
    evaluated during training. validation_rows: rows evaluated after it. tokenizer: "char", "byte", "bpe:SIZE" or
    "pretrained:NAME"; None means the corpus's default. log_every: steps per log line; None means about 60 lines in all.
    evaluations: how often the validation loss is measured during training.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    context: int
    batch_size: int
    steps: int
    learning_rate: float
    capacity: float
    eval_rows: int
    validation_rows: int = 512  # more than Tiny-Shakespeare has; python-stdlib, its replacement, has more, too
    tokenizer: str | None = None
    log_every: int | None = None
    evaluations: int = 4


# quick: about a minute of one core in all. Pieces of words instead of characters, so that even a training this short
# writes words; few lines of log, because each takes figures of every neuron. laptop: minutes per model, but wide enough
# that skipped blocks save more than routing costs.
SIZES = {
    "quick": Size(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        context=64,
        batch_size=4,
        steps=120,
        learning_rate=6e-3,
        capacity=0.125,
        eval_rows=16,
        validation_rows=48,
        tokenizer="bpe:2048",
        log_every=20,
        evaluations=2,
    ),
    "laptop": Size(
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        context=256,
        batch_size=8,
        steps=100,
        learning_rate=2e-3,
        capacity=0.125,
        eval_rows=16,
    ),
    "paper": Size(
        hidden_size=512,
        num_hidden_layers=12,
        num_attention_heads=8,
        context=512,
        batch_size=32,
        steps=4000,
        learning_rate=6e-4,
        capacity=0.125,
        eval_rows=100,
    ),
}
SEEDS = {"quick": (0,), "laptop": (0,), "paper": (0, 1, 2)}
# A fifth of the standard library, where no text can be downloaded: pieces of words of all of it take half a minute.
PROMPTS = {"tiny-shakespeare": "ROMEO:\n", "python-stdlib:20-5-75": "def "}


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the five recipes by name: dense, mod, tsa, polyglu, and all, which combines these three mechanisms.

    Each is a dict of settings that makes one of the compared models. scale: "quick", "laptop" or "paper", a key of
    `SIZES`.
    """
    size = SIZES[scale]
    # ema_threshold makes the same decisions in training and generation, so no loss comes from switching.
    mod = {
        "name": "mixture_of_depths",
        "layers": "1::2",
        "capacity": size.capacity,
        "decision": "ema_threshold",
    }
    tsa, polyglu = {"name": "token_selective"}, {"name": "polyglu"}
    return {
        "dense": _recipe(size),
        "mod": _recipe(size, mechanisms=[mod]),
        "tsa": _recipe(size, mechanisms=[tsa]),
        "polyglu": _recipe(size, activation=polyglu),
        "all": _recipe(size, mechanisms=[mod, tsa], activation=polyglu),
    }


def _recipe(size: Size, **mechanisms: object) -> RecipeDict:
    return {
        "model": {
            "hidden_size": size.hidden_size,
            "num_hidden_layers": size.num_hidden_layers,
            "num_attention_heads": size.num_attention_heads,
            **mechanisms,
        },
        "data": {
            "context": size.context,
            "validation_rows": size.validation_rows,
            **({} if size.tokenizer is None else {"tokenizer": size.tokenizer}),
        },
        "train": {
            "steps": size.steps,
            "batch_size": size.batch_size,
            "learning_rate": size.learning_rate,
            "warmup_steps": size.steps // 12,
            "log_every": size.log_every or max(1, size.steps // 60),
            "eval_every": size.steps // size.evaluations,
            "eval_rows": size.eval_rows,
            "save_every": size.steps // 2,
        },
    }


def measured(folder: Path) -> Figures:
    """Return the figures of one run: its training, its evaluation, and a text that its model generated.

    folder: the run folder. Keys: `training`, the content of result.json; `evaluation`, what `skipstone eval --json`
    writes; `sample`, with its `prompt` and `pieces`, pairs of a piece of text and the share of the blocks' computation
    that was executed for it.
    """
    prompt = PROMPTS[Run(folder).data_config().corpus]
    return {**measure.standard(folder), "sample": measure.sample(folder, prompt)}


def samples(figures: Mapping[str, Mapping[int, Figures]]) -> str:
    """Return the text that the first seed of each arm generated, as Markdown.

    figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes.
    """
    parts = ["### Samples"]
    for arm, by_seed in figures.items():
        found = by_seed[min(by_seed)]
        text = found["sample"]["prompt"] + "".join(piece for piece, _ in found["sample"]["pieces"])
        parts.append(f"{arm}:\n\n" + "\n".join(f"    {line}".rstrip() for line in text.splitlines()))
    return "\n\n".join(parts)


# A test compares these figures with results/demo/records.
LARGER = (
    "These models are small to make the demonstration short. On models nearly four times as large, "
    "`make demo SCALE=laptop` (several times as long; its table is results/demo.md) trained Mixture-of-Depths 1.67 "
    "times as fast as the dense model and decoded it 1.41 times as fast, 1.55 times with 8 rows."
)


def closing(scale: str, figures: Mapping[str, Mapping[int, Figures]]) -> str:
    """Return the text printed below the table: samples, arms faster or slower than dense, and a note on larger models.

    scale: the scale of the runs; at "quick", the note tells the speeds that were measured at scale "laptop". figures:
    the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes.
    """
    faster = {"training": "training_speed", "decoding": "comparison.speed.decode 1"}
    lines = [samples(figures).replace("### Samples", "Samples")]
    for what, key in faster.items():
        speeds = {arm: lookup(by_seed[min(by_seed)], f"{key}.tokens_per_second") for arm, by_seed in figures.items()}
        dense = speeds.pop("dense", None)
        ratios = {arm: speed / dense for arm, speed in speeds.items() if speed and dense}
        told = [
            f"{word} {', '.join(f'{arm} ({ratio:.2f}×)' for arm, ratio in ratios.items() if (ratio > 1) == is_faster)}"
            for word, is_faster in (("faster than dense:", True), ("slower:", False))
            if any((ratio > 1) == is_faster for ratio in ratios.values())
        ]
        lines += [f"In {what}, {'; '.join(told)}."] if told else []
    return "\n\n".join([*lines, *([LARGER] if scale == "quick" else [])])


DEMO = Study(
    name="demo",
    purpose="Dense, MoD, TSA, PolyGLU and all three combined, on real text, in minutes per arm",
    about=(
        "Five decoders of one size, trained for the same few steps on the same rows. Such a short training says "
        "little about quality; the table shows what each mechanism costs and saves. Training and decoding speeds are "
        "measured after training, with the arms interleaved. Loss is in nats per token: *oracle* as in training, "
        "*executed* with the decisions that generation makes, measured on the pass that really skips."
    ),
    arms=arms,
    seeds=SEEDS,
    corpora=tuple(PROMPTS),
    measure=measured,
    details=samples,
    closing=closing,
    columns=(
        Column(key="training.parameters", title="parameters (M)", format=".2f", unit=1e6),
        Column(key="evaluation.ways.oracle.loss", title="loss, oracle", better="low"),
        Column(key="evaluation.ways.executed.loss", title="loss, executed", better="low"),
        Column(key="evaluation.flops_per_token.counted", title="MFLOPs/token", format=".2f", unit=1e6, relative=True),
        Column.speed("training_speed", "training tokens/s"),
        Column.speed("comparison.speed.decode 1", "decoding tokens/s"),
        Column.speed("comparison.speed.decode 8", "decoding tokens/s, 8 rows"),
        Column(key="comparison.cache_bytes_per_token.kv", title="KV bytes/token", format=",.0f", better="low"),
    ),
)
