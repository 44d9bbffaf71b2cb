"""Loading: models of ours, strictly, and dense checkpoints of other families; writing the latter as models of ours."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, logging

from skipstone.core.strict import choose
from skipstone.model.card import write_card
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig
from skipstone.model.families import FAMILIES, config_of, family_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
Dtype = str | torch.dtype | None


def load_model(path: str | Path, dtype: Dtype = None) -> SkipstoneForCausalLM:
    """The model of ours that a folder holds, in its own dtype unless another is named; nothing is made up at random.

    Raises FileNotFoundError if there is no such folder, ValueError for one without config.json, of another
    architecture or format_version, and for weights that are missing, left over or of another shape.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder {str(folder)!r} does not exist")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} has no config.json: it is not a saved model")
    kind = _config_values(str(folder), None).get("model_type")
    if kind != SkipstoneConfig.model_type:
        raise ValueError(f"{str(folder)!r} holds a model of type {kind!r}; `skipstone convert` turns it into ours")
    return _load_ours(str(folder), dtype)


def load_pretrained(source: str | Path, dtype: Dtype = None, *, gguf_file: str | None = None) -> SkipstoneForCausalLM:
    """A dense Llama, Mistral, Qwen2, Qwen3 or GPT-2 checkpoint, or a model of ours, from a folder, the hub or GGUF.

    dtype: "float32", "bfloat16", "float16" or a torch.dtype; the checkpoint's own by default. `source` may also be the
    path of a .gguf file. Raises FileNotFoundError if there is nothing at `source`, and ValueError naming the
    architecture or setting that is not supported, or the weights that are missing or left over.
    """
    name, gguf_file = _locate(source, gguf_file)
    values = _config_values(name, gguf_file)
    if values.get("model_type") == SkipstoneConfig.model_type:
        return _load_ours(name, dtype)
    with _about(name), _quiet():
        family_of(values)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **_gguf(gguf_file))
        ours = config_of(config)  # refuses before gigabytes are read
        theirs, info = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=_dtype(dtype),
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **_gguf(gguf_file),
        )
        _check_complete(info)
        return _translate(theirs, ours)


def convert(source: str | Path, out: Path, *, dtype: str | None = None, gguf_file: str | None = None) -> None:
    """Write `load_pretrained(source)` to the folder `out`, with its tokenizer, generation_config and a model card.

    Raises FileExistsError if `out` is a file or a folder with something in it, and what `load_pretrained` raises.
    `out` appears only when it is complete.
    """
    out = Path(out)
    if out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise FileExistsError(f"output folder {str(out)!r} exists already; nothing is overwritten")
    name, gguf_file = _locate(source, gguf_file)
    model = load_pretrained(name, dtype, gguf_file=gguf_file)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        with _about(name), _quiet():
            model.save_pretrained(partial)
            _copy_tokenizer(name, partial, gguf_file)
            write_card(model, partial, title=out.name, source=_public(name, gguf_file))
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _locate(source: str | Path, gguf_file: str | None) -> tuple[str, str | None]:
    """Folder or hub name, and the GGUF file in it if that is what `source` is."""
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), path.name
    if path.is_file():
        raise ValueError(f"source {str(source)!r} is a file; a folder, a hub name or a .gguf file is expected")
    if path.is_dir() and str(source).strip():
        return str(path), gguf_file
    try:
        validate_repo_id(str(source))
    except HFValidationError:
        raise FileNotFoundError(
            f"source {str(source)!r} does not exist, and is no hub name either (owner/name)"
        ) from None
    return str(source), gguf_file


def _config_values(name: str, gguf_file: str | None) -> dict[str, Any]:
    """config.json as a plain dict (of a GGUF file: what transformers makes of its header)."""
    try:
        with _quiet():
            values, _ = PreTrainedConfig.get_config_dict(name, **_gguf(gguf_file))
    except (OSError, ImportError, ValueError) as error:
        if Path(name).is_dir() or not isinstance(error, OSError):
            raise ValueError(f"{name!r} holds no model that can be read: {_one_line(error)}") from None
        raise FileNotFoundError(
            f"{name!r} is neither a folder nor a model that the hub has: {_one_line(error)}"
        ) from None
    if not values:
        raise ValueError(f"{name!r} has no config.json: it holds no model")
    return values


def _load_ours(name: str, dtype: Dtype) -> SkipstoneForCausalLM:
    with _about(name), _quiet():
        model, info = SkipstoneForCausalLM.from_pretrained(
            name, dtype=_dtype(dtype), ignore_mismatched_sizes=True, output_loading_info=True
        )
        _check_complete(info)
    return model


def _translate(theirs: PreTrainedModel, config: SkipstoneConfig) -> SkipstoneForCausalLM:
    """The same model in our classes. Whether the head is tied is seen in the weights: configs are known to be wrong."""
    config.tie_word_embeddings = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    tensors = FAMILIES[theirs.config.model_type].tensors(theirs.state_dict())
    model, info = SkipstoneForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=theirs.dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    _check_complete(info)
    model.generation_config = theirs.generation_config
    return model


def _check_complete(info: Mapping[str, Any]) -> None:
    """Raise ValueError unless every parameter came from the checkpoint and every tensor of it was used."""
    for kind in ("missing", "unexpected"):
        if keys := sorted(info[f"{kind}_keys"]):
            what = "the checkpoint lacks" if kind == "missing" else "the model has no place for"
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{what} {keys[0]}{more}")
    for key, theirs, ours in sorted(info["mismatched_keys"]):
        raise ValueError(f"{key} has shape {list(theirs)} in the checkpoint and {list(ours)} in the model")


def _copy_tokenizer(name: str, out: Path, gguf_file: str | None) -> None:
    """Through transformers rather than file by file: older folders leave the tokenizer's class to the architecture."""
    present = (cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in TOKENIZER_FILES)
    if gguf_file is None and not any(present):
        return
    AutoTokenizer.from_pretrained(name, trust_remote_code=False, **_gguf(gguf_file)).save_pretrained(out)


def _dtype(dtype: Dtype) -> str | torch.dtype:
    if dtype is None:
        return "auto"
    return dtype if isinstance(dtype, torch.dtype) else choose("dtype", dtype, DTYPES)


def _gguf(gguf_file: str | None) -> dict[str, str]:
    return {} if gguf_file is None else {"gguf_file": gguf_file}


def _public(name: str, gguf_file: str | None) -> str:
    """How a card may name the source: a hub name as it is, of a file or folder its last part only."""
    return gguf_file or (Path(name).resolve().name if Path(name).is_dir() else name)


def _one_line(error: Exception) -> str:
    """The line that says what is wrong: the last one of a failed check, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1 if isinstance(error, StrictDataclassError) else 0].removeprefix("ValueError: ")


@contextmanager
def _about(name: str) -> Iterator[None]:
    """Every error of the source as one line that names it."""
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"{name}: {_one_line(error)}") from None


@contextmanager
def _quiet() -> Iterator[None]:
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
