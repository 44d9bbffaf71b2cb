"""The model and training of the paper on Token-Selective Attention (arXiv 2605.05222), at its sizes and smaller ones.

Comments mark choices that the paper's code leaves open. One difference at either scale: the paper's AdamW does not
decay embeddings, while ours decays them like every matrix.
"""

from __future__ import annotations

from skipstone.core.strict import PlainDict
from skipstone.model.released import tsa
from skipstone.presets import TSA_BASE
from skipstone_studies.study import RecipeDict

Mechanisms = list[PlainDict]
GATED = "1:"  # every block but the first
SEEDS = {"laptop": (0, 1, 2), "paper": (42, 43, 44)}
# As recipes/tsa-hard.yaml: training runs the executed pass, and gates learn from the gradient at their block's output.
# CONSTANT is for arms whose decisions read no scores.
HARD: PlainDict = {"training": "hard", "hard_gain": "gate", "depth_weight": 0.0}
LEARNED: PlainDict = {"guidance": True}
ALONE: PlainDict = {"kv": "kept"}  # skipped tokens give no keys and values
CONSTANT: PlainDict = {"gate": "constant"}
# laptop: our sizes, with a higher learning rate; in so few steps the paper's would hardly move the gates.
LANGUAGE: dict[str, PlainDict] = {
    "laptop": {
        "model": {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
        "context": 64,
        "train": {"steps": 600, "batch_size": 32, "learning_rate": 2e-3, "warmup_steps": 30},
    },
    "paper": {
        "model": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8},
        "context": 128,
        # Validated often, with the best model kept: the text is read 46 times, and each arm overfits at another step.
        "train": {
            "steps": 5000,
            "batch_size": 64,
            "learning_rate": 3e-4,
            "warmup_steps": 0,
            "eval_every": 250,
            "keep_best": True,
        },
    },
}


def language(scale: str, data: PlainDict, mechanisms: Mechanisms, blocks: int | None = None) -> RecipeDict:
    """Return the recipe of a model that is trained on text with the decoder of arXiv 2605.05222.

    scale: "laptop" or "paper", for sizes and training. data: the recipe's section `data`. mechanisms: entries of the
    model's `mechanisms`; [] means dense. blocks: number of blocks; None means the scale's.
    """
    size = LANGUAGE[scale]
    depth = {} if blocks is None else {"num_hidden_layers": blocks}
    return recipe({**size["model"], **depth}, {"context": size["context"], **data}, size["train"], mechanisms)


def recipe(model: PlainDict, data: PlainDict, train: PlainDict, mechanisms: Mechanisms) -> RecipeDict:
    """Return the recipe of the decoder of arXiv 2605.05222 with `mechanisms` instead of the gates of that paper.

    model: fields of SkipstoneConfig that replace the paper's. data, train: sections of the recipe. mechanisms: entries
    of the model's `mechanisms`; [] means dense.
    """
    base = {name: value for name, value in TSA_BASE.items() if name != "mechanisms"}
    return {
        "model": {**base, **model, **({"mechanisms": mechanisms} if mechanisms else {})},
        "data": data,
        "train": {"weight_decay": 0.1, "eval_every": 0, "save_every": train["steps"] // 2, **train},
    }


def gated(depth_weight: float = tsa.LANGUAGE, **options: object) -> Mechanisms:
    """Return the `mechanisms` entries for the gates of arXiv 2605.05222: soft in training, skipping in generation.

    Soft gates scale the updates of all tokens.

    depth_weight: the paper's lambda, the coefficient of its penalty on open gates. options: further options of the
    entry, such as `start_bias`.
    """
    return [tsa.gate(depth_weight, execution="hard", **options)]


def early_exit() -> Mechanisms:
    """Return the `mechanisms` entries of a recipe for early exit on all blocks but the first."""
    return [{"name": "early_exit", "layers": GATED}]


def hard(capacity: float) -> Mechanisms:
    """Return the `mechanisms` entries for gates that keep the share `capacity` of tokens in all blocks but the first.

    Tokens are skipped in training as in generation.
    """
    return [tsa.gate(execution="hard", capacity=capacity, **HARD, **LEARNED)]


def random(capacity: float) -> Mechanisms:
    """Return the `mechanisms` entries of a control that keeps the share `capacity` of tokens at random.

    All blocks but the first are routed. Tokens are skipped in training as in generation, and each block has one learned
    factor on its updates.
    """
    return [tsa.gate(execution="hard", capacity=capacity, decision="random", **HARD, **CONSTANT)]


def shallower(scale: str, data: PlainDict) -> dict[str, RecipeDict]:
    """Return the recipes by name of dense models with fewer blocks than the model of the scale: one each with 2, 3, ...

    scale: "laptop" or "paper". data: the recipe's section `data`.
    """
    blocks = LANGUAGE[scale]["model"]["num_hidden_layers"]
    return {f"dense-{fewer}": language(scale, data, [], fewer) for fewer in range(2, blocks)}
