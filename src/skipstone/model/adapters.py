"""PEFT adapters saved in a folder: finding the base model that one belongs to, and merging it into that model."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from skipstone.core.routing_module import RoutingModule
from skipstone.core.source_files import is_present, object_in
from skipstone.model.loading import about, check_complete, quiet
from skipstone.model.source_folder import ADAPTER
from skipstone.model.weight_files import open_tensors

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
SAVED = ".modules_to_save.default."  # in the names of layers of which an adapter holds a whole copy


def base_of(folder: Path) -> str:
    """Return the folder or hub name of the model that the PEFT adapter in `folder` was trained for.

    folder: a folder that PEFT has saved, with adapter_config.json and the adapter's weights. Raises ValueError for a
    configuration that cannot be read or names no base or a revision of it, for missing weights, for an adapter that
    cannot be merged into weights (prompt learning), for an adapter of an adapter, and if PEFT is not installed.
    """
    values = object_in(folder / ADAPTER)
    with about(str(folder / ADAPTER)):
        kind, base = values.get("peft_type"), values.get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise ValueError(f"base_model_name_or_path must name the adapter's base, got {base!r}")
        if (Path(base) / ADAPTER).is_file():
            raise ValueError(f"base_model_name_or_path {base!r} is an adapter itself; merge that one first")
        if not any(is_present(folder / name) for name in WEIGHTS):
            raise ValueError(f"the weights of the adapter are missing beside it ({WEIGHTS[0]})")
        if values.get("revision"):
            raise ValueError(f"revision {values['revision']!r} of a base is not supported; merge the adapter with PEFT")
        if importlib.util.find_spec("peft") is None:
            raise ValueError("an adapter needs a package: pip install 'skipstone[peft]'")
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

        if kind not in PeftType.__members__:
            raise ValueError(f"peft_type {kind!r} is unknown to the installed PEFT")
        config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]]
        if config.__new__(config).is_prompt_learning:  # some configurations cannot be built without options
            raise ValueError(f"peft_type {kind} puts virtual tokens before each text and has no weights to merge")
    return base


def merged(folder: Path, base: PreTrainedModel) -> PreTrainedModel:
    """Return the base model with the PEFT adapter in `folder` merged into its weights, in evaluation mode.

    folder: a folder that PEFT has saved. base: the loaded base model, of transformers or ours, which is changed in
    place. Raises ValueError for adapter tensors that are missing, not expected, damaged or of another shape. Warns if
    the adapter contains routers, because their thresholds are buffers, which adapters do not save; calibrate such a
    model before it generates.
    """
    from peft import PeftModel, load_peft_weights

    open_tensors(next(path for name in WEIGHTS if is_present(path := folder / name)))  # names a damaged file
    with about(str(folder)), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT warns of is checked below
        adapted = PeftModel.from_pretrained(base, str(folder))
        found = adapted.load_adapter(str(folder), "default")  # PEFT tells then what did not fit
        saved = load_peft_weights(str(folder), device="cpu")
        whole_layers = [name for name in adapted.state_dict() if SAVED in name]
        missing = _not_shared(found.missing_keys, adapted)
        missing += [name for name in whole_layers if name.replace(SAVED, ".") not in saved]
        check_complete({"missing_keys": missing, "unexpected_keys": found.unexpected_keys, "mismatched_keys": ()})
        stale = [name for name, part in base.named_modules() if _trained_without_buffers(part)]
        whole = _without_adapter(adapted)
    if stale:
        warnings.warn(
            f"{str(folder)!r} holds routers, but thresholds and other buffers stay those of its base; calibrate the "
            "merged model before it generates (skipstone calibrate)",
            stacklevel=2,
        )
    return whole.requires_grad_(True).eval()


def _not_shared(missing: list[str], adapted: nn.Module) -> list[str]:
    """Return the names in `missing` but those of tensors that share memory with a tensor that was loaded.

    PEFT reports such tensors as missing (VB-LoRA's vector bank). adapted: the base with the loaded adapter.
    """
    tensors = adapted.state_dict()
    loaded = {tensor.data_ptr() for name, tensor in tensors.items() if name not in missing}
    return [name for name in missing if name not in tensors or tensors[name].data_ptr() not in loaded]


def _without_adapter(adapted: PeftModel) -> PreTrainedModel:
    """Return the base model with the adapter merged into its weights.

    adapted: the base with the loaded adapter. Raises ValueError for a kind of adapter that PEFT cannot merge.
    """
    try:
        whole: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError):
        kind = adapted.peft_config["default"].peft_type
        raise ValueError(f"peft_type {getattr(kind, 'value', kind)} cannot be merged into a model's weights") from None
    return whole


def _trained_without_buffers(part: object) -> bool:
    """Return whether a module is a mechanism whose parameters the adapter replaces, but not its buffers.

    Adapters only contain parameters, so saved buffers, such as thresholds, stay those of the base.
    """
    if not isinstance(part, RoutingModule):
        return False
    own = any("modules_to_save" in name for name, _ in part.named_parameters())
    saved = part.state_dict()
    return own and any(name in saved for name, _ in part.named_buffers())
