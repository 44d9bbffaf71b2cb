"""Shared code of all loaders: load tensors into a model strictly, and report each error as one line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import logging

from skipstone.core.strict import PlainMapping, choose
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Dtype = str | torch.dtype | None
# Constants that older releases of transformers saved with the weights and that were never trained: causal masks and
# their value, tables of positions and of RoPE frequencies.
CONSTANT = re.compile(r"(^|\.)(attn\.bias|(attn|attention)\.masked_bias|rotary_emb\.inv_freq|position_ids)$")


def from_tensors(config: SkipstoneConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> SkipstoneForCausalLM:
    """Build a model from the configuration `config` with exactly the weights `tensors`, converted to `dtype`.

    tensors: a state dict under our names. Raises ValueError for missing, additional and wrongly shaped tensors.
    """
    with quiet():
        model, info = SkipstoneForCausalLM.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    check_complete(info)
    return model


def check_complete(info: PlainMapping) -> None:
    """Raise ValueError unless a checkpoint has exactly the model's parameters, in their shapes.

    info: the loading info of transformers' `from_pretrained`, with missing_keys, unexpected_keys and mismatched_keys.
    Constants that old releases of transformers saved are ignored.
    """
    for kind in ("missing", "unexpected"):
        if keys := sorted(key for key in info[f"{kind}_keys"] if not CONSTANT.search(key)):
            what = "the checkpoint lacks" if kind == "missing" else "the model has no place for"
            raise ValueError(f"{what} {and_more(keys)}")
    for key, theirs, ours in sorted(info["mismatched_keys"]):
        raise ValueError(f"{key} has shape {list(theirs)} in the checkpoint and {list(ours)} in the model")


def and_more(keys: list[str]) -> str:
    """Return the first of the tensor names `keys` and the number of the others, such as "a.weight and 3 more"."""
    return f"{keys[0]} and {len(keys) - 1} more" if len(keys) > 1 else keys[0]


def named_dtype(dtype: Dtype, default: Any) -> Any:
    """Return the torch.dtype for "float32", "bfloat16" or "float16"; a torch.dtype is returned as it is.

    dtype: a name, a torch.dtype or None. default: what is returned for None. Raises ValueError for an unknown name.
    """
    if dtype is None:
        return default
    return dtype if isinstance(dtype, torch.dtype) else choose("dtype", dtype, DTYPES)


def one_line(error: Exception) -> str:
    """Return the most telling line of an error's message, after the error's type if the line tells too little alone."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = lines[-1 if isinstance(error, StrictDataclassError) else 0].removeprefix("ValueError: ")
    if line.endswith(":") and line is lines[0]:  # a heading, as of torch's load_state_dict
        line = " ".join(lines[:2])
    # The message of other errors says little without their type: that of a KeyError is the key alone.
    telling = isinstance(error, OSError | ValueError | ImportError | StrictDataclassError | SafetensorError)
    return line if telling or not str(error) else f"{type(error).__name__}: {line}"


@contextmanager
def about(name: str) -> Iterator[None]:
    """Turn every error in a `with` block into a ValueError with one line that begins with `name` (of a file, say)."""
    try:
        yield
    except Exception as error:  # libraries raise many types for broken files
        raise ValueError(f"{name}: {one_line(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the reports and progress bars of transformers and huggingface_hub inside a `with` block.

    Use it where our own code checks and raises whatever they would report.
    """
    level, hub_level, bars = logging.get_verbosity(), hub_logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()
