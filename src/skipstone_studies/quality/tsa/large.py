"""Studies of the loss of Token-Selective Attention on large corpora, which the training reads about once at most.

One is on enwik8, as in the paper (arXiv 2605.05222); one compares several FLOP budgets of gates that skip in training.
"""

from __future__ import annotations

from skipstone.core.strict import PlainDict
from skipstone_studies.quality.tsa import published as paper
from skipstone_studies.quality.tsa.recipes import early_exit, gated, hard, language, random, shallower
from skipstone_studies.quality.tsa.text import ABOUT, COLUMNS, COUNTED, EQUAL, RIVALS, on_text
from skipstone_studies.study import RecipeDict

BUDGETS = (0.2, 0.4, 0.6, 0.8)  # share of tokens that each gated block keeps
CORPORA = ("enwik8", "gcide", "python-packages")
# The paper reads characters of the whole file; a laptop reads bytes, none twice, and evaluates 2 MB of the split.
ENWIK8: dict[str, PlainDict] = {
    "laptop": {"corpus": "enwik8", "tokenizer": "byte", "sampling": "once", "validation_rows": 2048},
    "paper": {"corpus": "enwik8", "tokenizer": "char", "context": 256},
}


def enwik8_arms(scale: str) -> dict[str, RecipeDict]:
    """Return the recipes on enwik8 by name: dense, gated with two lambdas, early exit, random tokens, and fewer blocks.

    Each is a dict of settings that makes one of the compared models. Lambda is the coefficient of the penalty on open
    gates. scale: "laptop" or "paper".
    """
    data = ENWIK8[scale]
    return {
        "dense": language(scale, data, []),
        "tsa": language(scale, data, gated()),
        "lambda=0.05": language(scale, data, gated(0.05)),
        "early-exit": language(scale, data, early_exit()),
        "random=0.5": language(scale, data, random(0.5)),
        **shallower(scale, data),
    }


def frontier_arms(scale: str) -> dict[str, RecipeDict]:
    """Return the recipes by name: gates trained hard for several FLOP budgets, fewer blocks, early exit, random tokens.

    Each is a dict of settings that makes one of the compared models. scale: "laptop" or "paper". Trained hard means
    with tokens skipped during training.
    """
    data = ENWIK8["laptop"]
    return {
        "dense": language(scale, data, []),
        **shallower(scale, data),
        **{f"hard={share:g}": language(scale, data, hard(share)) for share in BUDGETS},
        **{f"random={share:g}": language(scale, data, random(share)) for share in BUDGETS},
        "early-exit": language(scale, data, early_exit()),
    }


TSA_ENWIK8 = on_text(
    name="tsa_enwik8",
    purpose="Token-Selective Attention on enwik8 or another large corpus, against early exit and fewer blocks",
    about=f"{ABOUT} {EQUAL} At laptop scale, the text is read by byte and at most once. The corpus is enwik8 or, if "
    "that is not available, another large corpus, which the table names; the paper's losses are shown on enwik8 only.",
    arms=enwik8_arms,
    corpora=CORPORA,
    columns=(*COLUMNS, *RIVALS),
    published=paper.ENWIK8,
    corpus="enwik8",
)
TSA_FRONTIER = on_text(
    name="tsa_frontier",
    purpose="Token-Selective Attention trained as executed, at four budgets, against fewer blocks and random tokens",
    about=(
        "Token-Selective Attention trained on the pass that is executed. *hard* keeps the named share of tokens in "
        "every block but the first, by a running quantile of the gates' scores. Updates of kept tokens are scaled by "
        "their gate 1 - p; the others provide keys and values and get no update. *random* keeps the same share of "
        "random tokens, with one learned gain per block. *Soft* here means the loss of the pass that is trained. "
        f"{COUNTED} {EQUAL} The text is read by byte and at most once."
    ),
    arms=frontier_arms,
    corpora=CORPORA,
    columns=(*COLUMNS, *RIVALS),
    published={},
)
