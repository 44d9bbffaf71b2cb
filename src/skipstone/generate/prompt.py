"""Checks of the inputs of generation: the prompt, its mask, and the ids that pad and end a text."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from operator import index
from typing import SupportsIndex

from torch import Tensor

from skipstone.core.routing_module import require_causal
from skipstone.model.arguments import check_input
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.wrapped import require_ours


def checked_prompt(
    model: SkipstoneForCausalLM, input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int
) -> Tensor | None:
    """Check a prompt for generation; return its attention mask as int64 [B, T], or None if nothing is padding.

    input_ids: int64 [B, T], T tokens in each of B rows. attention_mask: [B, T], 1 for tokens and 0 for padding; None
    means no padding. max_new_tokens: how many tokens are to be generated. Warns if a mechanism's decisions are not
    reliable yet. Raises ValueError for a model that is not a Skipstone model, max_new_tokens below 1, ids or a mask of
    the wrong kind or shape, an empty prompt, padding on the right, a row that would exceed the model's context, and a
    mechanism that cannot decide without later tokens.
    """
    require_ours(model)
    check_count("max_new_tokens", max_new_tokens)
    check_input(input_ids, None, model.config.hidden_size)
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        got = list(input_ids.shape), list(attention_mask.shape)
        raise ValueError(f"input_ids must be [rows, tokens], attention_mask of the same shape or None; got {got}")
    if attention_mask is not None and bool(((attention_mask != 0) & (attention_mask != 1)).any()):
        raise ValueError("attention_mask must hold 1 for tokens and 0 for padding, and holds other numbers")
    mask_BT = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.long()
    length = input_ids.shape[1] if mask_BT is None else int(mask_BT.sum(1).max())
    if input_ids.numel() == 0 or (mask_BT is not None and not bool(mask_BT.any(1).all())):
        raise ValueError("the prompt is empty: generation needs at least one token")
    if mask_BT is not None and not bool(mask_BT[:, -1].all()):
        raise ValueError("the prompt is padded on the right; rows of different length must be padded on the left")
    check_length(model, length, max_new_tokens)
    _check_causal(model)
    return mask_BT


def check_count(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a whole number of at least 1.

    name: the argument's name, for the message.
    """
    if not isinstance(value, SupportsIndex) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if index(value) < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_length(model: SkipstoneForCausalLM, prompt: int, new: int) -> None:
    """Raise ValueError if `prompt` tokens and `new` further ones exceed the model's context."""
    limit = model.config.max_position_embeddings
    if prompt + new > limit:
        raise ValueError(
            f"prompt of {prompt} tokens and {new} new tokens exceed the model's context of {limit} "
            f"(max_position_embeddings); at most {max(limit - prompt, 0)} new tokens fit"
        )


def check_padding(model: SkipstoneForCausalLM, pad_token_id: object) -> None:
    """Raise ValueError if a padding id is not in the model's vocabulary.

    pad_token_id: the id; None is allowed.
    """
    if pad_token_id is not None and pad_token_id not in range(model.config.vocab_size):
        raise ValueError(f"pad_token_id must be in [0, {model.config.vocab_size}), got {pad_token_id!r}")


def ends_of(model: SkipstoneForCausalLM, eos_token_id: int | Sequence[int] | None = None) -> list[int]:
    """Return the ids of tokens that end a text, as a list, which may be empty.

    eos_token_id: one id or several; None means the ids in the model's generation_config, or [] if it has none. Raises
    ValueError for anything but whole numbers.
    """
    ends = model.generation_config.eos_token_id if eos_token_id is None else eos_token_id
    if isinstance(ends, Tensor):
        ends = ends.flatten().tolist()
    found: list[object] = [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]
    ids = [index(end) for end in found if isinstance(end, SupportsIndex) and not isinstance(end, bool)]
    if len(ids) < len(found):
        raise ValueError(f"eos_token_id must be a token id or a list of them, got {ends!r}")
    return ids


def _check_causal(model: SkipstoneForCausalLM) -> None:
    require_causal(model.routing_modules())
    for reason in {reason for mechanism in model.routing_modules() if (reason := mechanism.not_ready_reason())}:
        warnings.warn(reason, stacklevel=5)
