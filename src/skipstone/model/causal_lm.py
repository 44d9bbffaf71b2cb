"""The language model as Hugging Face knows one: head, loss, generation.

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

from skipstone.core.records import Records
from skipstone.core.routing_module import RoutingModule, require_causal
from skipstone.core.strict import PlainDict
from skipstone.core.tokens import Executor
from skipstone.core.weights import is_quantised, weight_is_readable
from skipstone.model.config import SkipstoneConfig
from skipstone.model.decoder import (
    DecoderOutput,
    Routing,
    SkipstoneModel,
    SkipstonePreTrainedModel,
    refuse_mistyped,
)
from skipstone.model.tokens import within_documents
from skipstone.ops.head_loss import IGNORED, Distillation, linear_cross_entropy, linear_distillation_loss

# Arguments of transformers that the decoder serves; one that is absent leaves the choice to the configuration.
OF_THE_DECODER = ("output_hidden_states", "output_attentions")

AnyModule = TypeVar("AnyModule", bound=RoutingModule)


@dataclass
class CausalLMOutput(ModelOutput):
    """loss: what is minimised, token loss plus auxiliary losses, and a teacher's where one is given.

    token_loss, auxiliary_loss, distillation_loss: its parts, without coefficients. logits [B, T, V], or None.
    attentions: always None, as in `DecoderOutput`.
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


class SkipstoneForCausalLM(SkipstonePreTrainedModel, GenerationMixin):
    """A decoder whose blocks may skip tokens and whose neurons may choose their activation."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SkipstoneConfig) -> None:
        super().__init__(config)
        self.model = SkipstoneModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
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
        loss_chunk: int = 0,
        distillation: Distillation | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Logits, and with labels the loss.

        labels: int64 [B, T], the input ids (shifted here), -100 for tokens not to predict. `shift_labels`, a keyword:
        the same already shifted, the target of each position. The other arguments are those of
        `SkipstoneModel.forward`. The auxiliary losses are summed over labelled tokens and divided like the token loss,
        so that accumulation changes nothing; `config.auxiliary_loss_over` "all": the mean over all real tokens.
        loss_chunk: with labels, make the logits of so many tokens at a time and hand none out; 0: of all at once.
        distillation: with loss_chunk, a teacher's part of `loss`; `token_loss` then carries no gradient of its own.
        """
        refuse_mistyped(kwargs)
        shift_labels = kwargs.get("shift_labels")  # if it were named above, Trainer would want it to report eval_loss
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
            output_records=True,
            **{name: kwargs[name] for name in OF_THE_DECODER if name in kwargs},
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        assert out.last_hidden_state is not None and out.records is not None  # noqa: PT018
        hidden_BTD = out.last_hidden_state[:, keep]
        target_BT = shifted(labels) if shift_labels is None and labels is not None else shift_labels
        logits_BTV = self.lm_head(hidden_BTD) if target_BT is None or not loss_chunk else None
        losses: PlainDict = {}
        if target_BT is not None:
            items = kwargs.get("num_items_in_batch")
            losses = self._losses(hidden_BTD, logits_BTV, target_BT, out.records, items, loss_chunk, distillation)
        return CausalLMOutput(
            logits=logits_BTV,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            records=out.records if output_records else None,
            **losses,
        )

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
        """The loss and its parts."""
        if hidden_BTD.shape[1] != target_BT.shape[1]:
            raise ValueError("logits_to_keep cannot be combined with labels: the loss needs the logits of every token")
        if logits_BTV is not None:
            if distillation is not None:
                raise ValueError("distillation needs a loss_chunk of 1 or more: all logits are not compared here")
            parts = {"token_loss": self._token_loss(logits_BTV, target_BT, items)}
        else:
            parts = self._chunked(hidden_BTD, target_BT, items, chunk, distillation)
        minimised = parts.pop("minimised", parts["token_loss"])
        auxiliary_loss = self._auxiliary_loss(target_BT, records, items, minimised)
        return {"loss": minimised + auxiliary_loss, "auxiliary_loss": auxiliary_loss, **parts}

    def _token_loss(self, logits_BTV: Tensor, target_BT: Tensor, items: Tensor | int | None) -> Tensor:
        """Cross-entropy: the sum over labelled tokens by the number of labels, of the whole step where it is given."""
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
        """The same, and with a teacher the divergence and what is minimised, all logits never at hand."""
        if not weight_is_readable(self.lm_head) or is_quantised(self.lm_head):
            raise ValueError(
                "loss_chunk needs the head's weight as it is, without adapter, hooks, offloading, quantisation or "
                "sharding; pass 0"
            )
        target_N = target_BT.flatten().to(hidden_BTD.device)
        given = (hidden_BTD.flatten(0, 1), self.lm_head.weight, target_N)
        count = (target_N != IGNORED).sum() if items is None else torch.as_tensor(items, device=target_N.device)
        if distillation is None:
            return {"token_loss": linear_cross_entropy(*given, chunk) / count}
        minimised, nats, divergence = linear_distillation_loss(*given, distillation, chunk)
        return {
            "minimised": minimised / count,
            "token_loss": nats / count,
            "distillation_loss": divergence / count,
        }

    def _auxiliary_loss(
        self, target_BT: Tensor, records: tuple[Records, ...], items: Tensor | int | None, like: Tensor
    ) -> Tensor:
        """The mechanisms' own losses, summed over labelled tokens and divided like the token loss."""
        labelled_BT = target_BT != IGNORED
        decided = [record for layer in records for record in layer.values()]
        losses = [(r.loss_BT, r.reached_BT) for r in decided if r.loss_BT is not None]
        if not losses:
            return like.new_zeros(())
        labels = labelled_BT.sum().clamp(min=1)
        if self.config.auxiliary_loss_over == "labelled":
            terms = [torch.where(labelled_BT, loss_BT, 0.0).sum() for loss_BT, _ in losses]
        else:  # means over the tokens that were asked, times the labels, which the division takes out again
            terms = [labels * loss_BT.sum() / reached_BT.sum().clamp(min=1) for loss_BT, reached_BT in losses]
        return sum(terms) / (labels if items is None else items)  # type: ignore[return-value]

    def routing_modules(self) -> Iterator[RoutingModule]:
        """Every mechanism of the model, in the order of the blocks."""
        for block in self.model.layers:
            yield from block.routing_modules().values()

    @property
    def head_is_tied(self) -> bool:
        """Whether the head shares the embedding's weight; configurations are known to be wrong about it."""
        return self.lm_head.weight is self.model.embed_tokens.weight

    def modules_of(self, kind: type[AnyModule]) -> list[AnyModule]:
        """The routing modules of this class, in the order of the blocks."""
        return [module for module in self.routing_modules() if isinstance(module, kind)]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' generation, with causal decisions and without noise, whatever mode the model is in.

        `routing="oracle", use_cache=False` generates as models with sight of the whole row are published to: every step
        runs the text so far anew, decisions on earlier tokens included. `document_ids` [B, T] of a packed prompt: what
        is generated goes on with the last document of each row. Raises ValueError for decisions that see the
        whole row otherwise, and for caches that cannot hold rows of unequal length.
        """
        settings = kwargs.get("generation_config") or self.generation_config
        kind = kwargs.get("cache_implementation") or getattr(settings, "cache_implementation", None)
        if kind not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation {kind!r} cannot hold what blocks that skip tokens keep; "
                "choose 'dynamic' or 'static'"
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

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # its signature tells transformers what may be passed
    def prepare_inputs_for_generation(self, *args: object, **kwargs: object) -> PlainDict:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if inputs.get("document_ids") is not None:
            inputs["document_ids"] = _documents(inputs)
        return {"routing": "causal", "noise": False, **inputs}

    @staticmethod
    def create_masks_for_generate(
        inputs_embeds: Tensor, attention_mask: Tensor | None, **kwargs: object
    ) -> Tensor | None:
        """What transformers asks for with a cache of fixed size: here the mask of this call's tokens alone."""
        return None if attention_mask is None else attention_mask[:, -inputs_embeds.shape[1] :]

    def get_compiled_call(self, compile_config: object) -> Callable[..., CausalLMOutput]:
        """Compiles steps of one token; a prompt's shapes follow from what is kept of it, and it runs as it is."""
        compiled = super().get_compiled_call(compile_config)

        def call(*args: object, input_ids: Tensor | None = None, **kwargs: object) -> CausalLMOutput:
            step = input_ids is not None and input_ids.shape[1] == 1
            return (compiled if step else self)(*args, input_ids=input_ids, **kwargs)

        return call


def _documents(inputs: PlainDict) -> Tensor:
    """The documents of this call's tokens: what is generated goes on with the last document of the prompt."""
    document_BT, cache = inputs["document_ids"], inputs.get("past_key_values")
    given = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
    start = 0 if cache is None else int(cache.get_seq_length())
    end = start + given.shape[1]
    new = max(end - document_BT.shape[1], 0)
    return torch.cat((document_BT, document_BT[:, -1:].expand(-1, new)), dim=1)[:, start:end]


def shifted(labels_BT: Tensor) -> Tensor:
    """The label of the next token at each position, none at the last."""
    return nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)


AutoModelForCausalLM.register(SkipstoneConfig, SkipstoneForCausalLM, exist_ok=True)
# Trainer shifts labels itself (label smoothing, losses of one's own) for the class names in this list alone.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["skipstone"] = "SkipstoneForCausalLM"
# `transformers serve` looks for the class in transformers, by its name. Not `import transformers`: while 5.23 is being
# imported it replaces itself by a second module, which is the one that the server will see.
_transformers: Any = sys.modules["transformers"]
_transformers.SkipstoneForCausalLM = SkipstoneForCausalLM
