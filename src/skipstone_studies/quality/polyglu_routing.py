"""A study of how PolyGLU's neurons choose among activation functions: entropies and diversity of the mixes.

It also measures by how much the loss rises if each neuron gets a single activation function.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path

from skipstone.adapt.export_calibrated import BATCH, BATCHES
from skipstone.adapt.harden import NAMES, harden, mean_logits
from skipstone.core.strict import PlainDict, PlainMapping
from skipstone.evaluate.loaded_run import LoadedRun, batches, load_run
from skipstone.evaluate.tables import Section, markdown, percent
from skipstone.measure.losses import measure_loss
from skipstone.runs import Run
from skipstone_studies import measure
from skipstone_studies.claims import ByArm, Claim, claims_table, judge, paired_differences, values
from skipstone_studies.page import mean_and_spread
from skipstone_studies.study import Column, Figures, RecipeDict, Study

SWIGLU = "swiglu"
SCALES = (1, 16, 64)  # scales of the learned preferences; the paper's is 1
SIZES: dict[str, PlainDict] = {
    "laptop": {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4},
    "paper": {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 12},
}
TRAIN: dict[str, PlainDict] = {
    "laptop": {"steps": 500, "batch_size": 16, "learning_rate": 2e-3},
    "paper": {"steps": 5000, "batch_size": 32, "learning_rate": 6e-4},
}
CONTEXT = {"laptop": 128, "paper": 512}
SEEDS = {"laptop": (0, 1, 2), "paper": (0, 1, 2)}
POINTS = 5  # points of the training that are shown
ROUTING = ("diversity", "dynamic_entropy", "static_entropy")


def arms(scale: str, corpus: str = "tiny-shakespeare") -> dict[str, RecipeDict]:
    """Return the recipes by name: SwiGLU, and PolyGLU with and without Gumbel noise at three scales of preferences.

    Each is a dict of settings that makes one of the compared models. The scale multiplies each neuron's learned
    preferences for activations. scale: "laptop" or "paper". corpus: name of the text.
    """
    recipe = partial(_recipe, scale, corpus)
    found = {SWIGLU: recipe("silu")}
    for factor in SCALES:
        for name, noise in (("noise", True), ("quiet", False)):
            found[f"scale {factor}, {name}"] = recipe({"name": "polyglu", "preference_scale": factor, "noise": noise})
    return found


def _recipe(scale: str, corpus: str, activation: str | PlainDict) -> RecipeDict:
    steps = TRAIN[scale]["steps"]
    return {
        "model": {**SIZES[scale], "activation": activation},
        "data": {"corpus": corpus, "context": CONTEXT[scale]},
        "train": {
            **TRAIN[scale],
            "warmup_steps": steps // 12,
            "eval_every": 0,
            "save_every": steps // 2,
            "log_every": steps // (POINTS * 5),
        },
    }


def measured(folder: Path) -> Figures:
    """Return the figures of one run, and for PolyGLU how its neurons choose their activations.

    folder: the run folder. Keys: `training` and `evaluation`, the content of result.json and of `skipstone eval
    --json`; `diversity`, the share of neurons whose strongest activation is not the most common one of their layer;
    `dynamic_entropy` and `static_entropy`, mean entropies in nats of a neuron's softmax over activations, with all
    logits and with its learned preferences alone; these are means over layers. `hardened`: by how many nats the loss
    rises if each neuron keeps one activation, chosen on training rows. `neurons`: for each layer, the share of neurons
    whose strongest activation is each of the functions. `course`: diversity and both entropies during training,
    {percentage of the steps: {name: value}}.
    """
    figures = measure.standard(folder)
    ways, main = figures["evaluation"]["ways"], figures["evaluation"]["main"]
    layers = [one for layer in ways[main]["layers"] for one in layer.values() if "diversity" in one]
    if not layers:
        return figures
    means = {name: statistics.fmean(layer[name] for layer in layers) for name in ROUTING}
    hardened = _hardened(folder, load_run(folder)) - ways[main]["loss"]
    neurons = [layer["neurons"] for layer in layers]  # by layer: share of neurons by strongest activation
    return {**figures, **means, "hardened": hardened, "neurons": neurons, "course": course(Run(folder))}


def _hardened(folder: Path, loaded: LoadedRun) -> float:
    """Return the validation loss in nats per token of the model with one fixed activation per neuron.

    folder: the run folder, whose training rows determine each neuron's activation. loaded: the run with its validation
    rows.
    """
    train = load_run(folder, "train")
    assert loaded.data is not None
    assert train.data is not None
    rows = islice(batches(train.data, BATCH, loaded.model.device), BATCHES)
    model = harden(loaded.model, mean_logits(loaded.model, loaded.primary, rows)).eval()
    rest = batches(loaded.data, BATCH, loaded.model.device)
    return measure_loss(model, loaded.primary, rest, activations=False).loss


def course(run: Run) -> dict[str, dict[str, float]]:
    """Return how the neurons of a PolyGLU run chose their activations at 5 evenly spaced points of its training.

    run: the run. The result is {percentage of the steps: {"diversity": share of neurons whose strongest activation is
    not the most common one of their layer, "dynamic_entropy" and "static_entropy": mean entropies in nats of a neuron's
    softmax, with all logits and with its learned preferences alone}}. All were logged in training and are averaged over
    layers.
    """
    lines = [line for line in run.metrics() if line.get("split") == "train" and _logged(line, "diversity")]
    last, found = lines[-1]["step"], {}
    for part in range(1, POINTS + 1):
        line = min(lines, key=lambda line, at=part / POINTS * last: abs(line["step"] - at))  # type: ignore[misc]
        found[f"{part / POINTS:.0%}"] = {name: statistics.fmean(_logged(line, name)) for name in ROUTING}
    return found


def _logged(line: PlainMapping, name: str) -> list[float]:
    return [value for key, value in line.items() if key.startswith(f"{name}/")]


LOSS = "evaluation.ways.executed.loss"
DETERMINISTIC, UNUSED, REACHED, LOST = 1e-3, 0.01, 0.05, 0.01


def claims(figures: ByArm) -> Iterator[Claim]:
    """Yield five claims for each PolyGLU arm with their verdicts; the first two are those of the PolyGLU paper.

    They are: routing is nearly deterministic (dynamic entropy at most .1 % of ln 4); static entropy stays within 1 % of
    ln 4; at least 5 % of a layer's neurons differ from its most common activation; fixing one activation per neuron
    costs at most .01 nats; the loss is below SwiGLU's. figures: the figures of every run, {arm: {seed: nested dict}},
    where an arm is one of the compared recipes.
    """
    for arm in figures:
        share = [value / math.log(len(NAMES)) for value in values(figures, arm, "dynamic_entropy")]
        text = f"routing is nearly deterministic: dynamic entropy at most {DETERMINISTIC:.1%} of ln 4 (paper: 0.03 %)"
        yield from judge(arm, text, share, most=DETERMINISTIC, form=".2%")
        share = [value / math.log(len(NAMES)) for value in values(figures, arm, "static_entropy")]
        text = f"static entropy stays at ln 4, within {UNUSED:.0%} (paper: yes)"
        yield from judge(arm, text, share, least=1 - UNUSED, form=".1%")
        text = f"neurons route, not layers: at least {REACHED:.0%} of a layer's neurons depart from its majority"
        yield from judge(arm, text, values(figures, arm, "diversity"), least=REACHED, form=".1%")
        text = f"hardened, it loses at most {LOST} nats"
        yield from judge(arm, text, values(figures, arm, "hardened"), most=LOST, form="+.4f")
        if arm != SWIGLU:
            less = paired_differences(figures, arm, SWIGLU, LOSS)
            yield from judge(arm, "its loss is below SwiGLU's", less, most=0.0, form="+.4f")


def details(figures: ByArm) -> str:
    """Return the Markdown below the table: verdicts, strongest activations by layer, and routing during training.

    figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes.
    """
    sections = [section for section in (_layers(figures), _course(figures)) if section.rows]
    parts = [claims_table("Which claims hold", claims(figures)), markdown(sections).strip("\n") if sections else ""]
    return "\n\n".join(part for part in parts if part)


def _layers(figures: ByArm) -> Section:
    """Return the table of the activations that most neurons of each layer use, by seed."""
    rows = []
    for arm, seeds in figures.items():
        for seed, found in seeds.items():
            layers = found.get("neurons")
            if layers:
                rows.append([arm, str(seed), *(_most(layer) for layer in layers)])
    width = max((len(row) for row in rows), default=2)
    columns = ["arm", "seed", *(f"layer {i}" for i in range(width - 2))]
    return Section(title="Neurons of each layer by their strongest activation", columns=columns, rows=rows)


def _most(layer: Mapping[str, float]) -> str:
    """Return as text the activations with at least 5 % of a layer's neurons, the largest share first.

    layer: the share of neurons by strongest activation.
    """
    shown = sorted(((share, name) for name, share in layer.items() if share >= REACHED), reverse=True)
    return ", ".join(f"{name} {percent(share)}" for share, name in shown)


def _course(figures: ByArm) -> Section:
    rows = []
    parts = [f"{part / POINTS:.0%}" for part in range(1, POINTS + 1)]
    for arm in figures:
        for name in ROUTING:
            found = [values(figures, arm, f"course.{part}.{name}") for part in parts]
            if any(found):
                rows.append([arm, name.replace("_", " "), *(mean_and_spread(each, ".3f") for each in found)])
    note = (
        "Means over layers. Entropies are in nats, without tau (ln 4 = 1.386); tau falls from 1 to .1 during training."
    )
    return Section(title="During training", columns=["arm", "figure", *parts], rows=rows, notes=[note])


POLYGLU_ROUTING = Study(
    name="polyglu_routing",
    purpose="PolyGLU's routing: entropies, diversity within a layer, and the loss of a fixed choice",
    about=(
        "PolyGLU with preferences that learn 1 (the paper's), 16 or 64 times as fast, with and without Gumbel noise "
        "in training. *Diversity* is the share of neurons whose strongest activation is not the most frequent one of "
        "their layer. *Hard mix* is the change in loss when each neuron uses only its strongest activation for each "
        "token; *hardened* is the change when each neuron keeps one activation for good, chosen on training rows. "
        "Evaluation draws no noise."
    ),
    arms=arms,
    seeds=SEEDS,
    measure=measured,
    measure_together=None,
    claims=claims,
    details=details,
    columns=(
        Column(key="training.parameters", title="parameters (K)", format=".1f", unit=1e3),
        Column(key=LOSS, title="loss", format=".4f", better="low"),
        Column(key="evaluation.hard_minus_soft", title="hard mix", format="+.4f"),
        Column(key="hardened", title="hardened", format="+.4f"),
        Column(key="diversity", title="diversity", format=".3f"),
        Column(key="dynamic_entropy", title="dynamic entropy", format=".4f"),
        Column(key="static_entropy", title="static entropy", format=".4f"),
    ),
)
