"""Loading of saved models and of dense checkpoints of other families, and their conversion to our format."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from skipstone.core import checksums
from skipstone.core.atomic_write import complete
from skipstone.core.hub import require_hub
from skipstone.core.progress_bar import stages
from skipstone.core.source_files import check_tokenizer_files, is_present, read_tokenizer, require_file
from skipstone.core.strict import PlainDict
from skipstone.model.adapters import base_of, merged
from skipstone.model.card import write_card
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig
from skipstone.model.families import FAMILIES, config_of, family_of
from skipstone.model.gguf_blocks import FourBitRows
from skipstone.model.gguf_header import Header, check_tensors, complete_config, read_header
from skipstone.model.loading import Dtype, about, check_complete, from_tensors, named_dtype, one_line, quiet
from skipstone.model.quantise import check_quantised
from skipstone.model.source_folder import ADAPTER, check_folder, check_room
from skipstone.model.weight_files import check_weight_files

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")


def load_model(path: str | Path, dtype: Dtype = None) -> SkipstoneForCausalLM:
    """Load a saved Skipstone model from the folder `path`.

    dtype: "float32", "bfloat16", "float16" or a torch.dtype; None means the saved weights' dtype. Raises
    FileNotFoundError if there is no such folder, and ValueError for one without config.json, of another architecture or
    format_version, and for weights that are missing, not expected or of another shape.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder {str(folder)!r} does not exist")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} has no config.json: it is not a saved model")
    check_folder(folder)
    kind = _config_values(str(folder), None).get("model_type")
    if kind != SkipstoneConfig.model_type:
        raise ValueError(f"{str(folder)!r} holds a model of type {kind!r}; `skipstone convert` turns it into ours")
    return _load_ours(str(folder), dtype)


def load_pretrained(source: str | Path, dtype: Dtype = None, *, gguf_file: str | None = None) -> SkipstoneForCausalLM:
    """Load a dense checkpoint of a supported architecture (`FAMILIES`), or a model of ours, as one of our models.

    source: a folder, a hub name, the path of a .gguf file, or the folder of a PEFT adapter, which is merged into its
    base. dtype: "float32", "bfloat16", "float16" or a torch.dtype; None means the checkpoint's dtype. gguf_file: the
    name of a GGUF file in the folder or hub repository `source`. Raises FileNotFoundError if there is nothing at
    `source`, and ValueError that names the architecture or setting that is not supported, or the weights that are
    missing or not expected.
    """
    name, gguf_file = _locate(source, gguf_file)
    folder = Path(name)
    _check_source(folder, gguf_file)
    if gguf_file is not None or not is_present(folder / ADAPTER):
        return _load(name, gguf_file, dtype, _as_it_is)
    base = base_of(folder)
    try:
        name, gguf_file = _locate(base, None)
        _check_source(Path(name), gguf_file)
        model = _load(name, gguf_file, dtype, partial(merged, folder))
    except FileNotFoundError as error:
        raise ValueError(f"{str(folder)!r}: the base of the adapter (base_model_name_or_path): {error}") from None
    model.name_or_path = str(folder)
    return model


def _check_source(folder: Path, gguf_file: str | None) -> None:
    """Raise ValueError if a source is damaged or would be read wrongly.

    gguf_file: None if the source is the folder. If it is a GGUF file in the folder, only that file is checked, and that
    there is no adapter beside it, which transformers would apply to it.
    """
    if gguf_file is None:
        check_folder(folder)
    elif folder.is_dir():
        require_file(folder / gguf_file)
        if (folder / ADAPTER).is_file():
            raise ValueError(
                f"{str(folder)!r} holds {gguf_file} and an adapter ({ADAPTER}); move one of them elsewhere"
            )


def _as_it_is(model: PreTrainedModel) -> PreTrainedModel:
    return model


def _load(
    name: str, gguf_file: str | None, dtype: Dtype, changed: Callable[[PreTrainedModel], PreTrainedModel]
) -> SkipstoneForCausalLM:
    """Load a model of ours or of a supported architecture, as one of our models.

    name: a folder or hub name. changed: a function that is applied to the loaded model before its tensors are
    translated, such as one that merges an adapter. Raises what `load_pretrained` raises.
    """
    values = _config_values(name, gguf_file)
    if values.get("model_type") == SkipstoneConfig.model_type:
        ours = changed(_load_ours(name, dtype))
        assert isinstance(ours, SkipstoneForCausalLM)
        return ours
    label, header = _label(name, gguf_file), _header(name, gguf_file)
    with about(label), quiet():
        family_of(values)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **_gguf(gguf_file))
        if header is not None:
            complete_config(config, header)
        translated = config_of(config)  # refuses before gigabytes are read
    if gguf_file is None:
        check_weight_files(Path(name), quantised=False)
    with about(label), quiet():
        if gguf_file is None:
            check_room(Path(name), translated.weights())
        theirs, info = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=named_dtype(dtype, "auto"),
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **_gguf(gguf_file),
        )
        check_complete(info)
        if header is not None:
            check_tensors(list(theirs.state_dict()), config.num_hidden_layers, header)
    theirs = changed(theirs)
    with about(label), quiet():
        return _translate(theirs, translated)


def convert(source: str | Path, out: Path, *, dtype: str | None = None, gguf_file: str | None = None) -> None:
    """Convert the checkpoint `source` to a model folder `out` with tokenizer, generation config and model card.

    source: a folder, a hub name, the path of a .gguf file, or the folder of a PEFT adapter, which is merged into its
    base. dtype: "float32", "bfloat16" or "float16"; None means the checkpoint's dtype. gguf_file: the name of a GGUF
    file in the folder or hub repository `source`. `out` appears only once it is complete. Raises FileNotFoundError if
    there is nothing at `source`, ValueError for an architecture, a setting or weights that are not supported, and
    FileExistsError if `out` is a file or a non-empty folder.
    """
    names = ("reading the checkpoint", "writing the model", "checksums")
    with complete(Path(out)) as partial, stages(*names) as stage:
        next(stage)
        name, gguf_file = _locate(source, gguf_file)
        if gguf_file is None:
            check_tokenizer_files(Path(name))  # before gigabytes are read
        model = load_pretrained(name, dtype, gguf_file=gguf_file)
        tokenizer = load_tokenizer(name, gguf_file)
        next(stage)
        with quiet():
            model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            write_card(model, partial, title=Path(out).name, source=_public(name, gguf_file))
            next(stage)
            checksums.record(partial, checksums.all_but_model_cards(partial))


def files_of(source: str | Path) -> list[Path]:
    """Return the files with the weights of a checkpoint that has been loaded, those of an adapter's base included.

    source: a folder, a hub name (whose files in the local cache are returned), the path of a .gguf file, or the folder
    of a PEFT adapter.
    """
    name, gguf_file = _locate(source, None)
    if gguf_file is not None:
        return [Path(name) / gguf_file]
    if not (folder := Path(name)).is_dir():
        folder = Path(str(cached_file(name, "config.json", local_files_only=True))).parent
    base = files_of(base_of(folder)) if is_present(folder / ADAPTER) else []
    return [*(sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))), *base]


def _locate(source: str | Path, gguf_file: str | None) -> tuple[str, str | None]:
    """Return the folder or hub name, and the name of the GGUF file in it if `source` is one."""
    path = Path(source).expanduser()
    if path.suffix.lower() == ".gguf" != path.suffix and path.is_file():
        raise ValueError(f"source {str(source)!r} must end in .gguf, which transformers' reader expects; rename it")
    if path.suffix == ".gguf" and path.is_file():
        if importlib.util.find_spec("gguf") is None:
            raise ValueError(f"source {str(source)!r} needs a package: pip install 'skipstone[gguf]'")
        return str(path.parent), path.name
    if path.is_file():
        raise ValueError(
            f"source {str(source)!r} is a file; a folder, a hub name or a .gguf file is expected "
            "(weights as a paper released them: name their layout, --from tsa or --from polychromatic)"
        )
    if path.is_dir() and str(source).strip():
        return str(path), gguf_file
    try:
        validate_repo_id(str(source))
    except HFValidationError:
        raise FileNotFoundError(f"source {str(source)!r} does not exist and is not a hub name (owner/name)") from None
    return str(source), gguf_file


def _config_values(name: str, gguf_file: str | None) -> PlainDict:
    """Return config.json as a plain dict; for a GGUF file, what transformers makes of its header."""
    if not Path(name).is_dir():
        require_hub(name)
    try:
        with quiet():
            values, _ = PreTrainedConfig.get_config_dict(name, **_gguf(gguf_file))
    except Exception as error:
        if Path(name).is_dir() or not isinstance(error, OSError):
            raise ValueError(
                f"{_label(name, gguf_file)!r} holds no model that can be read: {one_line(error)}"
            ) from error
        raise FileNotFoundError(
            f"{name!r} is neither a folder nor a model that the hub has: {one_line(error)}"
        ) from None
    if not values:
        run = Path(name)
        hint = (
            f"; it is a run folder: name its model, {str(run / 'model')!r}" if (run / "config.yaml").is_file() else ""
        )
        raise ValueError(f"{name!r} has no config.json: it holds no model{hint}")
    if not isinstance(values, dict):
        raise ValueError(f"config.json of {name!r} must be an object, got {type(values).__name__}")
    return values


def _load_ours(name: str, dtype: Dtype) -> SkipstoneForCausalLM:
    with about(name), quiet():
        config = SkipstoneConfig.from_pretrained(name)
    check_weight_files(Path(name), quantised=True)
    with about(name), quiet():
        check_room(Path(name), config.weights())
        model, info = SkipstoneForCausalLM.from_pretrained(
            name, dtype=named_dtype(dtype, "auto"), ignore_mismatched_sizes=True, output_loading_info=True
        )
        check_complete(info)
        check_quantised(model)
    return model


def _translate(theirs: PreTrainedModel, config: SkipstoneConfig) -> SkipstoneForCausalLM:
    """Return a model of transformers as one of our models of configuration `config`.

    Whether the head is tied is read from the weights, because configurations are known to be wrong about it.
    """
    config.tie_word_embeddings = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    layout = FAMILIES[theirs.config.model_type].layout
    model = from_tensors(config, layout.ours(theirs.state_dict(), config), theirs.dtype)
    model.generation_config = theirs.generation_config
    return model


def load_tokenizer(source: str | Path, gguf_file: str | None = None) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a checkpoint by transformers' AutoTokenizer; None if it has none.

    source: a folder, a hub name, the path of a .gguf file, or the folder of a PEFT adapter; for an adapter without a
    tokenizer, its base model's is loaded. gguf_file: the name of a GGUF file in the folder or hub repository `source`.
    Raises FileNotFoundError if there is nothing at `source`, and ValueError for a tokenizer that cannot be read.
    """
    name, gguf_file = _locate(source, gguf_file)
    if (Path(name) / ADAPTER).is_file() and not any((Path(name) / file).is_file() for file in TOKENIZER_FILES):
        return load_tokenizer(base_of(Path(name)))
    if not Path(name).is_dir():
        require_hub(name)
    present = (cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in TOKENIZER_FILES)
    header = _header(name, gguf_file)
    if (gguf_file is None and not any(present)) or (header is not None and not header.has_tokenizer):
        return None
    with quiet():
        return read_tokenizer(name, **_gguf(gguf_file))


def _header(name: str, gguf_file: str | None) -> Header | None:
    """Return the header of a GGUF file in a folder or hub repository; None if the source is none."""
    if gguf_file is None:
        return None
    path = cached_file(name, gguf_file)
    with about(_label(name, gguf_file)), quiet():
        return read_header(Path(str(path)))


def four_bit_rows(source: str | Path) -> FourBitRows | None:
    """Return a lookup of the matrix rows that a GGUF file stores in four bits, or None for a folder or hub name.

    Its method `find` takes a matrix as loaded in floating point and returns the same matrix in four bits, as the file
    has it, so that it need not be quantised anew. source: path of a GGUF file. Raises FileNotFoundError if `source` is
    neither a path nor a hub name, and ValueError for a damaged file.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return None
    name, gguf_file = _locate(source, None)
    if gguf_file is None:
        return None
    with about(_label(name, gguf_file)), quiet():
        return FourBitRows(Path(name) / gguf_file)


def _label(name: str, gguf_file: str | None) -> str:
    """Return the source's name for messages: the folder or hub name, or the path of the GGUF file."""
    return name if gguf_file is None else str(Path(name) / gguf_file)


def _gguf(gguf_file: str | None) -> dict[str, str]:
    return {} if gguf_file is None else {"gguf_file": gguf_file}


def _public(name: str, gguf_file: str | None) -> str:
    """Return the source's name for a model card: a hub name in full, of a file or folder the last part of its path."""
    return gguf_file or (Path(name).resolve().name if Path(name).is_dir() else name)
