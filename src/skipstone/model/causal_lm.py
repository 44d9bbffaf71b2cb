"""The language model as a Hugging Face class: decoder, head, loss, generation.

Shape letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin
from transformers.cache_utils import Cache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import ModelOutput, can_return_tuple

from skipstone.core.records import Records, auxiliary_loss
from skipstone.core.routing_module import RoutingModule, require_causal
from skipstone.core.strict import PlainDict
from skipstone.core.tokens import Executor
from skipstone.core.weights import is_quantised, weight_is_readable
from skipstone.model.arguments import checked_targets, refuse_ignored, refuse_mistyped, refuse_targets
from skipstone.model.build import HeadPreview, Int8Linear, Rotary, StoredLinear, format_of, multiplied
from skipstone.model.config import SkipstoneConfig
from skipstone.model.decoder import (
    DecoderOutput,
    Routing,
    SkipstoneModel,
    SkipstonePreTrainedModel,
)
from skipstone.model.tokens import within_documents
from skipstone.ops.head_loss import IGNORED, Distillation, linear_cross_entropy, linear_distillation_loss

# transformers' arguments that are passed on to the decoder; without them the configuration decides.
OF_THE_DECODER = ("output_hidden_states", "output_attentions")

AnyModule = TypeVar("AnyModule", bound=RoutingModule)


@dataclass
class CausalLMOutput(ModelOutput):
    """The output of the language model, with its losses.

    loss: the training loss, a scalar: token loss plus auxiliary losses; with a teacher, the weighted sum of token loss
    and distillation loss takes the place of the token loss. token_loss: cross-entropy in nats, a mean over labels (or,
    if `num_items_in_batch` was given, the sum divided by it). auxiliary_loss: the sum of the mechanisms' own losses,
    coefficients included. distillation_loss: KL(teacher || student) in nats times the squared temperature, averaged
    like token_loss, without its coefficient. Losses are None without labels, distillation_loss also without a teacher.
    logits: [B, T, V] for V vocabulary entries, or None. past_key_values: the KV cache. hidden_states: if requested,
    num_hidden_layers + 1 tensors as in transformers. records: if requested, one dict per block with its mechanisms'
    decisions by name. attentions: always None. last_hidden_state: the decoder's normalised hidden states, [B, T, D]
    with D the width, if `output_last_hidden_state` is True, else None.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    records: tuple[Records, ...] | None = None
    token_loss: Tensor | None = None
    auxiliary_loss: Tensor | None = None
    distillation_loss: Tensor | None = None
    last_hidden_state: Tensor | None = None


class SkipstoneForCausalLM(SkipstonePreTrainedModel, GenerationMixin):
    """A causal language model whose blocks may skip tokens and whose neurons may choose their activation.

    config: the model's configuration. It is a model class of transformers. It consists of a decoder (`SkipstoneModel`)
    and an output head, and supports `generate`, `save_pretrained` and `Trainer` unchanged. Without mechanisms in the
    configuration it is an ordinary dense decoder.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SkipstoneConfig) -> None:
        super().__init__(config)
        self.model = SkipstoneModel(config)
        self.lm_head: nn.Linear | StoredLinear = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if (stored := format_of(config)) is not None:
            self.lm_head = stored.linear(config.hidden_size, config.vocab_size, False)
        if isinstance(self.lm_head, Int8Linear):
            self._tied_weights_keys = {
                **self._tied_weights_keys,
                "lm_head.weight_scale": "model.embed_tokens.weight_scale",
            }
        self.head_preview: HeadPreview | None = None
        if config.head_candidates is not None and config.head_directions is not None:
            sizes = config.hidden_size, config.vocab_size, config.head_directions, config.head_candidates
            self.head_preview = HeadPreview(*sizes)
            self._keep_in_fp32_modules_strict = {"head_preview"}
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        document_ids: Tensor | None = None,
        routing: Routing | None = None,
        noise: bool | None = None,
        executor: Executor = "gathered",
        output_records: bool = False,
        output_last_hidden_state: bool = False,
        loss_chunk: int = 0,
        distillation: Distillation | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Return logits [B, T, V] and, with labels, the loss; other arguments are those of `SkipstoneModel.forward`.

        labels: int64 [B, T], the input ids (shifted here), -100 for no target; or, already shifted, `shift_labels`.
        logits_to_keep: compute the logits of this many last tokens (0 means all) or at these indices. loss_chunk: with
        labels, compute this many tokens' logits at a time and return none; 0 means all at once. distillation: a
        teacher's outputs, which need loss_chunk; `loss` then includes the divergence from them, and `token_loss` has no
        gradient. Losses are sums over labelled tokens, divided by their number or by `num_items_in_batch`; with
        `config.auxiliary_loss_over` "all", mechanisms' losses are means over the tokens that reach them.
        """
        target_BT = _targets(labels, kwargs)
        out: DecoderOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            document_ids=document_ids,
            routing=routing,
            noise=noise,
            executor=executor,
            output_records=True if output_records or target_BT is not None else None,
            **{"return_dict": True, **{name: kwargs[name] for name in OF_THE_DECODER if name in kwargs}},
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        assert out.last_hidden_state is not None
        hidden_BTD = self.to_head(out.last_hidden_state[:, keep])
        logits_BTV = self._logits(hidden_BTD, out) if target_BT is None or not loss_chunk else None
        losses: PlainDict = {}
        if target_BT is not None:
            items, records = kwargs.get("num_items_in_batch"), out.records or ()
            losses = self._losses(hidden_BTD, logits_BTV, target_BT, records, items, loss_chunk, distillation)
        return CausalLMOutput(
            logits=logits_BTV,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            records=out.records if output_records else None,
            last_hidden_state=out.last_hidden_state if output_last_hidden_state else None,
            **losses,
        )

    def to_head(self, hidden_BTD: Tensor) -> Tensor:
        """Return hidden_BTD, the normalised hidden states, times `config.logit_scale`: the output head's input."""
        return hidden_BTD if self.config.logit_scale == 1 else hidden_BTD * self.config.logit_scale

    def _logits(self, hidden_BTD: Tensor, out: DecoderOutput) -> Tensor:
        """Return the logits, [B, T, V], after any soft cap.

        With a preview of the head, a call of one token computes exact logits for the best candidates alone. out: the
        decoder's output, which tells the number of tokens. Raises ValueError if a model with a preview is trained.
        """
        preview = self.head_preview
        alone = out.last_hidden_state is not None and out.last_hidden_state.shape[:2].numel() == 1
        if preview is not None and self.training and torch.is_grad_enabled():
            raise ValueError(
                "head_candidates: a model with a preview of its head cannot be trained; train the original"
            )
        if preview is not None and alone and preview.takes(hidden_BTD, self.lm_head):
            logits_BTV = preview(hidden_BTD, self.lm_head)
        else:
            logits_BTV = multiplied(self.lm_head, hidden_BTD)
        cap = self.config.logit_soft_cap
        return logits_BTV if cap is None else (logits_BTV / cap).tanh() * cap

    def _losses(
        self,
        hidden_BTD: Tensor,
        logits_BTV: Tensor | None,
        target_BT: Tensor,
        records: tuple[Records, ...],
        items: Tensor | int | None,
        chunk: int,
        distillation: Distillation | None,
    ) -> dict[str, Tensor]:
        """Return the losses that `CausalLMOutput` has, by field name.

        target_BT: labels, shifted. records: the decisions of the pass. items: what sums are divided by; None means the
        number of labels. chunk, distillation: as `loss_chunk` and `distillation` in `forward`; logits_BTV is None with
        a chunk.
        """
        if logits_BTV is not None and distillation is not None:
            raise ValueError("distillation needs a loss_chunk of 1 or more, got 0")
        target_BT = checked_targets(target_BT, hidden_BTD.shape[:2])
        try:
            if logits_BTV is not None:
                parts = {"token_loss": self._token_loss(logits_BTV, target_BT, items)}
            else:
                parts = self._chunked(hidden_BTD, target_BT, items, chunk, distillation)
        except (IndexError, RuntimeError):  # of a CPU, where a target is no token
            refuse_targets(target_BT, self.config.vocab_size)
            raise
        minimised = parts.pop("minimised", parts["token_loss"])
        added = self._auxiliary_loss(target_BT, records, items, minimised)
        return {"loss": minimised + added, "auxiliary_loss": added, **parts}

    def _token_loss(self, logits_BTV: Tensor, target_BT: Tensor, items: Tensor | int | None) -> Tensor:
        """Return the sum of cross-entropies in nats over labels, divided by `items`, or by their number if None."""
        if logits_BTV.dtype == torch.float64:  # transformers' function computes in fp32
            count = (target_BT != IGNORED).sum() if items is None else items
            flat_NV, flat_N = logits_BTV.flatten(0, 1), target_BT.flatten().to(logits_BTV.device)
            return nn.functional.cross_entropy(flat_NV, flat_N, ignore_index=IGNORED, reduction="sum") / count
        return self.loss_function(  # type: ignore[no-any-return]
            logits=logits_BTV,
            labels=None,
            shift_labels=target_BT,
            vocab_size=self.config.vocab_size,
            num_items_in_batch=items,
        )

    def _chunked(
        self,
        hidden_BTD: Tensor,
        target_BT: Tensor,
        items: Tensor | int | None,
        chunk: int,
        distillation: Distillation | None,
    ) -> dict[str, Tensor]:
        """Return the losses on tokens by name, computed for `chunk` tokens at a time without holding all logits.

        They are "token_loss" and, with a teacher, "distillation_loss" and "minimised", their weighted sum. items is as
        in `_losses`. Raises ValueError if the head's weight cannot be read directly.
        """
        if not weight_is_readable(self.lm_head) or is_quantised(self.lm_head):
            raise ValueError(
                "loss_chunk needs direct access to the head's weight, without bias, adapter, hooks, offloading, "
                "quantisation or sharding; pass 0"
            )
        target_N = target_BT.flatten().to(hidden_BTD.device)
        given = (hidden_BTD.flatten(0, 1), self.lm_head.weight, target_N)
        count = (target_N != IGNORED).sum() if items is None else torch.as_tensor(items, device=target_N.device)
        if distillation is None:
            return {"token_loss": linear_cross_entropy(*given, chunk, self.config.logit_soft_cap) / count}
        minimised, nats, divergence = linear_distillation_loss(*given, distillation, chunk, self.config.logit_soft_cap)
        return {
            "minimised": minimised / count,
            "token_loss": nats / count,
            "distillation_loss": divergence / count,
        }

    def _auxiliary_loss(
        self, target_BT: Tensor, records: tuple[Records, ...], items: Tensor | int | None, like: Tensor
    ) -> Tensor:
        """Return the sum of the mechanisms' auxiliary losses, averaged as `config.auxiliary_loss_over` says.

        Without any it is a zero with dtype and device of `like`. items is as in `_losses`.
        """
        found = auxiliary_loss(records, target_BT != IGNORED, items, self.config.auxiliary_loss_over)
        return like.new_zeros(()) if found is None else found

    def routing_modules(self) -> Iterator[RoutingModule]:
        """Yield every module that makes routing decisions (depth mechanisms, PolyGLU, MLP routers), block by block."""
        for block in self.model.layers:
            yield from block.routing_modules().values()

    @property
    def head_is_tied(self) -> bool:
        """Whether the head shares the embedding's weight tensor, whatever `config.tie_word_embeddings` says."""
        return self.lm_head.weight is self.model.embed_tokens.weight

    def modules_of(self, kind: type[AnyModule]) -> list[AnyModule]:
        """Return all routing modules (they decide what is computed) of class `kind` or a subclass, block by block."""
        return [module for module in self.routing_modules() if isinstance(module, kind)]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does; by default, routing looks at no later tokens and adds no exploration noise.

        This holds in training mode, too. Arguments are as in transformers' `generate`, and: document_ids: int64 [B, T],
        the documents of a packed prompt, of which new tokens continue each row's last one. `routing="oracle",
        use_cache=False`: decide by looking at the whole text, as some published models do; every step then recomputes
        everything. Raises ValueError if a decision needs later tokens and these two arguments are not given, and for a
        `cache_implementation` other than "dynamic" and "static".
        """
        settings = kwargs.get("generation_config") or self.generation_config
        kind = kwargs.get("cache_implementation") or getattr(settings, "cache_implementation", None)
        if kind not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation {kind!r} cannot hold rows of different lengths, which blocks that skip tokens "
                "need; choose 'dynamic' or 'static'"
            )
        if kwargs.get("document_ids") is not None and kwargs.get("position_ids") is None:
            mask = kwargs.get("attention_mask")
            kwargs["position_ids"] = within_documents(kwargs["document_ids"], None if mask is None else mask.bool())
        if kwargs.get("routing") == "oracle" and kwargs.get("use_cache") is False:
            return super().generate(*args, **kwargs)
        require_causal(self.routing_modules())
        for reason in {reason for m in self.routing_modules() if (reason := m.not_ready_reason())}:
            warnings.warn(reason, stacklevel=2)
        return super().generate(*args, **kwargs)

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # transformers reads the allowed arguments from its signature
    def prepare_inputs_for_generation(self, *args: object, **kwargs: object) -> PlainDict:
        if self._outgrown(args[0] if args else kwargs["input_ids"], kwargs.get("past_key_values")):
            kwargs |= {"past_key_values": None, "next_sequence_length": None}
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if inputs.get("document_ids") is not None:
            inputs["document_ids"] = _documents(inputs)
        return {"routing": "causal", "noise": False, **inputs}

    def _outgrown(self, input_ids: Any, cache: Cache | None) -> bool:
        """Return whether the row has just grown beyond the length at which longrope changes its frequencies.

        Cached keys were then rotated by other frequencies, so the row is computed anew, once, as transformers does.
        """
        positions = self.model.positions
        border = positions.border if isinstance(positions, Rotary) else None
        if border is None or cache is None or input_ids is None:
            return False
        return bool(input_ids.shape[1] > border >= cache.get_seq_length())

    @staticmethod
    def create_masks_for_generate(
        inputs_embeds: Tensor, attention_mask: Tensor | None, **kwargs: object
    ) -> Tensor | None:
        """Return the padding mask of this call's tokens, [B, T]; transformers calls this with a static cache.

        inputs_embeds: this call's embeddings, of which only the number of tokens is read. attention_mask: [B, seen +
        T], where seen is the number of cached tokens; for None, None is returned.
        """
        return None if attention_mask is None else attention_mask[:, -inputs_embeds.shape[1] :]

    def get_compiled_call(self, compile_config: object) -> Callable[..., CausalLMOutput]:
        """Return a function that calls the model: compiled for steps of one token, uncompiled for prompts.

        transformers calls this when it generates with a static cache. The shapes in a prompt's computation depend on
        routing decisions, so prompts are not compiled. compile_config: transformers' options for torch.compile, used
        for steps.
        """
        compiled = super().get_compiled_call(compile_config)

        def call(*args: object, input_ids: Tensor | None = None, **kwargs: object) -> CausalLMOutput:
            step = input_ids is not None and input_ids.shape[1] == 1
            return (compiled if step else self)(*args, input_ids=input_ids, **kwargs)

        return call


def _documents(inputs: PlainDict) -> Tensor:
    """Return the document ids of this call's tokens, [B, T], in generation from a packed prompt.

    New tokens continue the last document of their row. inputs: the arguments of the call, with the prompt's
    `document_ids`.
    """
    document_BT, cache = inputs["document_ids"], inputs.get("past_key_values")
    given = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
    start = 0 if cache is None else int(cache.get_seq_length())
    end = start + given.shape[1]
    new = max(end - document_BT.shape[1], 0)
    return torch.cat((document_BT, document_BT[:, -1:].expand(-1, new)), dim=1)[:, start:end]


def _targets(labels: Tensor | None, others: PlainDict) -> Tensor | None:
    """Return the labels shifted to the tokens that predict them, [B, T]; None without labels.

    others: further arguments of the call, of which `shift_labels` takes precedence. Raises ValueError for labels that
    are not a tensor, and for arguments that would be ignored silently.
    """
    refuse_mistyped(others)
    refuse_ignored(labels, others)
    shift_labels: Tensor | None = others.get("shift_labels")  # Trainer would require a named one for eval_loss
    return shifted(labels) if shift_labels is None and labels is not None else shift_labels


def shifted(labels_BT: Tensor) -> Tensor:
    """Return labels shifted left by one: each position gets the next token's label, and the last one -100.

    labels_BT: int64 [B, T]; -100 means no prediction. Raises ValueError if the labels are not 2-D.
    """
    if labels_BT.dim() != 2:
        raise ValueError(f"labels must have shape [rows, tokens], got {list(labels_BT.shape)}")
    return nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)


AutoModelForCausalLM.register(SkipstoneConfig, SkipstoneForCausalLM, exist_ok=True)
# Trainer shifts labels itself (label smoothing, custom losses) only for the class names in this list.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["skipstone"] = "SkipstoneForCausalLM"
# `transformers serve` looks the class up in transformers by name. Not by `import transformers`: 5.23 replaces itself in
# sys.modules while it is imported, and the server sees the replacement.
_transformers: Any = sys.modules["transformers"]
_transformers.SkipstoneForCausalLM = SkipstoneForCausalLM
