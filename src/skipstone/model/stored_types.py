"""Checks that stored weights have the type of the parameter, so that no quantised numbers are taken for weights.

torch and transformers convert whatever they load to the dtype of the model's parameter. Numbers of an int8 matrix
without their scales, or bits of bf16 read as integers, would silently become weights; fractions that are loaded into an
integer parameter would become 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import PreTrainedModel

from skipstone.model.weight_files import INTEGERS, TYPES, open_tensors, weight_files


class KeepsStoredTypes(PreTrainedModel):
    """The base class of our models, which refuses to load quantised numbers as if they were weights.

    Integers, or floats of 8 or 4 bits, are refused for a parameter in floating point, because torch would convert them
    without their scales; `from_pretrained` also refuses the reverse. Both it and `load_state_dict` raise a ValueError
    that names the tensor. fp32, fp16 and bf16 are converted into each other.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers does, and check that its weights are of the types that the files have.

        Arguments and result are those of transformers' `from_pretrained`. Raises ValueError for integers in the place
        of floating-point weights and the reverse, for instance if `weight_format` in config.json is not that of the
        files.
        """
        found = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        given = kwargs.get("state_dict")
        stored = _in_files(pretrained_model_name_or_path, kwargs) if given is None else _in_memory(given)
        check_types(found[0] if isinstance(found, tuple) else found, stored)
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load tensors by name as torch does, but refuse integers in the place of floating-point weights.

        state_dict: the tensors by name. args, kwargs, result: those of torch's `load_state_dict`. Raises ValueError
        that names the tensor.
        """
        kinds = {name: _kind(parameter.dtype) for name, parameter in self.named_parameters()}
        wrong = {
            n: k
            for n, k in _in_memory(state_dict).items()
            if k.startswith(INTEGERS) > kinds.get(n, k).startswith(INTEGERS)
        }
        check_types(self, wrong)
        return super().load_state_dict(state_dict, *args, **kwargs)


def check_types(model: nn.Module, stored: Mapping[str, str]) -> None:
    """Raise ValueError if a tensor's stored type is not its parameter's, and one of them is that of quantised numbers.

    Those are integers and floats of 8 or 4 bits. model: the model whose parameters are compared. stored: types such as
    "F32" or "float32" by tensor name, with or without "model." before the name.
    """
    for name, parameter in model.named_parameters():
        kind = next((stored[n] for n in (name, f"model.{name}", name.removeprefix("model.")) if n in stored), None)
        own = _kind(parameter.dtype)
        if kind is not None and kind != own and (kind.startswith(INTEGERS) or own.startswith(INTEGERS)):
            raise ValueError(
                f"{name} has type {kind} in the checkpoint and {own} in the model; weight_format must be that of the "
                "stored weights"
            )


def _kind(dtype: torch.dtype) -> str:
    return TYPES.get(dtype, str(dtype).removeprefix("torch."))


def _in_memory(state_dict: Mapping[str, Any]) -> dict[str, str]:
    return {name: _kind(tensor.dtype) for name, tensor in state_dict.items() if hasattr(tensor, "dtype")}


def _in_files(source: Any, options: Mapping[str, Any]) -> dict[str, str]:
    """Return the types of the tensors in the files that transformers has read; empty if these are not known."""
    if source is None or options.get("gguf_file") or options.get("variant"):
        return {}
    folder = Path(str(source))
    if not folder.is_dir():
        revision, cache = options.get("revision"), options.get("cache_dir")
        config = try_to_load_from_cache(str(source), "config.json", cache_dir=cache, revision=revision)
        if not isinstance(config, str):
            return {}
        folder = Path(config).parent
    files = weight_files(folder / (options.get("subfolder") or ""))
    return {name: kind for path in files for name, (kind, _) in open_tensors(path).items()}
