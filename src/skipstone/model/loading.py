"""What every way of loading shares: tensors into a model of ours, strictly, and each trouble as one line."""

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
# Constants that older releases of transformers saved beside the weights, and that no version ever trained: causal masks
# and their value, tables of positions and of RoPE's frequencies.
CONSTANT = re.compile(r"(^|\.)(attn\.bias|(attn|attention)\.masked_bias|rotary_emb\.inv_freq|position_ids)$")


def from_tensors(config: SkipstoneConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> SkipstoneForCausalLM:
    """A model of ours with these weights. Raises ValueError if any is missing, left over or of another shape."""
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
    """Raise ValueError unless every parameter came from the checkpoint and every tensor of it was used."""
    for kind in ("missing", "unexpected"):
        if keys := sorted(key for key in info[f"{kind}_keys"] if not CONSTANT.search(key)):
            what = "the checkpoint lacks" if kind == "missing" else "the model has no place for"
            raise ValueError(f"{what} {and_more(keys)}")
    for key, theirs, ours in sorted(info["mismatched_keys"]):
        raise ValueError(f"{key} has shape {list(theirs)} in the checkpoint and {list(ours)} in the model")


def and_more(keys: list[str]) -> str:
    """The first of some keys, and how many there are beside it."""
    return f"{keys[0]} and {len(keys) - 1} more" if len(keys) > 1 else keys[0]


def named_dtype(dtype: Dtype, default: Any) -> Any:
    """The torch.dtype of a name. Raises ValueError naming what is allowed."""
    if dtype is None:
        return default
    return dtype if isinstance(dtype, torch.dtype) else choose("dtype", dtype, DTYPES)


def one_line(error: Exception) -> str:
    """The line that says what is wrong: the last one of a failed check, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = lines[-1 if isinstance(error, StrictDataclassError) else 0].removeprefix("ValueError: ")
    # The text of such an error says little without its name: a KeyError's is the key alone.
    telling = isinstance(error, OSError | ValueError | ImportError | StrictDataclassError | SafetensorError)
    return line if telling else f"{type(error).__name__}: {line}"


@contextmanager
def about(name: str) -> Iterator[None]:
    """Every error of the source as one line that names it."""
    try:
        yield
    except Exception as error:  # whatever a library raises about a file of the user's
        raise ValueError(f"{name}: {one_line(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' reports and progress bars: what they would say is checked here, and raised."""
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
