"""The overhead of routing: its share of the time of a training step.

Routing is every operation inside a depth mechanism but outside the update that it wraps (router, decision, gathering,
weighing, scattering), every operation in a block that gathers or scatters rows (attention and MLP do so themselves
where they compute only some tokens), and the backward of all these. Ranges are opened by hooks that are removed after
the measurement. The profiler makes each operation a little longer, small ones relatively most: the share is an upper
bound. The activation mechanism, whose work is the mixing of functions, is counted separately.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile, record_function
from torch.autograd.profiler_util import FunctionEvent

from skipstone.core.strict import PlainMapping
from skipstone.measure.passes import Pass
from skipstone.model.causal_lm import SkipstoneForCausalLM

ROUTING, UPDATE, ACTIVATION = (f"skipstone.{name}" for name in ("routing", "update", "activation"))
GATHERING = frozenset({"aten::index_select", "aten::index_copy", "aten::index_copy_", "aten::gather", "aten::scatter"})


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """The shares of a training step's time (forward and backward together) that routing and mixing activations take.

    Both are from 0 to 1. routing: the share of depth mechanisms without the updates that they wrap, which leaves
    router, decision, gathering, weighting and scattering. activation: the share of activation mechanisms. The profiler
    slows small operations most, so both are upper bounds.
    """

    routing: float
    activation: float


def overhead(model: SkipstoneForCausalLM, forward: Pass, batch: Mapping[str, Tensor], steps: int = 2) -> Overhead:
    """Profile training steps and return the shares of their time that go to routing and to mixing activations.

    A step is a forward pass with exploration noise on router scores and a backward pass, without an optimizer. forward:
    the kind of pass, which says how the model decides and executes. batch: the model's inputs, with `input_ids` [B, T]
    on its device, which also serve as labels. steps: how many are profiled, after one to warm up. Afterwards the
    model's gradients are None, and it is in training or evaluation mode as before.
    """
    arguments = {**forward.arguments(model, batch), "noise": True, "labels": batch["input_ids"]}
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes lines of its own to the terminal
    training, on_device = model.training, model.device.type == "cuda"
    model.train()
    try:
        with torch.enable_grad(), _ranges(model):
            _step(model, arguments)
            with profile(use_device="cuda" if on_device else None) as profiler:
                for _ in range(steps):
                    _step(model, arguments)
    finally:
        model.train(training)
        model.zero_grad(set_to_none=True)
    return _shares(list(profiler.function_events or ()), on_device)


def _step(model: SkipstoneForCausalLM, arguments: PlainMapping) -> None:
    model(**arguments).loss.backward()


Arguments: TypeAlias = tuple[Any, ...]  # of a module's forward pass


@contextmanager
def _ranges(model: SkipstoneForCausalLM) -> Iterator[None]:
    """Mark mechanisms, and the updates that they wrap, as profiler ranges in a `with` block.

    The names of the ranges are ROUTING, ACTIVATION and UPDATE.
    """
    blocks = model.decoder.layers
    hooks = []
    for block in blocks:
        for name, module in block.routing_modules().items():
            if module.built_in:
                continue  # experts that choose are the block's own work
            ranges: list[record_function] = []
            enter = _enter_routing if name in block.mechanisms else _enter_activation
            hooks.append(module.register_forward_pre_hook(_with(ranges, enter)))
            hooks.append(module.register_forward_hook(_leave(ranges)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _with(
    ranges: list[record_function], enter: Callable[[list[record_function], Arguments], object]
) -> Callable[[nn.Module, Arguments], object]:
    return lambda module, args: enter(ranges, args)


def _leave(ranges: list[record_function]) -> Callable[[nn.Module, Arguments, object], None]:
    return lambda module, args, out: ranges.pop().__exit__(None, None, None)


def _enter_routing(ranges: list[record_function], args: Arguments) -> Arguments:
    update, *rest = args
    ranges.append(record_function(ROUTING))
    ranges[-1].__enter__()

    def inside(*inner: object) -> object:
        with record_function(UPDATE):
            return update(*inner)

    return (inside, *rest)


def _enter_activation(ranges: list[record_function], args: Arguments) -> None:
    ranges.append(record_function(ACTIVATION))
    ranges[-1].__enter__()


def _shares(events: Sequence[FunctionEvent], on_device: bool) -> Overhead:
    """Return the shares of a training step's time that routing and mixing activations take.

    A forward operation counts as the kind that `_kind` gives it, a backward one as the forward operation that made its
    autograd node. events: operations that the profiler has recorded. on_device: whether to add up their time on the GPU
    instead of the CPU.
    """
    events = sorted(events, key=lambda event: event.time_range.start)
    kinds = {event.id: _kind(event) for event in events}
    # Several operations carry one number when not all of them need a gradient: the last of them made the node.
    by_number = {event.sequence_nr: kinds[event.id] for event in events if event.sequence_nr >= 0 and _forward(event)}
    spent = dict.fromkeys((ROUTING, ACTIVATION, UPDATE), 0.0)
    for event in events:
        kind = kinds[event.id] if _forward(event) else by_number.get(_number(event), UPDATE)
        spent[kind] += event.self_device_time_total if on_device else event.self_cpu_time_total
    total = sum(spent.values())
    return Overhead(routing=spent[ROUTING] / total, activation=spent[ACTIVATION] / total)


def _up(event: FunctionEvent | None) -> Iterator[FunctionEvent]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _kind(event: FunctionEvent) -> str:
    """Return which part of a training step an operation belongs to: routing, mixing of activations, or the rest.

    These are the constants ROUTING, ACTIVATION and UPDATE; the innermost of the profiler ranges of `_ranges` around the
    operation decides. Gathering and scattering inside an update count as routing.
    """
    names = [above.name for above in _up(event)]
    nearest = next((name for name in names if name in (ROUTING, UPDATE, ACTIVATION)), None)
    return ROUTING if nearest == UPDATE and GATHERING.intersection(names) else nearest or UPDATE


def _node(event: FunctionEvent) -> FunctionEvent | None:
    """Return the profiler's event of the autograd node in which an event runs; None for a forward operation."""
    return next((above for above in _up(event) if above.name.startswith("autograd::engine::evaluate_function")), None)


def _forward(event: FunctionEvent) -> bool:
    return _node(event) is None


def _number(event: FunctionEvent) -> int:
    node = _node(event)
    return -1 if node is None else node.sequence_nr
