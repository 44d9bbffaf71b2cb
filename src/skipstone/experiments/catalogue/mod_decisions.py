"""Which decision should Mixture-of-Depths make? All of them on the same text, oracle beside causal, with controls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skipstone.experiments import measure
from skipstone.experiments.registry import Column, Experiment, Figures, Recipe

CAPACITY = 0.125
SIZES: dict[str, dict[str, Any]] = {
    "laptop": {"hidden_size": 128, "num_attention_heads": 4, "context": 128, "steps": 500, "rate": 2e-3},
    "paper": {"hidden_size": 512, "num_attention_heads": 8, "context": 512, "steps": 5000, "rate": 6e-4},
}
BLOCKS = 6
SEEDS = {"laptop": (0, 1, 2), "paper": (0, 1, 2)}
ROUTED: dict[str, dict[str, Any]] = {
    "predictor": {"decision": "predictor"},
    "threshold": {"decision": "threshold"},
    "ema_threshold": {"decision": "ema_threshold"},
    "ema_threshold-tanh": {"decision": "ema_threshold", "weight": "tanh"},
    "random": {"decision": "random"},
    "positional": {"decision": "positional"},
}


def arms(scale: str) -> dict[str, Recipe]:
    """A dense model, one of half its depth, and one routed model a decision."""
    mod = {"name": "mixture_of_depths", "layers": "1::2", "capacity": CAPACITY}
    return {
        "dense": _recipe(scale, BLOCKS),
        "dense-half-depth": _recipe(scale, BLOCKS // 2),
        **{name: _recipe(scale, BLOCKS, [{**mod, **options}]) for name, options in ROUTED.items()},
    }


def _recipe(scale: str, blocks: int, mechanisms: list[dict[str, Any]] | None = None) -> Recipe:
    size = SIZES[scale]
    return {
        "model": {
            "hidden_size": size["hidden_size"],
            "num_attention_heads": size["num_attention_heads"],
            "num_hidden_layers": blocks,
            **({"mechanisms": mechanisms} if mechanisms else {}),
        },
        "data": {"corpus": "tiny-shakespeare", "context": size["context"]},
        "train": {
            "steps": size["steps"],
            "batch_size": 16,
            "learning_rate": size["rate"],
            "warmup_steps": size["steps"] // 12,
            "eval_every": 0,
            "save_every": size["steps"] // 2,
        },
    }


def measured(folder: Path) -> Figures:
    """The usual figures, with the gap between oracle and executed loss and the realised capacity in one place."""
    figures = measure.standard(folder)
    ways = figures["evaluation"]["ways"]
    gap = ways["executed"]["loss"] / ways["oracle"]["loss"] - 1
    kept = [block["mixture_of_depths"]["capacity"] for block in ways["executed"]["layers"] if block]
    return {**figures, "gap": gap, "capacity": {str(i): share for i, share in enumerate(kept)}}


MOD_DECISIONS = Experiment(
    name="mod_decisions",
    purpose="every decision of Mixture-of-Depths beside each other: oracle and executed loss, realised capacity",
    about=(
        "Mixture-of-Depths on every other block at capacity 0.125, trained alike but for the decision; whole "
        "validation set. *Oracle* is the pass as trained, *executed* the one that generates and skips. *random* and "
        "*positional* are controls: a learned router that does no better has learned nothing."
    ),
    arms=arms,
    seeds=SEEDS,
    measure=measured,
    together=None,
    columns=(
        Column(key="evaluation.ways.oracle.loss", title="loss, oracle", format=".4f", better="low"),
        Column(key="evaluation.ways.executed.loss", title="loss, executed", format=".4f", better="low"),
        Column(key="gap", title="executed / oracle - 1", format="+.2%"),
        Column(key="evaluation.flops_per_token.counted", title="MFLOPs/token", format=".2f", unit=1e6, relative=True),
        *(Column(key=f"capacity.{i}", title=f"kept, block {2 * i + 1}", format=".3f") for i in range(BLOCKS // 2)),
    ),
)
