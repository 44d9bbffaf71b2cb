"""Losses of quantised weights, of skipped tokens, and of both together.

The models are those of finished runs of other studies (such as `adapt_stories` and `ffn_groups`); each is measured with
its own weights, and with linear layers in int8 and int4 by torchao (weights only), after saving and loading. Routers,
gates, norms and embeddings keep full precision, because none of them is an nn.Linear.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from skipstone import SkipstoneForCausalLM
from skipstone.adapt.prune import export_pruned
from skipstone.core.atomic_write import complete, write_whole
from skipstone.core.plain_text import read_object
from skipstone.core.strict import PlainDict
from skipstone.evaluate.loaded_run import batches, load_run
from skipstone.evaluate.metrics import sample_ids
from skipstone.measure.losses import measure_loss
from skipstone.measure.speed import decode_task, take_turns
from skipstone.runs import Run
from skipstone_studies.study import Column, Figures, RecipeDict, Study

WEIGHTS = ("as trained", "int8", "int4")
PRUNED = ", pruned"
PROMPT, NEW, ROUNDS = 64, 32, 5
TEXT = "text.json"  # beside the saved model: the text on which it is measured


def arms(scale: str, runs: Iterable[tuple[str, str]], text: PlainDict, group: int = 0) -> dict[str, RecipeDict]:
    """Return the recipes by name: each model with its own weights, in int8 and in int4.

    Each is a dict of settings that makes one of the compared models. scale: not used. runs: pairs (study, arm) of
    finished runs, the first of a dense model; where ", pruned" is appended to an arm's name, its unused neuron groups
    are removed. text: keyword arguments of `load_run` that select the evaluated text. group: number of weights in a
    matrix row that share an int4 scale; 0 means the whole row.
    """
    return {
        name_of(arm, weights): {
            "run": {"study": study, "arm": arm.removesuffix(PRUNED), "pruned": arm.endswith(PRUNED)},
            "weights": weights,
            "group": group,
            "text": text,
        }
        for study, arm in runs
        for weights in WEIGHTS
    }


def name_of(arm: str, weights: str) -> str:
    """Return the name under which the table shows the model `arm` with weights "as trained", in "int8" or "int4"."""
    return f"{arm}, {weights}"


def make(recipe: RecipeDict, folder: Path, resume: bool, callbacks: Sequence[TrainerCallback]) -> None:
    """Save another study's model in `folder` with quantised weights, and check that it loads as it was saved.

    recipe: an entry of `arms` with a seed, which names the run and the format of the weights. folder: the folder to
    write. resume, callbacks: not used. Raises FileNotFoundError if the other run does not exist, and ValueError if the
    saved model gives other logits.
    """
    named, seed = recipe["run"], recipe["seed"]
    source = folder.parents[2] / named["study"] / folder.parent.name / f"{named['arm']}-seed{seed}"
    if not source.is_dir():
        raise FileNotFoundError(f"{str(source)!r} does not exist; run `skipstone reproduce {named['study']}` first")
    run, text = Run(source), dict(recipe["text"])
    if not run.is_saved_model:
        text = {"corpus": run.data_config().corpus, "context": run.data_config().context, **text}
    model_folder, tokenizer = run.model_folder(), run.load_tokenizer()
    if named["pruned"]:
        model_folder = folder.with_name(f".{named['arm']}-pruned-seed{seed}")
        if not model_folder.is_dir():
            export_pruned(source, model_folder)
    with complete(folder) as partly:
        made = SkipstoneForCausalLM.from_pretrained(model_folder, **_options(recipe["weights"], recipe["group"])).eval()
        made.save_pretrained(partly)
        if tokenizer is not None:
            tokenizer.save_pretrained(partly)
        write_whole(partly / TEXT, json.dumps(text))
        _check_saved(made, partly)


def _options(weights: str, group: int) -> PlainDict:
    """Return the arguments of `from_pretrained` that quantise linear layers by torchao (weights only).

    weights: "as trained" (no arguments), "int8" or "int4". group: number of weights in a matrix row that share an int4
    scale; 0 means the whole row. Raises ValueError without torchao.
    """
    if weights == "as trained":
        return {}
    try:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis, PerGroup
    except ImportError:
        raise ValueError("quantising needs torchao: pip install torchao") from None
    from transformers import TorchAoConfig

    spread = PerGroup(group) if group else PerAxis(0)
    config = Int8WeightOnlyConfig() if weights == "int8" else IntxWeightOnlyConfig(torch.int4, spread)  # type: ignore[attr-defined]
    return {"quantization_config": TorchAoConfig(config)}


@torch.no_grad()
def _check_saved(made: SkipstoneForCausalLM, folder: Path) -> None:
    """Raise ValueError if the model in `folder` differs from the one that was saved, or if its routers are quantised.

    made: the model that was saved.
    """
    loaded = SkipstoneForCausalLM.from_pretrained(folder).eval()
    ids_BT = torch.arange(2 * PROMPT).view(2, PROMPT) % made.config.vocab_size
    if not torch.equal(loaded(ids_BT).logits, made(ids_BT).logits):
        raise ValueError(f"{str(folder)!r} is not the model that was saved")
    if not all(p.dtype.is_floating_point for name, p in loaded.named_parameters() if "router" in name):
        raise ValueError(f"{str(folder)!r} has quantised routers")


def measured(folder: Path, rows: int) -> Figures:
    """Return `nats`, the loss per token by the pass that skips, and `bytes`, the size of the weights' file.

    The loss is in nats. folder: the model folder, in which the choice of evaluated text is stored as well. rows: number
    of rows that are read.
    """
    text = read_object(folder / TEXT)
    loaded = load_run(folder, **text)
    assert loaded.data is not None
    given = batches(loaded.data, 8, loaded.model.device, rows)
    nats = measure_loss(loaded.model, loaded.primary, given, activations=False).loss
    return {"nats": nats, "bytes": (folder / "model.safetensors").stat().st_size}


def decoding(runs: Mapping[str, Path]) -> dict[str, Figures]:
    """Return the tokens per second of decoding one row, and their spread, for each compared model.

    runs: model folders by name (arm), which are timed alternately. The result is {arm: {"tokens_per_second": median
    over repetitions, "spread": half of their range, as a share of the median}}.
    """
    tasks = {}
    for arm, folder in runs.items():
        loaded = load_run(folder, **read_object(folder / TEXT))
        tasks[arm] = decode_task(loaded.model, sample_ids(loaded, 1, PROMPT), NEW)
    rates = take_turns(tasks, ROUNDS)
    return {arm: {"tokens_per_second": rate.tokens_per_second, "spread": rate.spread} for arm, rate in rates.items()}


def derive(figures: Mapping[str, Figures], first: str) -> dict[str, Figures]:
    """Return for each arm `perplexity`, and for arms that both skip and are quantised `interaction`, in nats.

    The interaction is the loss that skipping and quantisation add together, minus the sum of the losses that each adds
    alone. figures: what `measured` returned for each arm (compared recipe) with one seed, by arm. first: name of the
    dense arm.
    """
    found: dict[str, Figures] = {}
    for name, of_arm in figures.items():
        arm, _, weights = name.rpartition(", ")
        found[name] = {"perplexity": math.exp(of_arm["nats"])}
        others = [name_of(arm, WEIGHTS[0]), name_of(first, weights), name_of(first, WEIGHTS[0])]
        if arm != first and weights != WEIGHTS[0] and all(other in figures for other in others):
            own, quantised, plain = (figures[other]["nats"] for other in others)
            found[name] = {**found[name], "interaction": of_arm["nats"] - own - quantised + plain}
    return found


def quantised(
    name: str, purpose: str, about: str, runs: tuple[tuple[str, str], ...], rows: int, **options: Any
) -> Study:
    """Build a study that measures finished runs of other studies with their own weights, in int8 and in int4.

    name, purpose, about: name, purpose and description of the study. runs: pairs (study, arm (compared recipe)) of the
    measured runs, the first of a dense model. rows: number of evaluated rows. options: `text` (selects the evaluated
    text) and `group` (weights that share an int4 scale), as for `arms`.
    """
    return Study(
        name=name,
        purpose=purpose,
        about=f"{about} {ABOUT}",
        arms=partial(arms, runs=runs, **options),
        seeds={"laptop": (0,)},
        make=make,
        measure=partial(measured, rows=rows),
        measure_together=decoding,
        derive=partial(derive, first=runs[0][1]),
        columns=(
            Column(key="bytes", title="MB", format=",.2f", unit=1e6),
            Column(key="nats", title="nats", format=".4f"),
            Column(key="perplexity", title="perplexity"),
            Column(key="interaction", title="interaction, nats", format="+.4f"),
            Column(key="tokens_per_second", title="tokens/s", format=".0f"),
            Column(key="spread", title="± range", format=".0%"),
        ),
    )


ABOUT = (
    "Only the weights of linear layers are quantised, by torchao; routers, gates, norms and embeddings keep full "
    "precision. Every model was saved and loaded again before it was measured. *Nats* are those of the pass that "
    "skips. *Interaction* is the loss of skipping and quantising together minus the sum of the losses of each alone. "
    "*MB* is the size of the weights' file; int4 values are stored in one byte each here and would take half of that "
    "if packed. *Tokens/s* is for decoding one row, *± range* half of the range of its turns."
)
QUANTISED = quantised(
    "quantised",
    "Skipping and quantised weights: the arms of adapt_stories",
    "Measured on 128 rows of stories, with one scale for each row of weights.",
    tuple(("adapt_stories", arm) for arm in ("dense, tuned", "mixture of depths", "token-selective attention")),
    128,
    text={},
)
GROUPS = ("dense", "narrow 0.4", "groups 0.6", f"groups 0.6{PRUNED}", "groups 0.4", f"groups 0.4{PRUNED}")
QUANTISED_GROUPS = quantised(
    "quantised_groups",
    "Neuron groups, pruned and quantised: the arms of ffn_groups",
    (
        "Measured on 128 rows, with one scale for each row of weights. *Pruned* removes the groups that 64 training "
        "rows never use."
    ),
    tuple(("ffn_groups", arm) for arm in GROUPS),
    128,
    text={},
)
QUANTISED_SMOLLM2 = quantised(
    "quantised_smollm2",
    "Skipping and quantised weights: SmolLM2-135M",
    (
        "Measured on 16 rows of 256 tokens of wikitext-2, with one scale for each row of weights in int8 and for every "
        "32 weights in int4. Unlike the source, the other arms were tuned, so their *interaction* includes the effect "
        "of tuning and must not be read as an effect of skipping on quantisation."
    ),
    (
        ("adapt_frontier_neurons", "source"),
        ("adapt_frontier_distilled", "mixture of depths at 84%"),
        ("adapt_frontier_neurons", "neurons by magnitude at 84%"),
    ),
    16,
    text={"corpus": "wikitext-2", "split": "test", "context": 256},
    group=32,
)
