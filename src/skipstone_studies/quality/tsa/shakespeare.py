"""Studies of Token-Selective Attention on Tiny-Shakespeare: controls, and the paper's table and sweep over lambda.

Lambda is the coefficient of the penalty on open gates. The paper is arXiv 2605.05222.
"""

from __future__ import annotations

from skipstone_studies.quality.tsa import published as paper
from skipstone_studies.quality.tsa.recipes import early_exit, gated, hard, language, random, shallower
from skipstone_studies.quality.tsa.text import ABOUT, COLUMNS, EQUAL, RIVALS, on_text
from skipstone_studies.study import RecipeDict

LAMBDAS = {"laptop": (0.0, 0.01, 0.05, 0.1), "paper": (0.0, 0.005, 0.01, 0.05, 0.1, 0.5)}
DRAWN = {"laptop": (0.5,), "paper": (0.95, 0.9, 0.75, 0.5)}  # at the paper's size also shares near what its gates keep
BIASES = (-5, -3, 0, 1)
SHAKESPEARE = {"corpus": "tiny-shakespeare:80-10-10", "tokenizer": "char"}


def claims_arms(scale: str) -> dict[str, RecipeDict]:
    """Return the recipes by name: the paper's table and sweep over lambda, early exit, random tokens, and fewer blocks.

    Each is a dict of settings that makes one of the compared models. Lambda is the coefficient of the penalty on open
    gates. scale: "laptop" or "paper"; the latter adds gates that skip tokens in training.
    """
    data = SHAKESPEARE
    return {
        "dense": language(scale, data, []),
        "tsa": language(scale, data, gated()),
        **{f"lambda={weight:g}": language(scale, data, gated(weight)) for weight in LAMBDAS[scale]},
        "early-exit": language(scale, data, early_exit()),
        **{f"random={share:g}": language(scale, data, random(share)) for share in DRAWN[scale]},
        **({"hard=0.5": language(scale, data, hard(0.5))} if scale == "paper" else {}),
        **shallower(scale, data),
    }


def control_arms(scale: str) -> dict[str, RecipeDict]:
    """Return the recipes by name: gates as in the paper, with other start biases, frozen or constant; random tokens.

    Each is a dict of settings that makes one of the compared models. Frozen gates are never trained; a constant gate is
    one learned factor per block. scale: "laptop" or "paper".
    """
    data = SHAKESPEARE
    return {
        "tsa": language(scale, data, gated()),
        **{f"b2={bias}": language(scale, data, gated(start_bias=float(bias))) for bias in BIASES},
        "frozen": language(scale, data, gated(learn=False)),
        "constant": language(scale, data, gated(gate="constant")),
        **{f"random={share:g}": language(scale, data, random(share)) for share in (0.75, 0.5)},
    }


TSA_SHAKESPEARE = on_text(
    name="tsa_shakespeare",
    purpose="Token-Selective Attention on Tiny-Shakespeare: the paper's table and sweep, soft and executed",
    about=f"{ABOUT} {EQUAL} *early-exit* is this package's learned early exit; the paper's is decided by confidence.",
    arms=claims_arms,
    columns=(*COLUMNS, *RIVALS),
    published=paper.SHAKESPEARE,
    corpus="tiny-shakespeare",
)
TSA_CONTROLS = on_text(
    name="tsa_controls",
    purpose="Controls for Token-Selective Attention: start bias, frozen and constant gates, random tokens",
    about=f"{ABOUT} *b2* is the router's start bias (-1 in the paper and in *tsa*). *frozen* never trains the gates' "
    "weights, *constant* learns one gate per block, and *random* keeps the named share of random tokens in each gated "
    "block.",
    arms=control_arms,
    columns=COLUMNS,
    published={},
)
