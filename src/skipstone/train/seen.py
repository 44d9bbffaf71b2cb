"""The records (decisions of mechanisms) of the passes of a training step, collected by hooks.

Trainers of other libraries call the decoder and the head themselves (TRL), so that the model's own `forward`, which
returns records and adds auxiliary losses, never runs. But the decoder runs, and hooks on it see every pass, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from skipstone.core.records import Records
from skipstone.core.strict import PlainDict
from skipstone.in_place.handle import RoutedDecoder
from skipstone.model.decoder import SkipstonePreTrainedModel


@dataclass(frozen=True, kw_only=True)
class SeenPass:
    """A forward pass with gradients that was observed by hooks.

    records: what each mechanism decided, one dict by mechanism name for each block. in_forward: whether the pass was
    part of the whole model's `forward`, which adds the routers' auxiliary losses to its loss, and not of the decoder
    alone.
    """

    records: tuple[Records, ...]
    in_forward: bool


def inner(model: Any) -> Any:
    """Return the model inside wrappers such as DistributedDataParallel and PEFT.

    model: a wrapped model; one that is not wrapped is returned unchanged.
    """
    while not isinstance(model, SkipstonePreTrainedModel) and not hasattr(model, "skipstone_routing"):
        if hasattr(model, "module"):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model
    while hasattr(model, "get_base_model"):  # PEFT's wrappers have the attributes of their base model
        model = model.get_base_model()
    return model


@contextmanager
def seen_passes(model: nn.Module) -> Iterator[list[SeenPass]]:
    """Collect the forward passes with gradients that a model makes inside a `with` block.

    model: a Skipstone model, or one that `skipstone.route` has routed, wrapped or not. Yields a list that grows with
    each pass; it stays empty for any other model.
    """
    found: list[SeenPass] = []
    base = inner(model)
    handle: RoutedDecoder | None = getattr(base, "skipstone_routing", None)
    if handle is not None:
        hooks = [handle.decoder.register_forward_hook(lambda *_: _note(found, handle.records, handle.in_forward))]
    elif isinstance(base, SkipstonePreTrainedModel):
        hooks = _on_ours(base.decoder, found)
    else:
        hooks = []
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _on_ours(decoder: nn.Module, found: list[SeenPass]) -> list[Any]:
    asked: list[bool] = []  # whether the caller wanted the records, as the model's own forward does

    def before(_: nn.Module, args: tuple[object, ...], kwargs: PlainDict) -> tuple[tuple[object, ...], PlainDict]:
        asked.append(bool(kwargs.get("output_records")))
        return args, {**kwargs, "output_records": True}

    def after(_: nn.Module, args: tuple[object, ...], out: Any) -> None:
        _note(found, out.records, asked.pop())

    return [decoder.register_forward_pre_hook(before, with_kwargs=True), decoder.register_forward_hook(after)]


def _note(found: list[SeenPass], records: tuple[Records, ...], in_forward: bool) -> None:
    if torch.is_grad_enabled():
        found.append(SeenPass(records=records, in_forward=in_forward))
