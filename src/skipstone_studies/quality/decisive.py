"""The studies `decisive`: whether routing lowers the loss on text where depth does.

They compare dense models, learned routers, and tokens that are chosen without learning.

All models have equal training FLOPs. `DECISIVE` has models of width 128, `DECISIVE_NARROW` models so narrow that a
quarter of an hour of one core trains them on more than a hundred bytes a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

from skipstone.core.strict import PlainDict
from skipstone_studies import protocol
from skipstone_studies import protocol_page as pages
from skipstone_studies.claims import ByArm, Claim
from skipstone_studies.quality import depth
from skipstone_studies.study import Column, RecipeDict, Study

BLOCKS = 8
FULL, RIVAL, CHANCE = "dense-8", "dense-5", "random"
SEGMENT = "2:6"  # four of the eight blocks
SHARE = 0.125  # of the tokens of a routed block; boundaries keep .124 of the bytes of Python code
# On a laptop, steps have 2,048 bytes: with 8,192, a run of 1e13 FLOPs has 94 steps and ends at 2.92 nats.
SCALES: dict[str, PlainDict] = {
    "laptop": {"width": 128, "heads": 4, "context": 256, "rows": 8, "budget": 1e13, "test_rows": 1024},
    "paper": {"width": 128, "heads": 4, "context": 256, "rows": 32, "budget": 1e14},
    "quick": {"width": 16, "heads": 2, "context": 32, "rows": 4, "budget": 2e9, "test_rows": 16, "tuning_rows": 16},
}
RATES = {"laptop": 1.5e-3}  # where the search begins, or the only one
TUNED = {"laptop": 0.0}  # a quarter of such a run is too short: dense-8 ends it at 2.9 nats whatever the rate
PARTS = {"paper": 2}  # micro-batches of 16 rows, which fit into the caches
LEAST_TOKENS = {"laptop": 2048, "quick": 1}  # of a step, where it is not the protocol's
# Width and training FLOPs. At 1e14, an arm that skips would read the text of 116 M bytes more than once.
NARROW = {"laptop": (32, 3e13), "quick": (16, 2e9)}
SEEDS = {"laptop": (0,), "paper": (0, 1, 2, 3), "quick": (0,)}
# One decision for the segment, or Mixture-of-Depths in every other block. Updates are whole (weight none) unless the
# router is the paper's, whose scores are the weights.
PAPERS = {"decision": "ema_threshold", "weight": "raw", "capacity_warmup": 0.2}
MOD = {"name": "mixture_of_depths", "layers": "1::2", "capacity": SHARE}
STACK = {"name": "segment", "layers": SEGMENT, "capacity": SHARE}
ROUTED: dict[str, PlainDict] = {
    "boundary": {**STACK, "decision": "boundary"},
    CHANCE: {**STACK, "decision": "random"},
    "raw-ema": {**STACK, **PAPERS},
    "benefit": {**STACK, "benefit": True, "auxiliary_weight": 1.0, "capacity_warmup": 0.2},
    "chunks": {"name": "dynamic_chunking", "layers": SEGMENT, "share": SHARE},
    "layer-dropout": {"name": "layer_dropout", "rate": 0.2},
    "boundary-alternate": {**MOD, "decision": "boundary"},
    "raw-ema-alternate": {**MOD, **PAPERS},
}


def arms(scale: str, corpus: str = "distinct:python-code") -> dict[str, RecipeDict]:
    """Return the recipes by name, with equal training FLOPs: dense models of 8 and 5 blocks, and models that skip.

    Each is a dict of settings that makes one of the compared models. Models that skip choose tokens by boundaries of
    words, at random or by learned routers; one chooses no tokens, but leaves out whole blocks in training (layer
    dropout). scale: "laptop", "paper" or "quick". corpus: name of the text, as in data.corpus.
    """
    recipe = partial(arm, scale, corpus)
    routed = {name: recipe(BLOCKS, [mechanism]) for name, mechanism in ROUTED.items()}
    return {FULL: recipe(BLOCKS), RIVAL: recipe(5), **routed}


def narrow_arms(scale: str, corpus: str = "distinct:python-code") -> dict[str, RecipeDict]:
    """Return the recipes by name of dense models and models that skip, all of them narrow, at equal training FLOPs.

    Each is a dict of settings that makes one of the compared models. They differ from those of `arms` in width and
    training FLOPs, which are in `NARROW`. scale: "laptop" or "quick". corpus: name of the text, as in data.corpus.
    """
    width, budget = NARROW[scale]
    recipe = partial(depth.arm, scale, corpus, width=width, budget=budget)
    routed = {name: recipe(BLOCKS, mechanisms=[mechanism]) for name, mechanism in ROUTED.items()}
    return {FULL: recipe(BLOCKS), RIVAL: recipe(5), **routed}


def arm(
    scale: str, corpus: str, blocks: int, mechanisms: list[PlainDict] | None = None, budget: float = 1.0
) -> RecipeDict:
    """Return the recipe of one arm: a byte model with the training protocol of this study.

    scale: "laptop", "paper" or "quick", for sizes and training FLOPs. corpus: name of the text. blocks: number of
    blocks. mechanisms: entries of the model's `mechanisms`; None means dense. budget: training FLOPs divided by those
    of the scale.
    """
    size: Mapping[str, object] = SCALES[scale]
    least = {"least_tokens": LEAST_TOKENS[scale]} if scale in LEAST_TOKENS else {}
    named = {name: size[name] for name in ("test_rows", "tuning_rows") if name in size}
    return protocol.planned(
        model={
            "vocab_size": protocol.VOCABULARY,
            "hidden_size": size["width"],
            "num_attention_heads": size["heads"],
            "num_hidden_layers": blocks,
            **({"mechanisms": mechanisms} if mechanisms else {}),
        },
        data={"corpus": corpus, "tokenizer": "byte", "context": size["context"]},
        train={"batch_size": size["rows"], "gradient_accumulation": PARTS.get(scale, 1), "precision": "bf16"},
        protocol={
            "rate": RATES.get(scale, 6e-3),
            **({"tuning": TUNED[scale]} if scale in TUNED else {}),
            "budget": budget * float(str(size["budget"])),
            **named,
            **least,
        },
    )


COLUMNS = (
    Column(key="loss", title="test loss, nats a byte", format=".4f", better="low"),
    Column(key="validation_loss", title="validation loss", format=".4f"),
    Column(key="training_flops.executed", title="training TFLOPs", format=".2f", unit=1e12, relative=True),
    Column(key="forward_flops", title="forward MFLOPs/token", format=".3f", unit=1e6, relative=True),
    Column(key="training.tokens", title="bytes read, M", format=".2f", unit=1e6),
    Column(key="tuning.rate", title="rate", format=".2g"),
    Column(key="training.seconds", title="seconds", format=",.0f"),
    Column(key="gflops_per_core_second", title="GFLOP/s per core", format=".1f"),
)
EQUAL = "All arms are trained for the same FLOPs (forward and backward), so an arm that skips reads more text. "
CONTROL = (
    f"The routed arms keep about {SHARE:.1%} of the bytes, by one decision for blocks 2 to 5 (a segment), or by one in "
    "every other block (*alternate*): "
    "*boundary* by a fixed rule, the first byte after a word (SpaceByte, arXiv 2404.14408); *random*, drawn anew in "
    "each step; *raw-ema*, the router of Mixture-of-Depths, whose score weighs the update, with a threshold that "
    "follows the scores; *benefit*, a router that learns how much the segment lowers a token's loss (its measuring "
    "passes, 4 % of a step of 32 rows and 8 % of one of 8, are not in its FLOPs); *chunks*, boundaries that a router "
    "on neighbouring tokens learns (H-Net, arXiv 2507.07955). *layer-dropout* leaves whole blocks "
    "out in training only. *boundary* is the control that could say no to the set-up: if it does not win, a learned "
    "router cannot be expected to.\n\n" + pages.COLUMNS_NOTE
)
ABOUT = (
    EQUAL + "They are "
    "byte models of width 128 and 8 blocks (*dense-5* has 5) with steps of 8,192 bytes (laptop: 2,048). The learning "
    "rate was tuned for each arm on runs of a quarter of the length (laptop: one rate for all, because dense-8 ends "
    "such a run at 2.9 nats whatever its rate) and falls to 0; the weights of the last tenth of the steps are averaged."
    " The text is the source code of installed packages, split by package, without near-copies.\n\n" + CONTROL
)
ABOUT_NARROW = (
    EQUAL + "They are byte models of width 32 with one head and 8 blocks (*dense-5* has 5), trained in fp32 in steps "
    "of 2,048 bytes. At width 32, 8 blocks and 5 are about level from 150 bytes a parameter on ([depth](depth.md)); if "
    "width 128 needs as many, that is 3e15 FLOPs a run or 13 hours of a core. The learning rate was tuned for each arm "
    f"on runs of {depth.LONGEST_TUNING:.1e} FLOPs and falls to 0; the weights of the last tenth of the steps are "
    "averaged. The text is that of [decisive](decisive.md).\n\n" + CONTROL
)

GOES_ON = (
    "The command that goes on: `skipstone reproduce decisive --scale paper` trains every arm for 1e14 FLOPs with four "
    "seeds, about half an hour of one core a run and as much again for the rates."
)


def claims(figures: ByArm) -> Iterator[Claim]:
    """Yield two claims on each model's test loss, with verdicts: against the dense model, and against random tokens.

    The claims are that the loss is at least .02 nats per byte below that of the dense model of 8 blocks, and below that
    of the model that keeps random tokens. figures: the figures of every run, {arm: {seed: nested dict}}, where an arm
    is one of the compared recipes. The verdict is "no headroom" if the loss of the dense model of 8 blocks is not at
    least .02 nats below that of the dense model of 5 blocks, because then depth does not pay.
    """
    return pages.claims(figures, pages.room_of(figures, FULL, [RIVAL]), (FULL, CHANCE))


def details(figures: ByArm) -> str:
    """Return the Markdown below the study's table: what depth gains, differences between arms, and learning rates.

    figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes. What
    depth gains is by how much the deeper of two dense models has the lower test loss.
    """
    return "\n\n".join([*_sections(figures), GOES_ON])


def narrow_details(figures: ByArm) -> str:
    """Return the Markdown below the table of narrow models: what depth gains, differences, and learning rates.

    What depth gains is the test loss of the dense model of 5 blocks minus that of the dense model of 8. Differences are
    those between the test losses of compared recipes (arms). figures: the figures of every run, {arm: {seed: nested
    dict}}.
    """
    return "\n\n".join(_sections(figures))


def _sections(figures: ByArm) -> list[str]:
    room = pages.room_of(figures, FULL, [RIVAL])
    refused = room is None or not room.there
    parts = [
        pages.headroom_text(room, FULL, [RIVAL]),
        pages.length(figures, FULL),
        pages.unequal(figures),
        *(pages.differences(figures, reference, refused) for reference in (FULL, RIVAL, CHANCE)),
        pages.NOTE,
        pages.rates(figures),
    ]
    return [part for part in parts if part]


DECISIVE = Study(
    name="decisive",
    purpose="does routing beat dense models on text at equal training FLOPs?",
    about=ABOUT,
    arms=arms,
    seeds=SEEDS,
    columns=COLUMNS,
    make=protocol.tuned_run,
    measure=protocol.measured,
    measure_together=None,
    claims=claims,
    details=details,
)


DECISIVE_NARROW = replace(
    DECISIVE,
    name="decisive_narrow",
    purpose="does routing beat narrow dense models on text at equal training FLOPs, after a long training?",
    about=ABOUT_NARROW,
    arms=narrow_arms,
    seeds=depth.DEPTH.seeds,
    details=narrow_details,
)
