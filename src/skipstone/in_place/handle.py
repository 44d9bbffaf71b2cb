"""`route` puts mechanisms around the blocks of any transformers decoder in place, and returns a `RoutedDecoder`.

Shape letters: B rows, T tokens of the call, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from skipstone.core.depth import DepthModule, DepthModules
from skipstone.core.noise import draw_seed
from skipstone.core.records import Records, auxiliary_loss, carried
from skipstone.core.strict import PlainDict, unknown
from skipstone.core.tokens import Executor, PassMode, Tokens
from skipstone.in_place.arguments import Signature
from skipstone.in_place.block import RoutedBlock
from skipstone.in_place.find import require_kernel, text_config
from skipstone.in_place.saved import write
from skipstone.mechanisms import DEPTH, Placement
from skipstone.model.parts import MechanismEntry
from skipstone.model.tokens import Call, tokens_of

IGNORED = -100
SETTINGS = {  # and their values
    "executor": ("gathered", "masked"),
    "routing": ("oracle", "causal", None),
    "training_routing": ("oracle", "causal"),
}


class RoutedDecoder:
    """The mechanisms that `route` has put into a model, with their settings, records and weights.

    model: the model. decoder: the decoder inside it. blocks: the decoder's blocks. entries: the parsed options of the
    mechanisms.

    records: decisions of the last forward pass, for each block a dict by mechanism name. executor: "gathered" computes
    kept tokens only; "masked" computes all tokens and discards the others' updates, with equal results.
    training_routing: how passes in training mode with gradients and without cached tokens decide: "oracle" may look at
    the whole row, "causal" looks at no later token; all other passes are causal. routing: "oracle" or "causal" for
    every pass; None means as described under `training_routing`. forced: decisions to impose, bool masks [B, T] of kept
    tokens by block index.
    """

    def __init__(
        self, model: nn.Module, decoder: nn.Module, blocks: nn.ModuleList, entries: Sequence[MechanismEntry]
    ) -> None:
        self.model, self.decoder, self.entries, self.count = model, decoder, list(entries), len(blocks)
        self.executor: Executor = "gathered"
        self.training_routing: Literal["oracle", "causal"] = "oracle"
        self.routing: Literal["oracle", "causal"] | None = None
        self.forced: Mapping[int, Tensor] = {}
        self.verifying = False  # whether `check` compares results
        self.records: tuple[Records, ...] = ()
        self._mask: Tensor | None = None
        self._positions: Tensor | None = None
        self._tokens: Tokens | None = None
        self.in_forward = False  # whether the model's own `forward` runs, which adds the losses
        width = text_config(decoder).hidden_size
        chosen = [(i, block, Signature(block)) for i, block in enumerate(blocks) if any(i in e.layers for e in entries)]
        self.blocks = [
            RoutedBlock(self, i, block, signature, _mechanisms(entries, i, len(blocks), width, block))
            for i, block, signature in chosen
        ]
        self._names = list(inspect.signature(type(decoder).forward).parameters)[1:]  # names of positional arguments
        self._hook = decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._forward = _WithLosses(self, model) if model is not decoder else None
        model.skipstone_routing = self  # type: ignore[assignment]  # where a `RoutingMixin` looks
        model.routing_modules = self.routing_modules  # type: ignore[assignment]  # where a `RoutingCallback` looks

    def routing_modules(self) -> Iterator[DepthModule]:
        """Yield every mechanism, in the order of the blocks."""
        for routed in self.blocks:
            yield from routed.mechanisms.values()

    def modules(self) -> Iterator[tuple[str, DepthModules]]:
        """Yield a name, "layers.INDEX", and the mechanisms of each routed block.

        The names do not depend on the model's architecture.
        """
        for routed in self.blocks:
            yield f"layers.{routed.layer}", routed.mechanisms

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the mechanisms alone, for an optimizer that leaves the model's weights unchanged."""
        for mechanism in self.routing_modules():
            yield from mechanism.parameters()

    def set_identity(self) -> None:
        """Make every mechanism keep all tokens with weight 1, as if there were none.

        Outputs are then those of the model itself; gates, which stay just below 1, change them slightly. Parameters
        still get gradients.
        """
        for mechanism in self.routing_modules():
            mechanism.set_identity()

    def auxiliary_loss(self) -> Tensor:
        """Return the sum of the mechanisms' auxiliary losses in the last pass, a scalar with gradient; 0 without any.

        Each loss is a mean over the tokens that reached its mechanism. In training mode, a model that is called with
        labels adds the sum to its loss by itself; with the argument num_items_in_batch, it first multiplies the sum by
        the call's number of labelled tokens / num_items_in_batch.
        """
        found = auxiliary_loss(self.records, None)
        return torch.zeros((), device=next(self.decoder.parameters()).device) if found is None else found

    @torch.no_grad()
    def advance(self, progress: float) -> None:
        """Update thresholds and schedules from the last pass, once per optimizer step of a custom training loop.

        progress: the fraction of training completed, from 0 to 1. With transformers' Trainer, `RoutingMixin` does this.
        """
        for mechanism in self.routing_modules():
            place = mechanism.placement
            record = self.records[place.layer].get(place.name) if self.records else None
            mechanism.advance(progress, None if record is None else mechanism.statistics(record))

    def kept_share(self) -> float:
        """Return the share of the tokens of the last pass that a block computed, from 0 to 1, as a mean over blocks.

        All blocks of the decoder count, those without mechanisms as 1. A token counts for a block if all of its
        mechanisms kept it. Padding tokens are left out if the call had a padding mask [B, T]; otherwise they count like
        others.
        """
        shares, real_BT = [1.0] * self.count, None if self._tokens is None else self._tokens.real_BT
        for i, records in enumerate(self.records):
            kept = [r.kept_BT for r in records.values()]  # type: ignore[union-attr]
            if kept:
                kept_BT = torch.stack(kept).all(0)
                counted = kept_BT if real_BT is None else kept_BT[real_BT.to(kept_BT.device).expand_as(kept_BT)]
                shares[i] = float(counted.float().mean()) if counted.numel() else 1.0
        return sum(shares) / self.count

    def save(self, folder: str | Path) -> None:
        """Write options and weights of the mechanisms, thresholds included, into `folder` for `route(model, folder)`.

        The files are skipstone_routing.json and skipstone_routing.safetensors, and replace earlier ones. The model's
        own weights are not saved, as with an adapter. Raises `WriteError` if the disk is full or fails.
        """
        write(Path(folder), [entry.plain() for entry in self.entries], dict(self.modules()))

    def undo(self) -> None:
        """Remove all mechanisms from the model.

        Raises ValueError if other code has replaced a block's `forward` since, and if the mechanisms were removed
        before.
        """
        if vars(self.model).get("skipstone_routing") is not self:
            raise ValueError("the mechanisms were removed before; route the model anew")
        for routed in self.blocks:
            routed.undo()
        self._hook.remove()
        if self._forward is not None:
            self._forward.undo()
        del self.model.routing_modules, self.model.skipstone_routing

    # --- a pass

    def _begin(self, decoder: nn.Module, args: tuple[object, ...], kwargs: PlainDict) -> None:
        """Take padding mask and positions from the decoder's arguments and forget the records, before each pass."""
        require_kernel(decoder)
        self._check_settings()
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        config = text_config(decoder)
        for name in ("output_attentions", "output_router_logits"):
            asked = given.get(name)
            if getattr(config, name, False) if asked is None else asked:
                raise ValueError(f"{name} is not supported by a routed model: skipped tokens have none")
        self._mask, self._positions = given.get("attention_mask"), given.get("position_ids")
        self._tokens, self.records = None, tuple({} for _ in range(self.count))

    def _check_settings(self) -> None:
        """Raise ValueError for settings that are none, which would otherwise be taken for others or for nothing."""
        for name, allowed in SETTINGS.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(unknown(name, value, map(str, allowed)))
        for layer in self.forced.keys() - {routed.layer for routed in self.blocks}:
            raise ValueError(f"forced names block {layer}, which has no mechanism")

    def tokens_at(self, routed: RoutedBlock, x_BTD: Tensor, cache: Any) -> Tokens:
        """Return the `Tokens` of a block's call: positions, padding, imposed decisions, and carried state.

        The state is what mechanisms of earlier blocks of this pass have passed on. routed: the block. x_BTD: its hidden
        states. cache: the model's key-value cache, or None. Raises ValueError for hidden states that are not [B, T, D].
        """
        if x_BTD.dim() != 3:
            raise ValueError(f"block {routed.layer} must be given hidden states [B, T, D], got {list(x_BTD.shape)}")
        if self._tokens is None:
            self._tokens = self._first(x_BTD, 0 if cache is None else int(cache.get_seq_length(routed.layer)), cache)
        forced_BT = self.forced.get(routed.layer)
        if forced_BT is not None and (forced_BT.dtype != torch.bool or forced_BT.shape != x_BTD.shape[:2]):
            raise ValueError(
                f"forced[{routed.layer}] must be a bool mask of shape {list(x_BTD.shape[:2])}, got {forced_BT.dtype} "
                f"{list(forced_BT.shape)}"
            )
        return self._tokens.replace(forced_BT=forced_BT)

    def _first(self, x_BTD: Tensor, seen: int, cache: Any) -> Tokens:
        B, T = x_BTD.shape[:2]
        learns = self.decoder.training and torch.is_grad_enabled() and seen == 0
        routing = self.routing or (self.training_routing if learns else "causal")
        noise = self.decoder.training and routing == "oracle"
        executor: Executor = "masked" if torch.compiler.is_compiling() else self.executor
        mode = PassMode(routing=routing, noise=noise, executor=executor, per_row_gather=cache is not None)
        plain = self._mask if isinstance(self._mask, Tensor) and self._mask.dim() == 2 else None
        if routing == "oracle" and self._mask is not None and plain is None:
            raise ValueError(
                "attention_mask must have shape [B, T], 1 for tokens and 0 for padding, with oracle routing"
            )
        positions = self._positions
        if not isinstance(positions, Tensor) or positions.shape not in ((1, T), (B, T)):
            positions = None
        mask = None if plain is None else plain[:, : seen + T]
        call = Call(shape=x_BTD.shape[:2], device=x_BTD.device, seen=seen, attention_mask=mask, position_ids=positions)
        state: dict[str, Tensor] = {}
        for mechanism in self.routing_modules():
            state.update(mechanism.initial_state(x_BTD))
        return tokens_of(call, mode).replace(state=state, noise_seed=draw_seed(x_BTD.device) if noise else None)

    def note(self, layer: int, records: Records) -> None:
        """Store in the attribute `records` what the mechanisms of block `layer` decided; a `RoutedBlock` calls this.

        records: the decisions, by mechanism name. The tensors in them that are meant for later blocks
        (`DepthRecord.carry`) are added to `Tokens.state`, from which these blocks read them.
        """
        self.records[layer].update(records)  # type: ignore[attr-defined]
        if self._tokens is not None and (carry := carried(records.values())):
            self._tokens = self._tokens.replace(state={**self._tokens.state, **carry})


def _mechanisms(
    entries: Sequence[MechanismEntry], layer: int, count: int, width: int, block: nn.Module
) -> DepthModules:
    """Build the mechanisms of one block in fp32 on the block's device.

    Parts that a mechanism declares in `cast_with_model` get the block's dtype. entries: the parsed options of all
    mechanisms. layer: index of the block. count: number of blocks. width: size of a hidden state.
    """
    built: dict[str, DepthModule] = {}
    like = next((p for p in block.parameters() if p.is_floating_point() and p.device.type != "meta"), None)
    for entry in entries:
        if layer in entry.layers:
            index = entry.layers.index(layer)
            placement = Placement(layer=layer, num_layers=count, index=index, count=len(entry.layers), name=entry.key)
            mechanism = DEPTH[entry.kind](width, placement, config=entry.options)
            if like is not None:
                mechanism.to(like.device)
                for name in mechanism.cast_with_model:
                    _cast(mechanism, name, like.dtype)
            built[entry.key] = mechanism.train(block.training)
    return DepthModules(built)


def _cast(mechanism: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Cast the parameter or child module `name` of a mechanism to a dtype."""
    part = getattr(mechanism, name, None)
    if isinstance(part, nn.Module):
        part.to(dtype)
    elif isinstance(part, Tensor):
        part.data = part.data.to(dtype)


class _WithLosses:
    """A replacement for the model's `forward` that adds auxiliary losses to the loss in training mode.

    handle: the routed decoder, which knows the losses. model: the model whose `forward` is replaced.
    """

    def __init__(self, handle: RoutedDecoder, model: nn.Module) -> None:
        self._handle, self._model = handle, model
        self._before: Callable[..., Any] | None = model.__dict__.get("forward")
        model.forward = self

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The model's own forward, whose signature names the arguments that transformers allows.

        It is looked up anew, because a pickled bound method would become the one that replaced it.
        """
        return MethodType(type(self._model).forward, self._model) if self._before is None else self._before

    def __call__(self, *args: object, **kwargs: Any) -> Any:
        self._handle.in_forward = True
        try:
            out = self.__wrapped__(*args, **kwargs)
        finally:
            self._handle.in_forward = False
        loss = getattr(out, "loss", None)
        if loss is None or not self._model.training or not torch.is_grad_enabled():
            return out
        labels, items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
        share = 1.0 if items is None or labels is None else (labels[..., 1:] != IGNORED).sum() / items
        out["loss"] = loss + self._handle.auxiliary_loss() * share
        return out

    def undo(self) -> None:
        """Restore the model's `forward`, unless other code has replaced it since."""
        if self._model.__dict__.get("forward") is self:
            del self._model.__dict__["forward"]
            if self._before is not None:
                self._model.forward = self._before
