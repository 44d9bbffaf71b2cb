"""The decoder, the same for all mechanisms: embeddings, blocks, final norm.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import ModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from skipstone.core.noise import draw_seed
from skipstone.core.records import Records
from skipstone.core.strict import PlainDict, unknown
from skipstone.core.tokens import BENEFIT, Executor, PassMode, Tokens
from skipstone.model.arguments import check_cache, check_input, of_fixed_size, refuse_mistyped
from skipstone.model.build import (
    Block,
    build_blocks,
    build_embedding,
    build_norm,
    build_positions,
    build_window_positions,
    format_of,
    initialise,
)
from skipstone.model.config import SkipstoneConfig
from skipstone.model.cost import Cost, cost
from skipstone.model.saved_blocks import SavesItsBlocks
from skipstone.model.stack import Rotation, Stack
from skipstone.model.stored_types import KeepsStoredTypes
from skipstone.model.tokens import Call, tokens_of, with_ids
from skipstone.ops.reference import dropped

Routing = Literal["oracle", "causal"] | Mapping[int, Tensor]


@dataclass
class DecoderOutput(ModelOutput):
    """The output of the decoder, with the decisions of all blocks.

    last_hidden_state: [B, T, D], after the final norm. past_key_values: the KV cache. hidden_states: if requested,
    num_hidden_layers + 1 tensors as in transformers. attentions: always None; transformers' generic heads expect the
    field. records: if requested, one dict per block with its mechanisms' decisions by name.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None
    records: tuple[Records, ...] | None = None


LOSSES_LEFT_OUT = (
    "a training pass computes its loss outside SkipstoneForCausalLM, so the routers' own losses are not in it and "
    "routers that learn by these stay as they are: mix skipstone.train.RoutingMixin into the trainer, or pass labels"
)


class SkipstonePreTrainedModel(SavesItsBlocks, KeepsStoredTypes):
    """The base class of our models: initialisation, cost, and options that can be changed in a built model."""

    config: SkipstoneConfig
    config_class = SkipstoneConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_compile_fullgraph = False
    _can_record_outputs = {"hidden_states": Block}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialise(module, self.config)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: transformers would copy this file into saved folders, where modeling_skipstone.py imports it."""

    @property
    def decoder(self) -> SkipstoneModel:
        """The decoder: this model itself, or the one inside it."""
        found = self.base_model
        assert isinstance(found, SkipstoneModel)
        return found

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations; for a quantised model, the dtype of the final norm's weight."""
        if self.config.weight_format == "float":
            return super().dtype
        return next(self.decoder.norm.parameters()).dtype

    def cost(self, tokens: int = 1024, past: int = 0, batch: int = 1, **options: Any) -> Cost:
        """Return FLOPs, parameters and cache bytes of a call; FLOPs equal those of the operations that would run.

        tokens: new tokens per row. past: cached tokens per row before the call. batch: number of rows. options: further
        arguments of `skipstone.model.cost.cost`: kept, stored, routing and logits_to_keep.
        """
        return cost(self, tokens, past, batch, **options)

    def change_mechanism(self, index: int, **options: object) -> None:
        """Change options of entry `index` of `config.mechanisms`, in the configuration and in all its blocks.

        options: new values by name; None restores a default. This is meant for options that every pass reads, such as
        thresholds; options that define modules need a new model. Raises ValueError for invalid options.
        """
        entries = self.config.mechanism_entries
        entry = entries[index] = entries[index].changed(**options)
        self.config.mechanisms = entries
        for layer in entry.homes:
            self.decoder.layers[layer].mechanisms[entry.key].config = entry.options

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """Change the number of tokens in the vocabulary to `new_num_tokens`, as transformers does.

        None leaves it as it is. Returns the token embedding. args, kwargs: further arguments of transformers'
        `resize_token_embeddings`. Raises ValueError for models with quantised weights or `head_candidates`, which
        cannot be resized.
        """
        small = self.config.weight_format != "float"
        if (small or self.config.head_candidates is not None) and new_num_tokens not in (None, self.config.vocab_size):
            what = f"{self.config.weight_format} weights" if small else "a preview of its head"
            raise ValueError(f"the vocabulary of a model with {what} cannot be resized; resize the original")
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)  # type: ignore[no-any-return]

    def _activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: PlainDict | None = None, *args: object
    ) -> None:
        if (activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError("use_reentrant=True loses the records of routed blocks; use use_reentrant=False")
        super()._activation_checkpointing_enable(activation_checkpointing_kwargs, *args)


class SkipstoneModel(SkipstonePreTrainedModel):
    """The decoder for `config` without an output head: embeddings, blocks with their mechanisms, and final norm."""

    def __init__(self, config: SkipstoneConfig) -> None:
        super().__init__(config)
        self.embed_tokens = build_embedding(config)
        self.positions = build_positions(config)
        self.window_positions = build_window_positions(config)
        self.layers = build_blocks(config)
        self.norm = build_norm(config)
        self.gradient_checkpointing = False
        # A trainer may set the seed of the step's random numbers and the index of the pass's first row in the step.
        self.step_noise: tuple[Tensor, Tensor] | None = None
        # A trainer may set the measured benefit of blocks for the next pass, fp32 [B, T] by block, NaN if not measured.
        self.benefits: Mapping[int, Tensor] = {}
        # Several processes may have to run every block together, also one that keeps no token in this process.
        self.every_block_runs = False
        blocks = self.layers
        self._keep_in_fp32_modules_strict = {name for block in blocks for name in block.fp32_names()}
        if (stored := format_of(config)) is not None:
            stored.replace(self)
            self._keep_in_fp32_modules_strict |= {"weight_scale"}
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs  # which also returns a tuple where one is asked for
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        document_ids: Tensor | None = None,
        routing: Routing | None = None,
        noise: bool | None = None,
        executor: Executor = "gathered",
        output_records: bool | None = False,
        **kwargs: Any,
    ) -> DecoderOutput:
        """Return the hidden states [B, T, D] of the last block after the final norm, with cache and records.

        input_ids: int64 [B, T]; or inputs_embeds: [B, T, D]. attention_mask: [B, seen + T], 0 for padding (seen: cached
        tokens). position_ids: int64 [B, T]; default: counted in each document, without padding. document_ids: int64 [B,
        T], for packed rows. past_key_values and use_cache are as in transformers. routing: "oracle": decisions may look
        at the whole row (the default in training mode, unless `config.training_routing` is "causal"); "causal": they do
        not look at later tokens, as in generation (the default otherwise); or {layer: bool mask [B, T]}: the tokens
        that these blocks keep, while others decide causally. noise: whether mechanisms draw random numbers; default: in
        training mode with "oracle". executor: "gathered" computes kept tokens only; "masked" computes all and discards
        others, with the same result. output_records: whether to return decisions; None means no, without the warning in
        training that the mechanisms' losses are lost. Raises ValueError for invalid arguments.
        """
        refuse_mistyped(kwargs)
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions is not supported: no block keeps its attention weights")
        if kwargs.get("output_hidden_states") and any(block.span > 1 for block in self.layers):
            raise ValueError("output_hidden_states is not supported with a segment, whose blocks see kept tokens alone")
        x_BTD = self._embedded(input_ids, inputs_embeds)
        mode, forced = self._mode(routing, noise, executor, x_BTD)
        cache = self._cache(past_key_values, use_cache, mode, x_BTD)
        mode = replace(mode, whole_rows=cache is None, never_empty=self.every_block_runs)
        tokens = self._tokens(x_BTD, mode, cache, attention_mask, position_ids, document_ids)
        if any(mechanism.reads_ids for block in self.layers for mechanism in block.mechanisms.values()):
            tokens = with_ids(tokens, input_ids, None if cache is None else cache.layers[0])
        x_BTD, angles = self._positioned(x_BTD, tokens)
        # transformers temporarily lowers the number to draft with the first blocks (`assistant_early_exit`)
        blocks = list(islice(self.layers, self.config.num_hidden_layers))
        tokens = tokens.replace(rotary=angles[blocks[0].turned_by])
        stack = Stack(
            blocks=blocks,
            turn=partial(self._turned, tokens, angles),
            forced=forced,
            cache=cache,
            recorded=bool(output_records) or self.training,
        )
        x_BTD, records = stack.run(x_BTD, tokens)
        for layer in () if cache is None else cache.layers:
            layer.advance(tokens.length)
        if self.training and output_records is False and not torch.compiler.is_compiling():
            _warn_of_losses_left_out(records)
        return DecoderOutput(
            last_hidden_state=self.norm(x_BTD),
            past_key_values=cache,
            records=tuple(records) if output_records else None,
        )

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Return the residual stream before the first block. Raises ValueError for ids outside of the vocabulary."""
        check_input(input_ids, inputs_embeds, self.config.hidden_size)
        if inputs_embeds is not None:
            return inputs_embeds
        assert input_ids is not None
        try:
            return self.embed_tokens(input_ids)  # type: ignore[no-any-return]
        except IndexError:  # raised on a CPU only; accelerators fail with a device assertion, and a check would sync
            wrong = input_ids[(input_ids < 0) | (input_ids >= self.config.vocab_size)]
            raise ValueError(
                f"input_ids must lie in 0 to {self.config.vocab_size - 1} (vocab_size - 1), got {int(wrong[0])}"
            ) from None

    def _mode(
        self, routing: Routing | None, noise: bool | None, executor: Executor, x_BTD: Tensor
    ) -> tuple[PassMode, Mapping[int, Tensor]]:
        """Return how the pass decides and executes, and the masks of kept tokens that the caller imposes, by block."""
        forced = routing if isinstance(routing, Mapping) else {}
        default: str = self.config.training_routing if self.training else "causal"
        decided = "causal" if isinstance(routing, Mapping) else routing or default
        if decided not in ("oracle", "causal"):
            raise ValueError(unknown("routing", decided, ["oracle", "causal", "{layer: mask}"]))
        if executor not in ("gathered", "masked"):
            raise ValueError(unknown("executor", executor, ["gathered", "masked"]))
        self._check_masks(forced, shape := x_BTD.shape[:2])
        noise = self.training and decided == "oracle" if noise is None else noise
        mode = PassMode(
            routing="oracle" if decided == "oracle" else "causal",
            noise=noise,
            executor="masked" if x_BTD.device.type == "meta" else executor,  # without values nothing can be gathered
            per_row_gather=True,
            single_token=shape == (1, 1) and decided == "causal" and not torch.is_grad_enabled(),
        )
        return mode, forced

    def _check_masks(self, forced: Mapping[int, Tensor], shape: torch.Size) -> None:
        for i, mask in forced.items():
            if i not in range(len(self.layers)):
                raise ValueError(f"routing names block {i!r}, but the model has blocks 0 to {len(self.layers) - 1}")
            first = self.layers[i].segment_start()
            if not self.layers[i].mechanisms and first is None:
                raise ValueError(f"routing names block {i}, which has no depth mechanism")
            if mask.dtype != torch.bool or tuple(mask.shape) not in ((1, shape[1]), tuple(shape)):
                raise ValueError(
                    f"routing[{i}] must be a bool mask of shape {list(shape)}, got {mask.dtype} {list(mask.shape)}"
                )
            if first is not None and not self.layers[i].mechanisms:
                same = forced.get(first)
                if same is None or not (same is mask or torch.equal(same, mask)):
                    raise ValueError(f"routing[{i}] differs from routing[{first}], whose segment holds block {i} too")

    def _cache(
        self, past_key_values: Cache | None, use_cache: bool | None, mode: PassMode, x_BTD: Tensor
    ) -> Cache | None:
        """Return the cache of this call: the given one after checks, a new one, or None."""
        if past_key_values is None:
            build = use_cache and mode.routing == "causal" and not self.training
            return DynamicCache(config=self.config) if build and x_BTD.device.type != "meta" else None
        heads = self.config.key_value_heads, self.config.head_size
        check_cache(past_key_values, {self.config.num_hidden_layers, len(self.layers)}, x_BTD.shape[0], heads)
        if self.training and any(block.gradient_checkpointing for block in self.layers):
            raise ValueError(  # transformers would not pass the cache to the blocks, and only log it
                "activation checkpointing in training mode cannot use a cache; pass use_cache=False or call eval()"
            )
        if mode.routing == "oracle" and any(block.mechanisms for block in self.layers):
            raise ValueError("routing 'oracle' needs the whole row and cannot use a cache; pass routing='causal'")
        return past_key_values

    def _tokens(
        self,
        x_BTD: Tensor,
        mode: PassMode,
        cache: Cache | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        document_ids: Tensor | None,
    ) -> Tokens:
        """Return the `Tokens` of this call, with the state that mechanisms carry between blocks as before block 0."""
        call = Call(
            shape=x_BTD.shape[:2],
            device=x_BTD.device,
            seen=0 if cache is None else cache.get_seq_length(),
            attention_mask=attention_mask,
            position_ids=position_ids,
            document_ids=document_ids,
        )
        tokens = tokens_of(call, of_fixed_size(mode, cache, x_BTD.shape[1]))
        state: dict[str, Tensor] = {}
        for block in self.layers:
            for mechanism in block.mechanisms.values():
                state.update(mechanism.initial_state(x_BTD))
        state |= {BENEFIT.format(layer=i): x_BT for i, x_BT in self.benefits.items()}
        draws = tokens.mode.noise and any(block.routing_modules() for block in self.layers)
        seed, first = self.step_noise or (draw_seed(x_BTD.device), None) if draws else (None, None)
        return tokens.replace(state=state, noise_seed=seed, first_row=first)

    def _positioned(self, x_BTD: Tensor, tokens: Tokens) -> tuple[Tensor, dict[str, Rotation | None]]:
        """Return the stream with learned positions and dropout added, and cos and sin of rotary angles by name."""
        angles: dict[str, Rotation | None] = {"none": None}
        if self.config.positions != "rope":
            x_BTD = x_BTD + self.positions(self._checked(tokens.position_BT))
        else:
            angles["row"] = self.positions(tokens.position_BT, x_BTD.dtype)
            if self.window_positions is not None:
                angles["window"] = self.window_positions(tokens.position_BT, x_BTD.dtype)
        return dropped(x_BTD, self.config.embedding_dropout, self.training), angles

    def _turned(
        self, whole: Tokens, angles: Mapping[str, Rotation | None], name: str, tokens: Tokens
    ) -> Rotation | None:
        """Return the angles of this name for a block's tokens: `whole`, all of the call, or a segment's selection."""
        if tokens.position_BT is whole.position_BT:  # slots that all rows share stay the same for some of the rows
            return angles[name]
        positions = self.window_positions if name == "window" else self.positions
        assert positions is not None
        return None if name == "none" else positions(tokens.position_BT, angles[name][0].dtype)  # type: ignore[index]

    def _checked(self, position_BT: Tensor) -> Tensor:
        """Return the positions unchanged. Raises ValueError if one is negative or beyond the context, on a CPU only."""
        limit = self.config.max_position_embeddings
        if not torch.compiler.is_compiling() and position_BT.device.type == "cpu":
            low, high = (int(x) for x in position_BT.aminmax())
            if high >= limit:
                raise ValueError(f"the input is longer than the model's context of {limit} learned positions")
            if low < 0:
                raise ValueError(f"position_ids must be at least 0, got {low}")
        return position_BT


def _warn_of_losses_left_out(records: list[Records]) -> None:
    """Warn if the caller of a training pass does not request the records, and so cannot add their auxiliary losses."""
    if torch.is_grad_enabled() and any(r.loss_BT is not None for layer in records for r in layer.values()):
        warnings.warn(LOSSES_LEFT_OUT, stacklevel=2)


AutoModel.register(SkipstoneConfig, SkipstoneModel, exist_ok=True)
