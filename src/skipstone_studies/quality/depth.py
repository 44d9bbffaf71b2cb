"""The study `depth`: models of 8 and of 5 blocks at equal training FLOPs, by width and length of training.

It shows when depth pays, that is, lowers the loss.
"""

from __future__ import annotations

from collections.abc import Iterator

from skipstone.core.strict import PlainDict
from skipstone.evaluate.tables import UNKNOWN, Section, markdown
from skipstone_studies import protocol
from skipstone_studies import protocol_page as pages
from skipstone_studies.claims import ByArm, Claim, judge, mean, paired_differences
from skipstone_studies.headroom import LEAST
from skipstone_studies.study import Column, RecipeDict, Study

DEEP, SHALLOW = 8, 5  # blocks
HEAD = 32  # width of an attention head
# Widths and training FLOPs, in the order in which they run: short ones first.
LENGTHS: dict[str, tuple[tuple[int, float], ...]] = {
    "laptop": ((32, 3e12), (32, 1e13), (32, 3e13), (64, 1e13), (64, 3e13), (32, 1e14), (64, 1e14)),
    "quick": ((16, 2e9), (16, 4e9)),
}
# Rates are tuned by runs of 7.5e11 FLOPs at most, except where depth begins to pay: there, by a quarter of the length.
IN_FULL = ((32, 3e13),)
COMMON: dict[str, PlainDict] = {
    "laptop": {"context": 256, "rows": 8, "test_rows": 4096, "tuning_rows": 256, "least_tokens": 2048},
    "quick": {"context": 32, "rows": 4, "test_rows": 16, "tuning_rows": 16, "least_tokens": 1},
}
FIRST_RATE = 4e-3
LONGEST_TUNING = 7.5e11  # training FLOPs of a run that tunes the rate


def arms(scale: str, corpus: str = "distinct:python-code") -> dict[str, RecipeDict]:
    """Return the recipes of dense models by name: for each width and length of training, one of 8 blocks and one of 5.

    Each is a dict of settings that makes one of the compared models. The length is given in training FLOPs. scale:
    "laptop" or "quick". corpus: name of the text.
    """
    return {
        name_of(blocks, width, budget): arm(scale, corpus, blocks, width, budget, in_full=(width, budget) in IN_FULL)
        for width, budget in LENGTHS[scale]
        for blocks in (DEEP, SHALLOW)
    }


def name_of(blocks: int, width: int, budget: float) -> str:
    """Return the name under which the study's table shows a model.

    blocks: its number of blocks. width: width of its residual stream. budget: its training FLOPs.
    """
    return f"dense-{blocks}-width-{width}-{budget:.0e}".replace("e+", "e")


def arm(
    scale: str,
    corpus: str,
    blocks: int,
    width: int,
    budget: float,
    mechanisms: list[PlainDict] | None = None,
    in_full: bool = False,
) -> RecipeDict:
    """Return the recipe of one arm: a byte model with this study's training protocol, whose heads have 32 channels.

    scale: "laptop" or "quick". corpus: name of the text. blocks, width: number of blocks and width of the model (one
    head if below 64). budget: training FLOPs. mechanisms: entries of the model's `mechanisms`; None means dense.
    in_full: whether the learning rate is tuned by runs of a quarter of the training's length, however long that is;
    then at most 4 rates are tried; otherwise these runs have at most 7.5e11 FLOPs each.
    """
    size = COMMON[scale]
    return protocol.planned(
        model={
            "vocab_size": protocol.VOCABULARY,
            "hidden_size": width,
            "num_attention_heads": max(1, width // HEAD),
            "num_hidden_layers": blocks,
            **({"mechanisms": mechanisms} if mechanisms else {}),
        },
        data={"corpus": corpus, "tokenizer": "byte", "context": size["context"]},
        train={"batch_size": size["rows"]},
        protocol={
            "rate": FIRST_RATE,
            "budget": budget,
            **({"most": 4} if in_full else {"tuning": min(0.25, LONGEST_TUNING / budget)}),
            **{name: size[name] for name in ("test_rows", "tuning_rows", "least_tokens")},
        },
    )


def _pairs(figures: ByArm) -> Iterator[tuple[int, float, str, str]]:
    """Yield width, training FLOPs and the names of the arms of 8 and 5 blocks, where both have run.

    figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes.
    """
    lengths = dict.fromkeys(pair for scale in LENGTHS.values() for pair in scale)
    for width, budget in lengths:
        deep, shallow = name_of(DEEP, width, budget), name_of(SHALLOW, width, budget)
        if figures.get(deep) and figures.get(shallow):
            yield width, budget, deep, shallow


def claims(figures: ByArm) -> Iterator[Claim]:
    """Yield, for each width and length of training, the claim that 8 blocks beat 5, with its verdict.

    The claim is that the test loss of 8 blocks is lower by at least .02 nats per byte. figures: the figures of every
    run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes.
    """
    for _, _, deep, shallow in _pairs(figures):
        found = paired_differences(figures, shallow, deep, pages.LOSS)
        text = f"test loss at least {LEAST} nats below {shallow} at equal training FLOPs"
        yield from judge(deep, text, found, least=LEAST, form="+.4f", blocks=pages.by_block(figures, shallow, deep))


def details(figures: ByArm) -> str:
    """Return the Markdown below the study's table: what 3 more blocks gain in each setting, and the learning rates.

    A setting is a width and a training budget.

    figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes.
    """
    return "\n\n".join(part for part in (_gains(figures), pages.NOTE, pages.rates(figures)) if part)


def _gains(figures: ByArm) -> str:
    rows = []
    for width, budget, deep, shallow in sorted(_pairs(figures)):
        read, size = mean(figures, deep, "training.tokens"), mean(figures, deep, "training.parameters")
        rows.append(
            [
                str(width),
                f"{budget:.0e}".replace("e+", "e"),
                UNKNOWN if read is None or not size else f"{read / size:.0f}",
                *pages.difference(figures, shallow, deep),
                pages.median_block(figures, shallow, deep),
            ]
        )
    columns = ["width", "training FLOPs", "bytes a parameter of 8 blocks", "seeds", "loss of 5 blocks − loss of 8"]
    title = "What three more blocks gain at equal training FLOPs"
    columns += ["error from the text alone", "median over blocks of text"]
    section = Section(title=title, columns=columns, rows=rows)
    return markdown([section]).strip("\n") if rows else ""


DEPTH = Study(
    name="depth",
    purpose="how long must a model train before depth pays?",
    about=(
        "A router that leaves out blocks can only gain where blocks are worth their FLOPs. So the studies of routing "
        f"ask first whether a model of {DEEP} blocks beats one of {SHALLOW} by {LEAST} nats at equal training FLOPs, "
        "where the smaller model reads more text ([headroom](headroom.md), [decisive](decisive.md)). This study "
        "measures that difference by width and by length of training, to find where such a study could be decided.\n\n"
        "Dense byte models with heads of 32 and a context of 256, fp32, steps of 2,048 bytes; otherwise the protocol "
        "of [decisive](decisive.md). The learning rate is tuned for each arm on runs of a quarter of the length, "
        "but of 7.5e11 FLOPs at most, except at width 32 and 3e13 FLOPs. The choice of the rate can matter as "
        "much as what is measured: how 5 blocks end there at another rate stands in the [log](../docs/log.md). "
        + pages.COLUMNS_NOTE
    ),
    arms=arms,
    seeds={"laptop": (0, 1, 2), "quick": (0,)},
    columns=(
        Column(key="loss", title="test loss, nats a byte", format=".4f"),
        Column(key="validation_loss", title="validation loss", format=".4f"),
        Column(key="training_flops.executed", title="training TFLOPs", format=".2f", unit=1e12),
        Column(key="training.tokens", title="bytes read, M", format=".2f", unit=1e6),
        Column(key="training.parameters", title="parameters, k", format=".0f", unit=1e3),
        Column(key="tuning.rate", title="rate", format=".2g"),
        Column(key="training.seconds", title="seconds", format=",.0f"),
        Column(key="gflops_per_core_second", title="GFLOP/s per core", format=".1f"),
    ),
    make=protocol.tuned_run,
    measure=protocol.measured,
    measure_together=None,
    claims=claims,
    details=details,
)
