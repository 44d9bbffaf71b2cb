"""The kinds of forward pass that measurements distinguish, and the inputs, masks and targets of a batch.

oracle     decides as in training, looking at the whole row, but without noise; soft gates only scale updates
causal     decides as in generation, looking at no later token; computes all tokens, discards updates of skipped ones
executed   decides as causal, but computes only the tokens that a block keeps: the pass that really skips
forced     every depth mechanism keeps exactly the tokens that a synthetic corpus marks as needing depth

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from skipstone.core.routing_module import causal_obstacle
from skipstone.core.strict import PlainDict
from skipstone.core.tokens import Executor
from skipstone.data.corpora import knows_difficulty
from skipstone.model.causal_lm import CausalLMOutput, SkipstoneForCausalLM, shifted
from skipstone.model.decoder import Routing
from skipstone.model.wrapped import require_ours

NO_CAUSAL_FORM = "no causal form"
NEEDS_MASKS = "decided by the caller"
NOTHING_TO_FORCE = "no depth mechanism"
INPUTS = ("input_ids", "attention_mask", "position_ids", "document_ids")

Batch = Mapping[str, Tensor]


def inputs_of(batch: Batch, device: torch.device | None = None) -> dict[str, Tensor]:
    """Return the entries of a batch that are inputs of the model's forward, without labels.

    Its keys are `input_ids`, `attention_mask`, `position_ids` and `document_ids`, as far as the batch has them. batch:
    tensors by name. device: the device to move them to; None leaves them where they are.
    """
    return {name: batch[name] if device is None else batch[name].to(device) for name in INPUTS if name in batch}


def real_tokens(batch: Batch) -> Tensor:
    """Return which tokens are not padding, bool [B, T] (rows, tokens).

    batch: the inputs by name; without an `attention_mask`, every token is real.
    """
    mask_BT = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask_BT is None else mask_BT.bool()


def targets(batch: Batch) -> Tensor:
    """Return the token that the logits at each position should predict, int64 [B, T]; -100 where there is none.

    batch: the tensors by name. If it has `shift_labels`, these are returned unchanged; otherwise its `labels` are moved
    one place to the left, with -100 at the end of the row.
    """
    return batch["shift_labels"] if "shift_labels" in batch else shifted(batch["labels"])


def known_to_need_depth(batch: Batch) -> Tensor | None:
    """Return which tokens a synthetic corpus marks as needing depth, bool [B, T] (rows, tokens); None without marks.

    batch: the tensors by name. Its `difficulty`, int64 [B, T], is 0 or above for tokens that need several layers, such
    as operations whose results build on each other, and negative for all others; without it, the result is None.
    """
    return batch["difficulty"] >= 0 if "difficulty" in batch else None


def depth_layers(model: SkipstoneForCausalLM) -> list[int]:
    """Return the indices of the blocks of `model` that have a depth mechanism, which chooses the tokens to update."""
    blocks = model.decoder.layers
    return [i for i, block in enumerate(blocks) if len(block.mechanisms)]


def forced_routing(model: SkipstoneForCausalLM, kept_BT: Tensor) -> dict[int, Tensor]:
    """Return a value for forward's argument `routing` that makes all depth mechanisms keep the same tokens.

    kept_BT: bool [B, T] (rows, tokens), the tokens that get the update of every block with a depth mechanism; it
    replaces the mechanisms' own decisions. The result is {layer: kept_BT}.
    """
    return dict.fromkeys(depth_layers(model), kept_BT)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One way to run the forward pass.

    name: the pass's key in `PASSES`: "oracle", "causal", "executed" or "forced". routing: "oracle" (decisions may look
    at the whole row, as in training), "causal" (decisions look at no later token, as in generation) or "forced" (every
    depth mechanism keeps exactly the tokens whose `difficulty` in the batch is 0 or above). executor: "gathered"
    computes only kept tokens; "masked" computes all tokens and discards the updates of the others, with equal results.
    """

    name: str
    routing: str
    executor: Executor = "gathered"

    def arguments(self, model: SkipstoneForCausalLM, batch: Batch) -> PlainDict:
        """Return the keyword arguments of `model.forward` for this pass over a batch: no noise, no cache, no labels.

        batch: the input tensors by name, and `difficulty` (int64 [B, T]) if `routing` is "forced".
        """
        routing: Routing = self.routing  # type: ignore[assignment]
        if self.routing == "forced":
            routing = forced_routing(model, batch["difficulty"] >= 0)
        return {
            **inputs_of(batch),
            "routing": routing,
            "executor": self.executor,
            "noise": False,
            "use_cache": False,
        }

    @torch.no_grad()
    def run(self, model: SkipstoneForCausalLM, batch: Batch, **more: object) -> CausalLMOutput:
        """Run the model on a batch without gradients and return its output.

        batch: the input tensors by name on the model's device, and `difficulty` if `routing` is "forced". more: further
        keyword arguments of forward, such as `output_records=True`. Raises ValueError for a model that is not a
        Skipstone model.
        """
        require_ours(model)
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
    """Return the kinds of forward pass that a model can run, and why others are missing, as two dicts by their names.

    The names are "oracle" (decisions as in training), "causal" (without later tokens), "executed" (the same, computing
    kept tokens only) and "forced" (keeping the tokens that a synthetic corpus marks as needing depth). The first dict
    has the passes themselves. The second has a reason for each that is missing; but "forced" is in neither if the
    corpus marks no tokens. corpus: name of the data's corpus; None if there is none. was_forced: whether blocks kept
    the marked tokens in training, too, so that the model's own routers have learned nothing and only "forced" is
    possible.
    """
    unavailable: dict[str, str] = {}
    waits = any(m.needs_masks for m in model.routing_modules())
    if waits or (was_forced and depth_layers(model)):
        unavailable = dict.fromkeys(("oracle", "causal", "executed"), NEEDS_MASKS)
    elif causal_obstacle(model.routing_modules()) is not None:
        unavailable = dict.fromkeys(("causal", "executed"), NO_CAUSAL_FORM)
    known = knows_difficulty(corpus)
    if known and not depth_layers(model):
        unavailable["forced"] = NOTHING_TO_FORCE
    return {n: p for n, p in PASSES.items() if n not in unavailable and (n != "forced" or known)}, unavailable
