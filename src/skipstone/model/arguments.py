"""Checks of the arguments of a decoder call, and `of_fixed_size`, how a call executes with a `StaticCache`.

Checked are the names of arguments, the inputs, the labels, and whether a cache fits the model and the batch.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.core.static import SkipstoneStaticCacheLayer
from skipstone.core.strict import PlainMapping
from skipstone.core.tokens import Executor, PassMode
from skipstone.ops.head_loss import IGNORED

OWN_ARGUMENTS = (
    "routing",
    "noise",
    "executor",
    "output_records",
    "document_ids",
    "shift_labels",
    "loss_chunk",
    "distillation",
)
# Those that mean the same in all models of transformers. A name has to be closer to them: others exist besides.
THEIR_ARGUMENTS = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "labels",
    "use_cache",
    "logits_to_keep",
    "output_hidden_states",
    "num_items_in_batch",
)


def refuse_mistyped(arguments: PlainMapping) -> None:
    """Raise ValueError for a keyword argument that is not known but close to a known one, and so probably mistyped.

    arguments: keyword arguments by name. Transformers ignores unknown ones.
    """
    for name in () if torch.compiler.is_compiling() else arguments:  # compilers cannot trace the comparison of names
        if (near := _meant(name)) is not None:
            raise ValueError(f"unknown argument {name!r}; did you mean {near!r}?")


@lru_cache
def _meant(name: str) -> str | None:
    """Return the known argument whose name is close to `name`, or None."""
    if name in OWN_ARGUMENTS or name in THEIR_ARGUMENTS:
        return None
    for names, cutoff in ((OWN_ARGUMENTS, 0.8), (THEIR_ARGUMENTS, 0.9)):
        if near := difflib.get_close_matches(name, names, n=1, cutoff=cutoff):
            return near[0]
    return None


def check_input(input_ids: Tensor | None, inputs_embeds: Tensor | None, width: int) -> None:
    """Raise ValueError unless a call has either valid input_ids or valid inputs_embeds.

    input_ids: int64 or int32 [B, T]. inputs_embeds: [B, T, width], width being the model's hidden size. Exactly one of
    them is given, the other is None; B and T are at least 1.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if input_ids is not None:
        if not isinstance(input_ids, Tensor):
            raise ValueError(f"input_ids must be a tensor of shape [rows, tokens], got {type(input_ids).__name__}")
        if input_ids.dim() != 2 or not _whole(input_ids):
            raise ValueError(f"input_ids must be whole numbers of shape [rows, tokens], got {_kind(input_ids)}")
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
    elif not isinstance(inputs_embeds, Tensor):
        raise ValueError(f"inputs_embeds must be a tensor, got {type(inputs_embeds).__name__}")
    elif inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != width:
        raise ValueError(f"inputs_embeds must have shape [rows, tokens, {width}], got {list(inputs_embeds.shape)}")
    given = input_ids if input_ids is not None else inputs_embeds
    assert given is not None
    if 0 in given.shape[:2]:
        raise ValueError(f"a call needs at least one row and one token, got shape {list(given.shape)}")


def refuse_ignored(labels: Any, arguments: PlainMapping) -> None:
    """Raise ValueError for labels that are not a tensor, and for an `ignore_index` other than -100.

    labels: the argument of the forward pass, or None. arguments: the call's further keyword arguments, in which
    `ignore_index` is looked up.
    """
    if labels is not None and not isinstance(labels, Tensor):
        raise ValueError(f"labels must be a tensor of shape [rows, tokens], got {type(labels).__name__}")
    if (index := arguments.get("ignore_index", IGNORED)) != IGNORED:
        raise ValueError(f"ignore_index must be {IGNORED}, got {index}; write {IGNORED} into labels without a target")


def checked_targets(target_BT: Tensor, shape: torch.Size) -> Tensor:
    """Return the labels as int64 after checking that they are whole numbers of the given shape.

    target_BT: labels already shifted to the positions that predict them. shape: the shape of the predictions, [rows,
    tokens]. Raises ValueError if a check fails.
    """
    if not _whole(target_BT):
        raise ValueError(f"labels must be whole numbers, got {target_BT.dtype}")
    if target_BT.shape != shape:
        raise ValueError(
            f"labels must have the shape of the predictions, {list(shape)}, got {list(target_BT.shape)}; "
            "logits_to_keep cannot be combined with labels"
        )
    return target_BT.long()


def refuse_targets(target_BT: Tensor, vocab_size: int) -> None:
    """Raise ValueError if a label is neither -100 nor in [0, vocab_size); called after a loss computation failed.

    target_BT: the labels. Labels on other devices than a CPU are not checked, because accelerators cannot be used any
    more after such a failure.
    """
    if target_BT.device.type != "cpu":
        return
    wrong = target_BT[(target_BT != IGNORED) & ((target_BT < 0) | (target_BT >= vocab_size))]
    if len(wrong):
        raise ValueError(
            f"labels must lie in 0 to {vocab_size - 1} (vocab_size - 1) or be {IGNORED}, got {int(wrong[0])}"
        ) from None


def _whole(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _kind(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)}"


def check_cache(cache: Any, blocks: set[int], rows: int, heads: tuple[int, int]) -> None:
    """Raise ValueError unless a cache was made for this model and this batch.

    cache: the argument `past_key_values`, not None. blocks: the numbers of layers that the cache may have. rows: the
    batch size, which a cache with content must have. heads: number of key/value heads and their size, which cached keys
    must have. Offloaded caches are refused.
    """
    layers = getattr(cache, "layers", None)
    if not layers or not all(isinstance(layer, SkipstoneCacheLayer) for layer in layers):
        raise ValueError(
            "past_key_values must be a DynamicCache(config=model.config) of this model, or a "
            f"StaticCache(config=model.config, max_cache_len=...), got {_described(cache)}; "
            "prefixes of keys and values (prefix tuning) are not supported"
        )
    if len(layers) not in blocks:
        raise ValueError(f"past_key_values has {len(layers)} layers, but the model has {max(blocks)} blocks")
    if cache.offloading:
        raise ValueError("past_key_values must not be offloaded: slots and mechanism state would stay behind")
    held = next((layer.rows for layer in layers if layer.rows is not None), None)
    if held is not None and held != rows:
        raise ValueError(f"past_key_values holds {held} rows, but the call has {rows}; a row is never added to a cache")
    key = next((layer.kv.entries["key"] for layer in layers if "key" in layer.kv.entries), None)
    if key is not None and tuple(key.shape[2:]) != heads:  # one head would be spread over the others silently
        had, has = (f"{number} heads of size {size}" for number, size in (key.shape[2:], heads))
        raise ValueError(f"past_key_values holds keys of {had}, but the model has {has}")


def _described(cache: object) -> str:
    """Return the class name of a cache and of its first layer, for an error message."""
    layers = getattr(cache, "layers", None)
    return type(cache).__name__ + (f" of {type(layers[0]).__name__}" if layers else "")


def of_fixed_size(mode: PassMode, cache: Cache | None, length: int) -> PassMode:
    """Return how a forward pass executes with this cache; with a `StaticCache`, shapes must not depend on decisions.

    mode: how the pass would execute without a cache. cache: the cache, or None; unless it is a `StaticCache`, `mode` is
    returned unchanged. length: tokens per row of this call. With a static cache, steps (length 1) and compiled calls
    compute all tokens and discard the updates of skipped ones. In prompts, every block is given at least one token, so
    that its cache allocates memory.
    """
    if cache is None or not isinstance(cache.layers[0], SkipstoneStaticCacheLayer):
        return mode
    executor: Executor = "masked" if length == 1 or torch.compiler.is_compiling() else mode.executor
    return replace(mode, executor=executor, per_row_gather=False, never_empty=True)
