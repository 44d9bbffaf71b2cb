"""A study of MLP neurons whose activation is exactly 0: how many bytes decoding then reads, and at what loss.

To decode a token, the weights of a neuron whose activation is exactly 0 (as ReLU makes it) need not be read; the output
stays the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from torch import Tensor

from skipstone.adapt.harden import harden, mean_logits
from skipstone.core.strict import PlainDict
from skipstone.evaluate.tables import Section, markdown, number, percent
from skipstone.measure.passes import PASSES
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.loading import from_tensors
from skipstone.runs import Run
from skipstone_studies import protocol
from skipstone_studies import protocol_page as pages
from skipstone_studies.claims import ByArm, Claim, judge, paired_differences, values
from skipstone_studies.quality.teal import measure_teal
from skipstone_studies.study import Column, Figures, RecipeDict, Study
from skipstone_studies.text_loss import by_block, rows, spaced

BLOCKS = 6
DENSE, NARROW, POLYGLU = "swiglu", "swiglu-narrow", "polyglu-price"
NARROWER = 0.6  # share of the neurons of the narrow arm
RELU_SHARE = 0.75  # of the neurons of a fixed mix; the others use SiLU
PRICE = 0.001  # of activations: .003 leaves a tenth of the neurons on after 500 steps
POLYGLU_PRICE = 0.03  # of neurons
# Budgets are ten bytes for each parameter of a block.
SCALES: dict[str, PlainDict] = {
    "laptop": {"width": 96, "heads": 3, "context": 256, "rows": 8, "budget": 4e13, "test_rows": 4096},
    "paper": {"width": 128, "heads": 4, "context": 256, "rows": 32, "budget": 1.05e14},
    "quick": {"width": 16, "heads": 2, "context": 32, "rows": 4, "budget": 2e9, "test_rows": 16, "tuning_rows": 16},
}
NEURONS = {"laptop": 256, "paper": 344, "quick": 48}
RATE = 2e-3  # for all arms: they differ in an activation only
PARTS = {"paper": 2}  # micro-batches of 16 rows, which fit into the caches
LEAST_TOKENS = {"laptop": 2048, "quick": 1}  # of a step: with 8,192, a run of the laptop has only 840 steps
SEEDS = {"laptop": (0, 1, 2), "paper": (0, 1, 2), "quick": (0,)}
TEAL = (0.15, 0.25, 0.4)  # shares of small inputs of the dense model's MLPs that are set to 0 after training
CALIBRATION, JUDGED = 128, 1024  # rows
MOST = 0.01  # nats that fewer bytes may cost
PROMISED = 0.8  # share of the bytes, the least saving that was announced


def arms(scale: str, corpus: str = "distinct:python-code") -> dict[str, RecipeDict]:
    """Return the recipes by name: SwiGLU, a narrower one, ReGLU, a fixed mix of ReLU and SiLU neurons, and PolyGLU.

    Each is a dict of settings that makes one of the compared models. ReGLU and the mix appear with and without a
    penalty (price) on activations that are not 0. scale: "laptop", "paper" or "quick". corpus: name of the text.
    """
    recipe, neurons = partial(_recipe, scale, corpus), NEURONS[scale]
    relu = round(RELU_SHARE * neurons)
    mix = {"name": "fixed_mix", "groups": [{"relu": relu, "silu": neurons - relu}] * BLOCKS}
    found = {DENSE: recipe(neurons, "silu"), "reglu": recipe(neurons, "relu", 0.0)}
    found |= {"reglu-price": recipe(neurons, "relu", PRICE), "mix": recipe(neurons, mix, 0.0)}
    polyglu = {"name": "polyglu", "preference_scale": 64, "price": POLYGLU_PRICE}
    return {
        **found,
        "mix-price": recipe(neurons, mix, PRICE),
        NARROW: recipe(round(NARROWER * neurons), "silu"),
        POLYGLU: recipe(neurons, polyglu),
    }


def _recipe(scale: str, corpus: str, neurons: int, activation: object, price: float | None = None) -> RecipeDict:
    size: Mapping[str, object] = SCALES[scale]
    named = {name: size[name] for name in ("test_rows", "tuning_rows") if name in size}
    zeros = {} if price is None else {"neuron_groups": {"decision": "zeros", "price": price}}
    return protocol.planned(
        model={
            "vocab_size": protocol.VOCABULARY,
            "hidden_size": size["width"],
            "num_attention_heads": size["heads"],
            "num_hidden_layers": BLOCKS,
            "intermediate_size": neurons,
            "activation": activation,
            **zeros,
        },
        data={"corpus": corpus, "tokenizer": "byte", "context": size["context"]},
        train={"batch_size": size["rows"], "gradient_accumulation": PARTS.get(scale, 1)},
        protocol={
            "rate": RATE,
            "tuning": 0.0,
            "budget": size["budget"],
            **named,
            **({"least_tokens": LEAST_TOKENS[scale]} if scale in LEAST_TOKENS else {}),
        },
    )


def made(recipe: RecipeDict, folder: Path, resume: bool, callbacks: Sequence[object]) -> None:
    """Train one of the compared models; all of a seed start from the weights of one dense model where shapes agree.

    recipe: the model's recipe. folder: the run folder. resume: whether to continue an interrupted training. callbacks:
    further callbacks of the trainer.
    """
    protocol.tuned_run(recipe, folder, resume, callbacks, blocks=BLOCKS)  # type: ignore[arg-type]


def measured(folder: Path) -> Figures:
    """Return the figures of one run folder, with shares of neurons that are not 0 and bytes read in decoding.

    folder: the run folder. Keys: those of `protocol.measured`, such as `loss` (nats per byte on the test split) and
    `training_flops`; `on`, by block the share of neurons that are not 0, None if all are read; `mlp_read` and `read`,
    the bytes of the MLPs' and of all matrices that a decoded token reads, divided by those of the arm (compared recipe)
    "swiglu". Only that arm has `teal`, by the share of small inputs of the MLPs that are set to 0 after training:
    `loss`, the increase of the loss in nats, and `mlp_read`, the share of bytes left. PolyGLU is measured with one
    fixed activation per neuron; `mixed_loss` is its loss before that, and `relu` by block the share of neurons with
    ReLU.
    """
    figures = protocol.measured(folder)
    recipe, model = protocol.recipe_of(folder), Run(folder).load_model().eval()
    data = protocol.data_of(recipe["data"], "test")
    calibration = list(rows(protocol.data_of(recipe["data"]), range(CALIBRATION)))
    if folder.name.rpartition("-seed")[0] == POLYGLU:
        model = _hardened(model, calibration)
        parts = by_block(model, data, recipe["protocol"].get("test_rows"))
        loss = sum(part.nats for part in parts) / figures["predictions"]
        groups = model.config.activation_options["groups"]
        relu = [counts.get("relu", 0) / model.config.intermediate_size for counts in groups]
        figures = {**figures, "mixed_loss": figures["loss"], "loss": loss, "relu": relu}
        figures = {**figures, "blocks": [part.loss for part in parts]}
    (found,) = by_block(model, data, JUDGED, 1)
    on = [layer["neuron_groups"]["on"] for layer in found.summaries.layers() if "neuron_groups" in layer]
    width, neurons = model.config.hidden_size, model.config.intermediate_size
    full = 3 * width * NEURONS[folder.parent.name]
    active = sum(on) / len(on) if on else 1.0
    mlp = width * neurons * (1 + 2 * active)
    rest = 4 * width**2 + width * protocol.VOCABULARY / BLOCKS
    figures = {**figures, "on": on or None, "mlp_read": mlp / full, "read": (mlp + rest) / (full + rest)}
    if folder.name.rpartition("-seed")[0] != DENSE:
        return figures
    judged = spaced(len(data.validation), JUDGED)
    teal = {}
    for share in TEAL:
        cut = measure_teal(model, PASSES["executed"], calibration, rows(data, judged), share)
        teal[f"{share:.0%}"] = {"loss": cut.loss - found.loss, "mlp_read": 1 - cut.sparsity}
    return {**figures, "teal": teal}


def _hardened(model: SkipstoneForCausalLM, calibration: Sequence[Mapping[str, Tensor]]) -> SkipstoneForCausalLM:
    """Return PolyGLU's model with one fixed activation per neuron, in which neurons that are exactly 0 are left out.

    calibration: batches on which each neuron's strongest activation is found.
    """
    hardened = harden(model, mean_logits(model, PASSES["executed"], calibration))
    hardened.config.neuron_groups = {"decision": "zeros"}
    return from_tensors(hardened.config, hardened.state_dict(), hardened.dtype).eval()


COLUMNS = (
    Column(key="loss", title="test loss, nats a byte", format=".4f", better="low"),
    Column(key="mlp_read", title="bytes of the MLPs read for a decoded token", format=".1%"),
    Column(key="read", title="bytes of all weights", format=".1%"),
    Column(key="training_flops.executed", title="training TFLOPs", format=".2f", unit=1e12, relative=True),
    Column(key="training.tokens", title="bytes of text read, M", format=".2f", unit=1e6),
    Column(key="training.seconds", title="seconds", format=",.0f"),
    Column(key="gflops_per_core_second", title="GFLOP/s per core", format=".1f"),
)


def claims(figures: ByArm) -> Iterator[Claim]:
    """Yield two claims for each arm with their verdicts: on its loss, and on the bytes that its MLPs read.

    The loss is claimed to be at most .01 nats above SwiGLU's, and the bytes of MLPs that are read to decode a token to
    be at most 80 % of SwiGLU's. figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of
    the compared recipes.
    """
    for arm in figures:
        if arm == DENSE or DENSE not in figures:
            continue
        text = f"test loss at most {MOST} nats above {DENSE}"
        yield from judge(arm, text, paired_differences(figures, arm, DENSE, pages.LOSS), most=MOST, form="+.4f")
        text = f"reads at most {PROMISED:.0%} of the bytes of {DENSE}'s MLPs for a decoded token"
        yield from judge(arm, text, values(figures, arm, "mlp_read"), most=PROMISED, form=".3f")


def details(figures: ByArm) -> str:
    """Return the Markdown below the table: loss differences, shares of neurons that are not 0, and TEAL as a control.

    TEAL sets small inputs of the MLPs' matrices to 0 without training. figures: the figures of every run, {arm: {seed:
    nested dict}}, where an arm is one of the compared recipes.
    """
    parts = [
        *(pages.differences(figures, reference, refused=False) for reference in (DENSE, NARROW)),
        pages.NOTE,
        _on(figures),
        _thresholds(figures),
        pages.length(figures, DENSE),
    ]
    return "\n\n".join(part for part in parts if part)


def _on(figures: ByArm) -> str:
    shown = []
    for arm, seeds in figures.items():
        by_seed = [found["on"] for found in seeds.values() if found.get("on")]  # None where all neurons are read
        if by_seed:
            shown.append([arm, *(percent(fmean(of_block)) for of_block in zip(*by_seed, strict=True))])
    columns = ["arm", *(f"block {i}" for i in range(BLOCKS))]
    title = "Neurons whose activation is not 0, mean over tokens and seeds"
    return markdown([Section(title=title, columns=columns, rows=shown)]).strip("\n") if shown else ""


def _thresholds(figures: ByArm) -> str:
    found = []
    for share in (f"{share:.0%}" for share in TEAL):
        losses, read = (values(figures, DENSE, f"teal.{share}.{name}") for name in ("loss", "mlp_read"))
        if losses:
            found.append([share, percent(sum(read) / len(read)), number(sum(losses) / len(losses), 4)])
    note = (
        f"The arm {DENSE} after training: inputs of its MLPs below thresholds from {CALIBRATION} validation rows are "
        "set to 0. This is an estimate of bytes; the pass computes everything."
    )
    columns = ["small inputs set to 0", "bytes of the MLPs left", "nats added"]
    title = "Without training for it: small inputs set to 0 (TEAL, arXiv 2408.14690)"
    return markdown([Section(title=title, columns=columns, rows=found, notes=[note])]).strip("\n") if found else ""


ABOUT = (
    "A neuron whose activation is exactly 0 contributes nothing, so its row of the up matrix and its column of "
    "the down matrix need not be read when one row is decoded (`neuron_groups: {decision: zeros}`); the output "
    "does not change. ReLU gives such zeros, SiLU and GELU do not. These are byte models of 6 blocks (width "
    "96; paper: 128), trained on ten bytes for each parameter of their blocks, with steps of 2,048 bytes "
    "(paper: 8,192), one learning rate that falls to 0, and the weights of the last tenth of the steps "
    "averaged. The text is the source code of installed packages, split by package, without near-copies.\n\n"
    f"*swiglu* is the reference; *swiglu-narrow* has {NARROWER:.0%} of its neurons and gets the same training "
    f"FLOPs. *reglu* uses ReLU; *mix* uses ReLU for {RELU_SHARE:.0%} of the neurons and SiLU for the others, "
    f"which are always on. *-price* adds {PRICE:g} times the mean of |activation| to the training loss. "
    f"*polyglu-price* lets each neuron choose among ReLU, tanh, SiLU and GELU, pays {POLYGLU_PRICE:g} times the "
    "expected share of neurons that are not 0, and is judged hardened, with one function a neuron.\n\n"
    "Losses are those of the executed pass, in nats a byte, on rows that are evenly spaced over the test "
    "split. The bytes are those of the matrices, with the head, in one format. Models this small decode from "
    "the caches: for time, see [neurons_decode](neurons_decode.md)."
)
EXACT_ZEROS = Study(
    name="exact_zeros",
    purpose="do exact zeros behind ReLU save 20 to 40 % of an MLP's bytes in decoding at no loss?",
    about=ABOUT,
    arms=arms,
    seeds=SEEDS,
    columns=COLUMNS,
    make=made,
    measure=measured,
    measure_together=None,
    claims=claims,
    details=details,
)
