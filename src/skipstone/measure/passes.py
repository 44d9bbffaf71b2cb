"""Forward passes that an evaluation tells apart, and which of them a model has.

oracle     decisions with sight of the whole row, as in training, noise off; gates are soft
causal     decisions that generation can make, computed by the masked executor: the specification
executed   the same decisions by the gathered executor: the very pass that skips
forced     where the data tell it: every depth mechanism keeps exactly the tokens that are known to need depth
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipstone.core.tokens import Executor
from skipstone.data.corpora import knows_difficulty
from skipstone.measure.share import INPUTS
from skipstone.mechanisms.decisions import Forced
from skipstone.model.causal_lm import CausalLMOutput, SkipstoneForCausalLM, shifted
from skipstone.model.decoder import Routing

NO_CAUSAL_FORM = "no causal form"
NEEDS_MASKS = "decided by the caller"


@dataclass(frozen=True, kw_only=True)
class Pass:
    name: str
    routing: str
    executor: Executor = "gathered"

    def arguments(self, model: SkipstoneForCausalLM, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """What forward is called with: no noise, no cache, no labels."""
        routing: Routing = self.routing  # type: ignore[assignment]
        if self.routing == "forced":
            routing = dict.fromkeys(depth_layers(model), batch["difficulty"] >= 0)
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        return {**inputs, "routing": routing, "executor": self.executor, "noise": False, "use_cache": False}

    @torch.no_grad()
    def run(self, model: SkipstoneForCausalLM, batch: Mapping[str, Tensor], **more: Any) -> CausalLMOutput:
        return model(**self.arguments(model, batch), **more)


PASSES = {
    "oracle": Pass(name="oracle", routing="oracle"),
    "causal": Pass(name="causal", routing="causal", executor="masked"),
    "executed": Pass(name="executed", routing="causal"),
    "forced": Pass(name="forced", routing="forced"),
}


def passes_of(
    model: SkipstoneForCausalLM, corpus: str | None, was_forced: bool = False
) -> tuple[dict[str, Pass], dict[str, str]]:
    """Return the passes that the model has on this corpus, and why others that one could expect are unavailable.

    was_forced: it was trained with the known difficulty, so its own routers have learned nothing.
    """
    unavailable: dict[str, str] = {}
    waits = any(
        isinstance(getattr(m, "decision", None), Forced) and getattr(m, "capacity", 1) < 1
        for m in model.routing_modules()
    )
    if waits or (was_forced and depth_layers(model)):
        unavailable = dict.fromkeys(("oracle", "causal", "executed"), NEEDS_MASKS)
    elif _refused(model):
        unavailable = dict.fromkeys(("causal", "executed"), NO_CAUSAL_FORM)
    has_forced = knows_difficulty(corpus) and bool(depth_layers(model))
    found = {
        name: each for name, each in PASSES.items() if name not in unavailable and (name != "forced" or has_forced)
    }
    return found, unavailable


def depth_layers(model: SkipstoneForCausalLM) -> list[int]:
    """Blocks that carry a depth mechanism."""
    blocks: Any = model.model.layers
    return [i for i, block in enumerate(blocks) if len(block.mechanisms)]


def _refused(model: SkipstoneForCausalLM) -> bool:
    try:
        for mechanism in model.routing_modules():
            mechanism.require_causal()
    except ValueError:
        return True
    return False


def targets(batch: Mapping[str, Tensor]) -> Tensor:
    """int64 [B, T]: what the logits at each token should say, -100 where nothing is asked."""
    return batch["shift_labels"] if "shift_labels" in batch else shifted(batch["labels"])
