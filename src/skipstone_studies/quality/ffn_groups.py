"""A study of neuron groups: their loss compared with narrower MLPs of equal FLOPs, and with TEAL.

For each chunk of tokens, a router keeps some groups of an MLP's neurons; the others are not multiplied. TEAL sets small
inputs of matrices to 0 without training.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import islice
from pathlib import Path

from skipstone.core.strict import PlainDict
from skipstone.evaluate.loaded_run import LoadedRun, batches, load_run
from skipstone.evaluate.tables import Section, markdown, number, percent
from skipstone_studies import measure
from skipstone_studies.claims import ArmComparison, ByArm, as_claims, comparisons, values
from skipstone_studies.page import mean_and_spread
from skipstone_studies.quality.teal import measure_teal
from skipstone_studies.study import Column, Figures, RecipeDict, Study

DENSE = "dense"
SHARES = (0.6, 0.4)  # executed shares of the MLP's FLOPs
SIZES: dict[str, PlainDict] = {
    "laptop": {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 640},
    "paper": {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 8, "intermediate_size": 2560},
}
TRAIN: dict[str, PlainDict] = {
    "laptop": {"steps": 600, "batch_size": 8, "learning_rate": 2e-3},
    "paper": {"steps": 5000, "batch_size": 32, "learning_rate": 6e-4},
}
CONTEXT = {"laptop": 256, "paper": 512}
GROUPS = 20
CHUNK = 64
CONTROLS: dict[str, PlainDict] = {  # at the first share
    "no warm-up": {"capacity_warmup": 0.0},
    "balanced": {"balance_rate": 0.001},
    "random": {"capacity_warmup": 0.0, "decision": "random"},
}
SEEDS = {"laptop": (0, 1, 2), "paper": (0, 1, 2)}
BATCH, CALIBRATION = 16, 4  # rows per pass, passes for calibration


def arms(scale: str, corpus: str = "python-packages") -> dict[str, RecipeDict]:
    """Return the recipes by name: SwiGLU, narrower SwiGLUs, neuron groups with their FLOPs, and variants of the groups.

    Each is a dict of settings that makes one of the compared models. With neuron groups, a router multiplies only some
    groups of an MLP's neurons. scale: "laptop" or "paper". corpus: name of the text, as in data.corpus.
    """
    full = SIZES[scale]["intermediate_size"]
    recipe = partial(_recipe, scale, corpus)
    found = {DENSE: recipe(full)}
    for share in SHARES:
        found[f"narrow {share:g}"] = recipe(round(full * share))
        found[f"groups {share:g}"] = recipe(full, {"capacity": share})
    for name, options in CONTROLS.items():
        found[f"{name} {SHARES[0]:g}"] = recipe(full, {"capacity": SHARES[0], **options})
    return found


def _recipe(scale: str, corpus: str, neurons: int, options: PlainDict | None = None) -> RecipeDict:
    model = {**SIZES[scale], "intermediate_size": neurons}
    if options is not None:
        usual = {"group_size": neurons // GROUPS, "chunk_size": CHUNK, "capacity_warmup": 0.4}
        model["neuron_groups"] = {**usual, **options}
    steps = TRAIN[scale]["steps"]
    return {
        "model": model,
        "data": {"corpus": corpus, "context": CONTEXT[scale], "sampling": "once", "validation_rows": 512},
        "train": {**TRAIN[scale], "warmup_steps": steps // 12, "eval_every": 0, "save_every": steps // 2},
    }


def measured(folder: Path) -> Figures:
    """Return the figures of one run folder: training, evaluation, the MLPs' FLOPs, and TEAL's losses.

    TEAL is a training-free method that sets small inputs of the MLPs' matrices to 0. folder: the run folder. Keys:
    `training` and `evaluation`, the content of result.json and of `skipstone eval --json` (`measure.standard`);
    `mlp_flops`, the MLPs' forward FLOPs per token; `teal`, for models without neuron groups only. The keys of `teal`
    are the shares of inputs that TEAL is to leave, "60%" and "40%". Under each of them, `loss` is the model's loss in
    nats per token, and `executed` the share of the MLPs' multiplications whose input is not 0.
    """
    figures, loaded = measure.standard(folder), load_run(folder)
    cost = loaded.model.cost(loaded.context)
    figures = {**figures, "mlp_flops": cost.forward_per_token.mlp}
    if loaded.model.config.neuron_groups is not None:
        return figures
    return {**figures, "teal": {_step(share): _teal(folder, loaded, 1 - share) for share in SHARES}}


def _step(share: float) -> str:
    """Return a share as a key of the figures, in per cent, because dots separate the keys of a path."""
    return f"{share:.0%}"


def _teal(folder: Path, loaded: LoadedRun, sparsity: float) -> Figures:
    train = load_run(folder, "train")
    assert loaded.data is not None
    assert train.data is not None
    rows = batches(train.data, BATCH, loaded.model.device)
    found = measure_teal(
        loaded.model,
        loaded.primary,
        islice(rows, CALIBRATION),
        batches(loaded.data, BATCH, loaded.model.device),
        sparsity,
    )
    return {"loss": found.loss, "executed": 1 - found.sparsity}


def derive(figures: Mapping[str, Figures]) -> Mapping[str, Figures]:
    """Return for each arm `loss_ratio` and `mlp_ratio`, which compare it with the arm "dense" (SwiGLU).

    loss_ratio: the loss of the pass that really leaves out neurons (executed) divided by that of "dense", minus 1.
    mlp_ratio: the MLPs' forward FLOPs per token divided by those of "dense". figures: what `measured` returned for each
    arm (compared recipe) with one seed, by arm. The result is {} without the arm "dense".
    """
    if DENSE not in figures:
        return {}
    loss, flops = _loss(figures[DENSE]), figures[DENSE]["mlp_flops"]
    return {
        arm: {"loss_ratio": _loss(found) / loss - 1, "mlp_ratio": found["mlp_flops"] / flops}
        for arm, found in figures.items()
    }


def _loss(figures: Figures) -> float:
    return float(figures["evaluation"]["ways"]["executed"]["loss"])


def details(figures: ByArm) -> str:
    """Return the Markdown below the study's table: comparisons with SwiGLU and narrower MLPs, and TEAL's losses.

    TEAL sets small inputs of the MLPs' matrices to 0 without training. figures: the figures of every run, {arm: {seed:
    nested dict}}, where an arm is one of the compared recipes.
    """
    return "\n\n".join(part for part in (comparisons(figures, COMPARED), _thresholds(figures)) if part)


def _thresholds(figures: ByArm) -> str:
    rows = []
    for share in SHARES:
        losses, executed = (values(figures, DENSE, f"teal.{_step(share)}.{name}") for name in ("loss", "executed"))
        if losses:
            rows.append([percent(1 - share), mean_and_spread(losses, ".4f"), number(sum(executed) / len(executed), 3)])
    note = (
        "The dense arm after training, with thresholds calibrated on training rows. This pass computes everything and "
        "sets small inputs to 0."
    )
    columns = ["inputs below their threshold", "loss", "share of MLP FLOPs left"]
    section = Section(title="Training-free thresholds (TEAL)", columns=columns, rows=rows, notes=[note])
    return markdown([section]).strip("\n") if rows else ""


COMPARED = (
    ArmComparison(key="loss_ratio", title="loss / dense - 1", against=DENSE, format="+.2%"),
    *(
        ArmComparison(
            key="evaluation.ways.executed.loss",
            title="executed loss in nats",
            against=f"narrow {share:g}",
            arms=[name.format(share) for name in names],
        )
        for share, names in zip(
            SHARES, (["groups {:g}", *(f"{name} {{:g}}" for name in CONTROLS)], ["groups {:g}"]), strict=True
        )
    ),
)
FFN_GROUPS = Study(
    name="ffn_groups",
    purpose="Neuron groups that are off for whole chunks, against narrower MLPs of equal FLOPs, random groups and TEAL",
    about=(
        f"The neurons of an MLP are divided into {GROUPS} groups. For each chunk of {CHUNK} tokens, a router that has "
        "seen only earlier tokens keeps a share of the groups; the others are not multiplied, in training as in "
        "generation. *narrow* is a SwiGLU with that share of the neurons. The capacity falls from 1 over the first 40 "
        "% of the training, except in *no warm-up* and in *random*, which draws its groups; *balanced* adds a bias "
        "for groups that are on less often than others. Losses are those of the executed pass."
    ),
    arms=arms,
    seeds=SEEDS,
    measure=measured,
    derive=derive,
    claims=partial(as_claims, compared=COMPARED),
    details=details,
    columns=(
        Column(key="training.parameters", title="parameters (M)", format=".2f", unit=1e6),
        Column(key="evaluation.ways.executed.loss", title="loss, executed", format=".4f", better="low"),
        Column(key="loss_ratio", title="loss / dense - 1", format="+.2%"),
        Column(key="mlp_ratio", title="MLP FLOPs / dense", format=".3f"),
        Column(key="evaluation.flops_per_token.counted", title="MFLOPs/token", format=".2f", unit=1e6, relative=True),
        Column.speed("training_speed", "training tokens/s"),
        Column.speed("comparison.speed.decode 1", "decoding tokens/s"),
    ),
)
