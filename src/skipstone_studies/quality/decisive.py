"""Does routing win on text where depth pays? Dense models, controls and routers at equal training FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from skipstone.core.strict import PlainDict
from skipstone_studies import protocol
from skipstone_studies.study import Column, RecipeDict, Study

BLOCKS = 8
LOSS = "loss"
FULL, RIVAL = "dense-8", "dense-5"
SEGMENT = "2:6"  # four of the eight blocks
SCALES: dict[str, PlainDict] = {
    "laptop": {"width": 128, "heads": 4, "context": 256, "rows": 32, "budget": 1e13, "test_rows": 1024},
    "paper": {"width": 128, "heads": 4, "context": 256, "rows": 32, "budget": 1e14},
    "quick": {"width": 16, "heads": 2, "context": 32, "rows": 4, "budget": 2e9, "test_rows": 16, "tuning_rows": 16},
}
SEEDS = {"laptop": (0,), "paper": (0, 1, 2, 3), "quick": (0,)}


def arms(scale: str, corpus: str = "distinct:python-code") -> dict[str, RecipeDict]:
    """Return the arms of equal training FLOPs, in the order of what they decide."""
    recipe = partial(_recipe, SCALES[scale], corpus)
    return {FULL: recipe(BLOCKS), RIVAL: recipe(5)}


def _recipe(
    size: Mapping[str, object], corpus: str, blocks: int, mechanisms: list[PlainDict] | None = None
) -> RecipeDict:
    tiny = {"least_tokens": 1} if size["width"] == SCALES["quick"]["width"] else {}
    asked = {name: size[name] for name in ("budget", "test_rows", "tuning_rows") if name in size}
    return protocol.planned(
        model={
            "vocab_size": protocol.VOCABULARY,
            "hidden_size": size["width"],
            "num_attention_heads": size["heads"],
            "num_hidden_layers": blocks,
            **({"mechanisms": mechanisms} if mechanisms else {}),
        },
        data={"corpus": corpus, "tokenizer": "byte", "context": size["context"]},
        train={"batch_size": size["rows"], "gradient_accumulation": 2, "precision": "bf16"},
        protocol={"rate": 6e-3, **asked, **tiny},
    )


COLUMNS = (
    Column(key=LOSS, title="test loss, nats a byte", format=".4f", better="low"),
    Column(key="validation_loss", title="validation loss", format=".4f"),
    Column(key="training_flops.executed", title="training TFLOPs", format=".2f", unit=1e12, relative=True),
    Column(key="forward_flops", title="forward MFLOPs/token", format=".3f", unit=1e6, relative=True),
    Column(key="training.tokens", title="bytes read, M", format=".2f", unit=1e6),
    Column(key="tuning.rate", title="rate", format=".2g"),
    Column(key="training.seconds", title="seconds", format=",.0f"),
    Column(key="gflops_per_core_second", title="GFLOP/s per core", format=".1f"),
)

DECISIVE = Study(
    name="decisive",
    purpose="does routing beat dense models on text at equal training FLOPs?",
    arms=arms,
    seeds=SEEDS,
    columns=COLUMNS,
    make=protocol.tuned_run,
    measure=protocol.measured,
    measure_together=None,
)
