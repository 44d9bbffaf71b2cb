"""The loss of a pretrained model that is adapted to compute less, by four methods at equal FLOPs.

The methods are Mixture-of-Depths, random skipping of tokens, fewer blocks, and MLPs that compute only some neurons for
each token, chosen by magnitude (neurons by magnitude), at the FLOPs of the checkpoint (the source) without six of its
30 blocks. All arms (compared recipes) are trained on the same rows, with cross-entropy and distillation from the
source, or with distillation alone, and are evaluated by the executed pass on the first rows of three texts, two of
which no arm is trained on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, TrainerCallback

from skipstone.budget import BudgetTable
from skipstone.core.atomic_write import complete
from skipstone.core.plain_text import read_object
from skipstone.core.strict import PlainDict
from skipstone.evaluate.budget_curve import calibrate_run
from skipstone.evaluate.loaded_run import batches, load_run
from skipstone.measure.flops import count_flops, flop_check
from skipstone.measure.losses import measure_loss
from skipstone.measure.speed import decode_task, take_turns
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.runs import Run
from skipstone_studies.adapting import adapt_run, run_beside
from skipstone_studies.claims import ArmComparison, ByArm, as_claims, comparisons
from skipstone_studies.quality.frontier_page import DEAR, PROMPT_TEXT, SAMPLED_TOKENS, TEXTS, TUNED, pictures, samples
from skipstone_studies.speed.interleaved import ratio
from skipstone_studies.study import Column, Figures, RecipeDict, Study

SOURCE = "SmolLM2-135M-Instruct"
DROPPED, BUDGET = 6, 0.8395  # dropped blocks, and the share of a row's FLOPs without them
NEURONS = {0.8395: 0.5799, 0.9: 0.7383, 0.79: 0.4504}  # by budget: mean share of neurons with which decoding meets it
APART = 0.08  # distance of the shares tried and kept from their mean: a flat optimum, see docs/log.md
CONTEXT, BATCH, COUNTED = 256, 8, 8
DIALLED = 16  # rows for calibrating thresholds
PROMPT, STEPS, TURNS = 64, 64, 7  # for the timing of decoding one row
LEAST = {"score": "block_influence"}


def arms(
    scale: str,
    *,
    tokens: int,
    rate: float,
    language_modelling: float,
    sampled: bool,
    move_to: tuple[float, ...] = (),
) -> dict[str, RecipeDict]:
    """Return the recipes by name: the pretrained source, the same trained further, and methods that compute less.

    The source is the checkpoint before it is adapted. Each recipe is a dict of settings that makes one of the compared
    models. scale: not used. tokens: training tokens of each arm. rate: learning rate. language_modelling: weight of the
    cross-entropy in the loss, from 0 to 1. Distillation from the source has the rest of the weight; with 0, no arm
    trains the source further. sampled: whether training rows are also drawn from text that the source generated.
    move_to: for each of these budgets (shares of the source's FLOPs), recipes are added whose models are set to this
    budget after training, without further training; () adds none.
    """
    layers = {**LEAST, "count": 8 * DROPPED // 3}  # a flat optimum: see docs/log.md
    best: PlainDict = {"name": "mixture_of_depths", "layers": layers, "capacity_warmup": 0.15, "kv": "full"}
    best |= {"skip": "low_rank", "skip_rank": 64}
    random = {**best, "decision": "random", "weight": "none"}
    routed = {"budget": BUDGET, "start": "measured"}
    recipe = partial(_recipe, tokens, rate, language_modelling, sampled)
    at = f"at {BUDGET:.0%}"
    found: dict[str, RecipeDict] = {"source": {"source": SOURCE}}
    if language_modelling:
        found[TUNED] = recipe({})
    found |= {
        f"fewer blocks {at}": recipe({"drop_layers": {**LEAST, "count": DROPPED}}),
        f"mixture of depths {at}": recipe({"mechanisms": [best]}, **routed),
        f"random skipping {at}": recipe({"mechanisms": [random]}, **routed),
        f"neurons by magnitude {at}": recipe({"neuron_groups": _shares(BUDGET)}),
    }
    for kind in ("mixture of depths", DEAR) if move_to else ():
        found |= {moved(kind, b): {"source": {"arm": f"{kind} {at}"}, "at_budget": b} for b in move_to}
    return found


def moved(kind: str, budget: float) -> str:
    """Return the name of an adapted model that is set to another budget than it was adapted for, without training.

    kind: the name of the method, such as "mixture of depths". budget: the new one, as a share of the FLOPs of the
    source, the checkpoint before it is adapted.
    """
    return f"{kind} at {BUDGET:.0%}, set to {budget:.0%}"


def _shares(budget: float) -> dict[str, float]:
    mean = NEURONS[budget]
    return {"capacity": round(mean + APART, 4), "down_capacity": round(mean - APART, 4)}


def _recipe(
    tokens: int, rate: float, language_modelling: float, sampled: bool, model: PlainDict, **options: Any
) -> RecipeDict:
    steps = max(1, tokens // (BATCH * CONTEXT))
    train: PlainDict = {"steps": steps, "batch_size": BATCH, "learning_rate": rate, "warmup_steps": steps // 10}
    train |= {
        "precision": "bf16",
        "loss_chunk": 256,
        "save_every": max(1, steps // 4),
        "log_every": max(1, steps // 10),
    }
    loss = {"language_modelling": language_modelling, "distillation": 1 - language_modelling}
    own = {"sampled": {"tokens": 250_000, "length": 256, "batch": 96, "also": "wikitext-2"}} if sampled else {}
    return {
        "source": SOURCE,
        **own,
        "model": model,
        "data": {"corpus": "wikitext-2", "context": CONTEXT},
        "train": {**train, "eval_every": 0, "eval_rows": 8},
        "adapt": {"loss": loss, "calibration_rows": 192, **options},
    }


def make(recipe: RecipeDict, folder: Path, resume: bool, callbacks: Sequence[TrainerCallback]) -> None:
    """Make the run folder of a compared model: adapt the checkpoint, or save another model with other thresholds.

    recipe: the model's recipe; if it has the key `at_budget`, a share of the checkpoint's FLOPs, the model of the
    recipe that `source` names is saved with the thresholds (or shares of neurons) of this budget. folder: the run
    folder. resume: whether to continue an interrupted training. callbacks: further callbacks of the trainer.
    """
    if "at_budget" not in recipe:
        adapt_run(recipe, folder, resume, callbacks)
        return
    run, budget = run_beside(folder, recipe["source"]["arm"]), recipe["at_budget"]
    model, tokenizer = run.load_model(), run.load_tokenizer()
    with complete(folder) as partly, thresholds(model, run, budget):
        model.save_pretrained(partly)
        if tokenizer is not None:
            tokenizer.save_pretrained(partly)
        if model.config.neuron_groups is not None:
            config = partly / "config.json"
            values = read_object(config)
            values["neuron_groups"] |= _shares(budget)
            config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def thresholds(model: SkipstoneForCausalLM, run: Run, budget: float) -> AbstractContextManager[Any]:
    """Return a context manager that sets the routing thresholds of a model to a budget, and restores them afterwards.

    model: the model. run: the model's run, which is calibrated first if it has no table of thresholds by budget.
    budget: share of the FLOPs of the source, the checkpoint before it is adapted. A model with neurons by magnitude has
    no thresholds and stays as it is.
    """
    if model.config.neuron_groups is not None:
        return nullcontext()
    if BudgetTable.find(run.model_folder()) is None:
        calibrate_run(run.folder, rows=DIALLED)
    return BudgetTable.load(run.model_folder()).at(model, budget)


def measured(folder: Path, rows: int) -> Figures:
    """Return the figures of one run: loss and FLOPs on each text, and a generated sample.

    folder: the run folder. rows: number of rows of each text that are read. Keys: the name of each text, with a dict of
    `loss`, in nats per token by the pass that skips, and `flops`, counted per token while it runs; `greedy`, the
    sample; `tokens`, the number of training tokens, 0 for the source.
    """
    found: PlainDict = {"greedy": greedy(folder), "tokens": 0}
    if not Run(folder).is_saved_model:
        found["tokens"] = Run(folder).result()["tokens"]
    for name, (corpus, split) in TEXTS.items():
        loaded = load_run(folder, split, corpus, CONTEXT)
        assert loaded.data is not None
        model, data, device = loaded.model, loaded.data, loaded.model.device
        loss = measure_loss(model, loaded.primary, batches(data, BATCH, device, rows), activations=False).loss
        found[name] = {
            "loss": loss,
            "flops": flop_check(model, loaded.primary, batches(data, 1, device, COUNTED)).counted,
        }
    return found


def greedy(folder: Path) -> str:
    """Return the greedy continuation of the fixed prompt `PROMPT_TEXT` by the model in `folder`, without the prompt."""
    run = Run(folder)
    model, tokenizer = run.load_model(), run.load_tokenizer()
    assert tokenizer is not None
    ids = torch.tensor([tokenizer.encode(PROMPT_TEXT)])
    out = model.generate(ids, max_new_tokens=SAMPLED_TOKENS, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    return str(tokenizer.decode(out[0, ids.shape[1] :].tolist()))


def decoding(runs: Mapping[str, Path]) -> dict[str, Figures]:
    """Return the FLOPs and the speed of decoding one row by each compared model, as ratios to the source's.

    The source is the checkpoint before it is adapted. runs: run folders by name of the model (arm), "source" among
    them. The result is {arm: {"decode": {"flops": ratio of the FLOPs, counted while steps run, "speed": ratio of the
    tokens per second, as {"median", "min", "max"} over repetitions}}}. Steps follow a prompt from the first text,
    because what is skipped depends on the text. Arms are timed in turns.
    """
    corpus, split = next(iter(TEXTS.values()))
    data = load_run(runs["source"], split, corpus, CONTEXT).data
    assert data is not None
    prompt = data.collate([data.validation[len(data.validation) - 1]])["input_ids"][:, :PROMPT]
    models = {name: Run(folder).load_model() for name, folder in runs.items()}
    flops = {name: decoding_flops(model, prompt) for name, model in models.items()}
    rates = take_turns({name: decode_task(model, prompt, STEPS) for name, model in models.items()}, TURNS)
    base = rates["source"].each
    return {
        name: {"decode": {"speed": ratio(rate.each, base), "flops": flops[name] / flops["source"]}}
        for name, rate in rates.items()
    }


@torch.no_grad()
def decoding_flops(model: SkipstoneForCausalLM, prompt: torch.Tensor) -> int:
    """Return the FLOPs of `STEPS` greedy decoding steps of `model` after a prompt, counted while they run.

    prompt: token ids, int64 [1, tokens].
    """
    cache = DynamicCache(config=model.config)
    token, total = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1), 0
    for _ in range(STEPS):
        given: list[Any] = []
        total += count_flops(lambda ids=token, to=given: to.append(model(ids, past_key_values=cache))).total  # type: ignore[misc]
        token = given[0].logits.argmax(-1)
    return total


def derive(figures: Mapping[str, Figures]) -> dict[str, Figures]:
    """Return figures by compared model and text that follow from all models of a seed; {} without the source.

    The result is {arm: {"by_text": {text: {"share": FLOPs divided by the source's, "perplexity": the perplexity of the
    arm, "over": the arm's perplexity divided by that of the source trained further (or of the source, if no arm trains
    it further), minus 1}}}}. The source is the checkpoint before it is adapted. figures: the figures of each arm
    (compared recipe) with one seed, by arm.
    """
    source = figures.get("source")
    base = figures.get(TUNED, source)
    if source is None or base is None:
        return {}
    found: dict[str, Figures] = {}
    for arm, of_arm in figures.items():
        found[arm] = {
            "by_text": {text: _judged(of_arm[text], base[text], source[text]) for text in TEXTS if text in of_arm}
        }
    return found


def _judged(of_arm: Figures, base: Figures, source: Figures) -> Figures:
    return {
        "share": of_arm["flops"] / source["flops"],
        "perplexity": math.exp(of_arm["loss"]),
        "over": math.expm1(of_arm["loss"] - base["loss"]),
    }


def columns(over: str) -> Iterator[Column]:
    """Yield the columns of the study's table.

    over: what headings call the model with whose perplexity the others are compared, such as "source".
    """
    yield Column(key="tokens", title="training tokens", format=",d")
    for text in TEXTS:
        yield Column(key=f"by_text.{text}.share", title=f"{text}: FLOPs", format=".1%")
        yield Column(key=f"by_text.{text}.perplexity", title="perplexity", format=".2f")
        yield Column(key=f"by_text.{text}.over", title=f"vs. {over}", format="+.1%")
    yield Column(key="decode.flops", title="decode: FLOPs", format=".1%")
    yield Column(key="decode.speed", title="tokens/s", format=".2f", spread=True)


LEARNED = (
    "Every arm starts from the same checkpoint, SmolLM2-135M-Instruct, and is trained on the same rows with two "
    "losses of equal weight: cross-entropy on the text, and the divergence from the distribution of the unmodified "
    "checkpoint. *Dense, tuned* shows what these tokens alone bring. Perplexities are compared with it, seed by seed, "
    "because tuning helps on some texts and harms on others."
)
DISTILLED = (
    "Every arm starts from the same checkpoint, SmolLM2-135M-Instruct, and is trained on the same rows to reproduce "
    "the distribution of the unmodified checkpoint, and nothing else. The source cannot improve by this loss, so "
    "perplexities are compared with the source's."
)
ABOUT = (
    "The arms *at 84%* execute the FLOPs of the checkpoint without 6 of its 30 blocks:\n\n* *Fewer blocks* removes the "
    "6 blocks that change the residual stream least.\n* *Mixture of depths* routes 8/3 as many blocks and gives each "
    "a skip path of rank 64; routers and skip paths are initialised from measurements (`start: measured`).\n* *Random "
    "skipping* is the same with tokens that are skipped at random.\n* *Neurons by magnitude* (`decision: magnitude`) "
    "computes all blocks for all tokens, but only some neurons for each token. It saves FLOPs in decoding only, and "
    "the pictures show it at its decoding FLOPs.\n* *Set to* means the same weights with other thresholds or another "
    "number of neurons.\n\nLosses are those of the pass that skips, on {rows} rows of 256 tokens of each text. FLOPs "
    "are counted while this pass runs, one row at a time, as a share of the source's FLOPs; they differ between "
    "texts, because the same thresholds keep more tokens of one text than of another. *Decode* is one row of "
    "wikitext-2, 64 tokens after a prompt of 64: counted FLOPs, and tokens/s interleaved with the source, both "
    "relative to the source. No arm is trained on the dictionary (GCIDE) or the plays (Tiny-Shakespeare)."
)
MIXED = (
    "The training rows are drawn from the validation split of wikitext-2 and from texts that the checkpoint generated "
    "(`skipstone write`)."
)


COMPARED = tuple(
    ArmComparison(key=f"{text}.loss", title=f"nats on {text}", against=against)
    for against in ("source", TUNED)
    for text in TEXTS
)


def details(figures: ByArm) -> str:
    """Return the Markdown below the study's table: comparisons with the source and its further training, and samples.

    figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes. The
    source is the checkpoint before it is adapted. Comparisons need more than one seed.
    """
    return "\n\n".join(part for part in (comparisons(figures, COMPARED), samples(figures)) if part)


def frontier(
    name: str, purpose: str, *, more: str = "", rows: int = 128, seeds: tuple[int, ...] = (0,), **options: Any
) -> Study:
    """Build a study of methods that make one pretrained model compute less.

    name, purpose: name and purpose of the study. more: text appended to its description. rows: number of evaluated rows
    per text. seeds: the seeds at scale "laptop". options: `tokens`, `rate`, `language_modelling`, `sampled` and
    `move_to`, arguments of `arms`.
    """
    learns = options["language_modelling"] > 0
    about = f"{LEARNED if learns else DISTILLED} {ABOUT.format(rows=rows)} {more}".strip()
    return Study(
        name=name,
        purpose=purpose,
        about=about,
        arms=partial(arms, **options),
        seeds={"laptop": seeds},
        make=make,
        measure=partial(measured, rows=rows),
        measure_together=decoding,
        derive=derive,
        claims=partial(as_claims, compared=COMPARED),
        details=details,
        pictures=pictures,
        columns=tuple(columns("tuned" if learns else "source")),
    )


ADAPT_FRONTIER = frontier(
    "adapt_frontier",
    "A pretrained model computes less: SmolLM2-135M tuned on wikitext-2, with fewer blocks or skipped tokens",
    more="The training rows are drawn from wikitext-2.",
    rows=256,
    tokens=400_000,
    rate=2e-4,
    language_modelling=0.5,
    sampled=False,
)
ADAPT_FRONTIER_MIXED = frontier(
    "adapt_frontier_mixed",
    "A pretrained model computes less: SmolLM2-135M tuned on wikitext-2 and on text that it generated",
    more=MIXED,
    tokens=400_000,
    rate=2e-4,
    language_modelling=0.5,
    sampled=True,
)
ADAPT_FRONTIER_NEURONS = frontier(
    "adapt_frontier_neurons",
    "A pretrained model computes less: SmolLM2-135M, neurons by magnitude against fewer blocks",
    more=MIXED
    + (
        " Users have the untuned source: compared with it, neurons by magnitude lose more on the two texts that no arm "
        "was trained on. Of all arms, fewer blocks needs training beyond these 48 steps most, so its one seed is not a "
        "fair baseline."
    ),
    seeds=(0, 1, 2),
    tokens=100_000,
    rate=3e-4,
    language_modelling=0.5,
    sampled=True,
    move_to=(0.9, 0.79),
)
ADAPT_FRONTIER_DISTILLED = frontier(
    "adapt_frontier_distilled",
    "A pretrained model computes less: SmolLM2-135M, trained by distillation alone",
    more=MIXED
    + (
        " *Neurons by magnitude* was trained on a quarter of the other arms' tokens (see the column), so it cannot be "
        "compared with them."
    ),
    tokens=400_000,
    rate=3e-4,
    language_modelling=0.0,
    sampled=True,
)
