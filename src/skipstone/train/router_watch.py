"""`RouterWatch`: warns once of a router that is dead, saturated, or no better than a choice at random.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from skipstone.core.depth import DepthModule
from skipstone.core.records import DepthRecord, Records, of_kind
from skipstone.core.strict import PlainDict
from skipstone.measure.passes import inputs_of
from skipstone.measure.router_health import RouterHealth
from skipstone.model.causal_lm import SkipstoneForCausalLM

LOOKS, MOST_STEPS = 20, 10  # steps that a verdict on dead and saturated routers rests on; most steps between two
SHARE = 0.004  # of the time of training that comparisons with a choice at random may take
PAIRS = 16  # comparisons that a verdict rests on
MARGIN = 0.001  # nats: a router whose choice gains less than this, with 95 % confidence, chooses no better than chance
FIRST_PAIR = 20  # the step of the first comparison, when the time of a step is known

Forward = Callable[..., Any]


class RouterWatch:
    """A watch on the routers of a training that warns of dead or saturated routers and of those no better than chance.

    Each warning is given once. Decisions are examined in every tenth step (more often in a training of less than 1,000
    steps). The gain over chance is measured for one block at a time in two extra forward passes over a few rows of the
    current micro-batch: one with the tokens that the router has kept, and one with as many tokens drawn at random,
    without gradients, dropout or noise. The interval between measurements is chosen so that they take 0.4 % of the
    training time. No random number of the training is drawn, so the watch changes no result. Blocks with several depth
    mechanisms, and gates that only scale updates and skip nothing, are not compared with chance.

    model: the model without wrappers. forward: a function that calls the model as it is wrapped for training; if the
    model is sharded, all processes call it together. steps: number of steps of the training. summed, largest: functions
    that reduce a tensor over all processes by sum and by maximum. says: whether this process prints warnings.
    """

    def __init__(
        self,
        model: SkipstoneForCausalLM,
        forward: Forward,
        steps: int,
        summed: Callable[[Tensor], Tensor],
        largest: Callable[[Tensor], Tensor],
        says: bool,
    ) -> None:
        self.model, self.forward, self.steps, self.says = model, forward, steps, says
        self.summed, self.largest = summed, largest
        self.health, self.looks, self.every = RouterHealth(), 0, max(1, min(MOST_STEPS, steps // (5 * LOOKS)))
        self.warned: set[tuple[str, str]] = set()
        self.gains: dict[int, list[Tensor]] = {}  # by block: loss of a random choice less the router's
        self.next_pair, self.turn = FIRST_PAIR, 0
        self.seconds = 0.0  # spent here
        self._began, self._first = time.perf_counter(), None  # type: float, int | None
        self._held: tuple[PlainDict, dict[int, Tensor], int] | None = None

    def see(self, step: int, inputs: PlainDict, records: Sequence[Records]) -> None:
        """Examine the records of the first micro-batch of a step after its forward pass.

        `after_backward` must be called next. step: the optimizer step, from 1. inputs: the micro-batch, by name.
        records: what each mechanism decided, one dict by mechanism name for each block.
        """
        if self._first is None:
            self._first, self._began = step, time.perf_counter()
        began = time.perf_counter()
        if step % self.every == 0:
            self.health.add(self.model.routing_modules(), records)
            self.looks += 1
            if self.looks == LOOKS:
                self.looks = 0
                for router, said in self.health.read(self.summed, late=2 * step >= self.steps).items():
                    self._warn(router, said)
        if step - self._first + 1 >= self.next_pair:
            self._hold(inputs, records)
        self.seconds += time.perf_counter() - began

    def _hold(self, inputs: PlainDict, records: Sequence[Records]) -> None:
        """Keep some rows of a micro-batch and the masks of kept tokens, to compare one block with chance later.

        Blocks take turns. inputs: the micro-batch. records: what each mechanism decided, one dict for each block.
        """
        self._held, masks, several = None, {}, False
        rows = max(1, len(inputs["input_ids"]) // 8)
        for module in self.model.routing_modules():
            layer = module.placement.layer
            record = of_kind(records[layer], DepthRecord).get(module.placement.name)
            if record is not None:
                several = several or layer in masks
                masks[layer] = record.kept_BT[:rows]
        able = [m.placement.layer for m in self.model.routing_modules() if _comparable(m)]
        if several or not able:
            self.next_pair = self.steps + 1  # nothing to compare
            return
        layer = able[self.turn % len(able)]
        self.turn += 1
        few = {k: v[:rows] for k, v in inputs.items() if isinstance(v, Tensor) and v.dim() and len(v) >= rows}
        self._held = (few, masks, layer)

    def after_backward(self, step: int) -> None:
        """Compare a router with chance, if it is due: the loss with its kept tokens and with as many random ones.

        It is done after the backward pass, whose memory is free again then. step: the optimizer step, from 1.
        """
        if self._held is None:
            return
        (inputs, masks, layer), self._held = self._held, None
        began = time.perf_counter()
        gain = self._gain(inputs, masks, layer, step)
        self.gains.setdefault(layer, []).append(gain)
        if len(self.gains[layer]) == PAIRS:
            self._judge(layer, torch.stack(self.gains.pop(layer)))
        spent = time.perf_counter() - began
        self.seconds += spent
        assert self._first is not None
        done = step - self._first + 1
        pace = (began - self._began) / max(done - 1, 1)
        wait = torch.tensor(spent / max(SHARE * pace, 1e-9), dtype=torch.float64, device=gain.device)
        self.next_pair = done + max(1, math.ceil(min(float(self.largest(wait)), self.steps)))

    @torch.no_grad()
    def _gain(self, inputs: PlainDict, masks: dict[int, Tensor], layer: int, step: int) -> Tensor:
        """Return by how much the tokens' mean loss rises, in nats, if one block keeps random tokens instead, fp32 [].

        It keeps as many in each row as the router did. inputs: the rows. masks: bool [B, T] by block, the tokens kept
        by the routers. layer: index of the block. step: seed of the random tokens.
        """
        random = {**masks, layer: shuffled(masks[layer], inputs.get("attention_mask"), step)}
        with _evaluating(self.model), _uncompiled(self.model):
            kept, drawn = (self._loss(inputs, routing) for routing in (masks, random))
        return drawn - kept

    def _loss(self, inputs: PlainDict, routing: dict[int, Tensor]) -> Tensor:
        labels = {name: inputs[name] for name in ("labels", "shift_labels") if name in inputs}
        out = self.forward(**inputs_of(inputs), **labels, routing=routing, noise=False, use_cache=False)
        return out["token_loss"].double()  # type: ignore[no-any-return]

    def _judge(self, layer: int, gains: Tensor) -> None:
        sums = self.summed(torch.stack((gains.sum(), gains.square().sum(), torch.ones_like(gains).sum()))).tolist()
        mean, count = sums[0] / sums[2], sums[2]
        error = math.sqrt(max(sums[1] / count - mean**2, 0.0) / (count - 1))
        if mean + 2 * error < MARGIN:
            self._warn(
                f"block {layer}",
                f"chooses tokens no better than chance: with as many tokens drawn at random the loss is {mean:+.4f} "
                f"nats higher (at most {mean + 2 * error:+.4f}, {count:.0f} comparisons)",
            )

    def _warn(self, router: str, said: str) -> None:
        key = (router, said.split(" ", 2)[0] + said.split(" ", 2)[1])
        if key not in self.warned and self.says:
            warnings.warn(f"the router of {router} {said}", stacklevel=2)
        self.warned.add(key)


def _comparable(module: object) -> bool:
    """Return whether a depth mechanism skips tokens in training by the scores of its router."""
    if not isinstance(module, DepthModule) or not module.chooses_by_score:
        return False
    share = module.intended_share
    return share is not None and 0 < share < 0.99


@contextmanager
def _evaluating(model: SkipstoneForCausalLM) -> Iterator[None]:
    """Switch the model to evaluation inside a `with` block, and every module back to what it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module in training:
            module.training = True


def _uncompiled(model: SkipstoneForCausalLM) -> AbstractContextManager[object]:
    """Return a context manager in which compiled blocks run uncompiled, as compiling for these passes takes seconds."""
    compiled = any(getattr(block, "_compiled_call_impl", None) is not None for block in model.decoder.layers)
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()  # type: ignore[no-untyped-call]


def shuffled(kept_BT: Tensor, attention_mask: Tensor | None, seed: int) -> Tensor:
    """Return a bool mask [B, T] that keeps as many tokens of each row as `kept_BT` does, drawn at random.

    Padding is not drawn. kept_BT: bool [B, T], the tokens that the router kept, B rows of T tokens. attention_mask: [B,
    T], 0 at padding; None means that there is no padding. seed: seed of the draw.
    """
    draw_BT = torch.rand(kept_BT.shape, generator=torch.Generator().manual_seed(seed)).to(kept_BT.device)
    if attention_mask is not None:
        draw_BT = torch.where(attention_mask.bool(), draw_BT, 2.0)  # padding comes last
    rank_BT = draw_BT.argsort(-1).argsort(-1)
    return rank_BT < kept_BT.sum(-1, keepdim=True)
