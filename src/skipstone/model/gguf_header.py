"""The header of a GGUF file, compared with the configuration that transformers' GGUF reader makes of it.

The reader ignores keys and tensors that it does not know, and the model then silently computes something else: RoPE
scaling, the factors of Llama 3's RoPE, head sizes, windows, soft caps. What our decoder supports is added to the
configuration here, with llama.cpp's meaning; the rest is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedConfig
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from skipstone.core.strict import PlainDict
from skipstone.model.families.base import FULL, SLIDING

FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
CONSTANTS = ("attn_rot_embd.weight", "rope_freqs.weight")  # ends of names of tables of frequencies
# Keys that say nothing about what is computed; some files have an epsilon for either kind of norm. Those that
# transformers' table maps to a setting are read there.
SILENT = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "expert_used_count", "pooling_type"}
SILENT |= {"attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"}
PARTIAL = ("phi3", "nemotron")  # families whose classes rotate a part of each head
Handler: TypeAlias = Callable[[PreTrainedConfig, "Header", Any], bool]  # returns whether the configuration now says so


class Header:
    """The keys of a GGUF file and the names of its tensors.

    path: the file. architecture: such as "llama". values: the values of the architecture's keys, without the prefix,
    such as "embedding_length". others: the values of all other keys but the tokenizer's. tensors: the names of the
    file's tensors. factors: by name, the values of the tensors that divide RoPE's frequencies. has_tokenizer: whether
    the file contains a tokenizer.
    """

    def __init__(self, path: Path) -> None:
        """Read the header of the file `path`.

        Raises ValueError if it names no architecture, and whatever the package `gguf` raises for a damaged file.
        """
        from gguf import GGUFReader

        reader = GGUFReader(str(path))
        read = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
        if not isinstance(read.get("general.architecture"), str):
            raise ValueError("the header names no general.architecture")
        self.architecture: str = read["general.architecture"]
        start = f"{self.architecture}."
        self.values: PlainDict = {name.removeprefix(start): x for name, x in read.items() if name.startswith(start)}
        self.others: PlainDict = {name: x for name, x in read.items() if not name.startswith(start)}
        self.tensors: list[str] = [tensor.name for tensor in reader.tensors]
        self.factors = {x.name: x.data.reshape(-1).astype(float).tolist() for x in reader.tensors if x.name in FACTORS}
        self.has_tokenizer = "tokenizer.ggml.model" in reader.fields


@lru_cache(maxsize=1)
def _header(path: Path, changed: int) -> Header:
    """Return the header of a file, cached because a large vocabulary takes seconds to read.

    changed: the time of the file's last change in ns, so that a changed file is read again.
    """
    return Header(path)


def read_header(path: Path) -> Header:
    """Return the header of the GGUF file `path`.

    Raises ValueError if it names no architecture, and whatever the package `gguf` raises for a damaged file.
    """
    return _header(path, path.stat().st_mtime_ns)


def complete_config(config: PreTrainedConfig, header: Header) -> None:
    """Add to `config` what the header says and transformers' GGUF reader, which made `config`, has ignored.

    Raises ValueError that names the first key that cannot be added, and for a file that is one part of several.
    """
    parts = header.others.get("split.count", 1)
    if parts > 1:
        number = header.others.get("split.no", 0) + 1
        raise ValueError(f"the file is part {number} of {parts}; join them (llama-gguf-split --merge)")
    if (experts := header.values.get("expert_count", 0)) > 0:
        raise ValueError(
            f"{header.architecture}.expert_count is {experts}: a mixture of experts; only dense models load"
        )
    tables = (GGUF_CONFIG_MAPPING.get(name, {}) for name in (header.architecture, config.model_type))
    mapped = {key for table in tables for key, name in table.items() if name is not None}
    for key, value in header.values.items():
        handler = HANDLERS.get(key)
        if handler is None and (key in mapped or key in SILENT or not value):
            continue
        if handler is None or not handler(config, header, value):
            raise ValueError(f"{header.architecture}.{key} is {value!r}, which is not supported for this architecture")
    _scale_rope(config, header)


def check_tensors(names: list[str], layers: int, header: Header) -> None:
    """Raise ValueError if the file has a tensor that belongs to no parameter, which transformers' reader drops.

    names: the names of the parameters of transformers' model. layers: its number of blocks. header: the file's header.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    known = {name: architecture for architecture, name in MODEL_ARCH_NAMES.items()}
    table = get_tensor_name_map(known[header.architecture], layers)
    taken = {table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    left = [n for n in header.tensors if n not in taken and n not in FACTORS and not n.endswith(CONSTANTS)]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise ValueError(f"the model has no place for {left[0]}{more}, which transformers' reader leaves out")


def _ropes(config: PreTrainedConfig) -> tuple[PlainDict, PlainDict | None]:
    """Return the RoPE parameters of blocks with full attention, and of those with a window if they have their own."""
    rope: PlainDict = getattr(config, "rope_parameters", None) or {}
    return (rope[FULL], rope.get(SLIDING)) if FULL in rope else (rope, None)


def _base(config: PreTrainedConfig, header: Header, value: Any) -> bool:
    _ropes(config)[0]["rope_theta"] = float(value)
    return True


def _window_base(config: PreTrainedConfig, header: Header, value: Any) -> bool:
    full, local = _ropes(config)
    if local is None:
        return bool(full.get("rope_theta") == value)
    local["rope_theta"] = float(value)
    return True


def _head_size(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _key_length(config: PreTrainedConfig, header: Header, value: Any) -> bool:
    if hasattr(config, "head_dim"):
        config.head_dim = int(value)
    return _head_size(config) == value and header.values.get("attention.value_length", value) == value


def _rotated(config: PreTrainedConfig, header: Header, value: Any) -> bool:
    size = header.values.get("attention.key_length", _head_size(config))
    if config.model_type in PARTIAL:
        _ropes(config)[0]["partial_rotary_factor"] = value / size
        return True
    return bool(value == size)


def _window(config: PreTrainedConfig, header: Header, value: Any) -> bool:
    if config.model_type == "phi3":
        config.sliding_window = int(value)
    return not value or value in (getattr(config, "sliding_window", None), header.values.get("context_length"))


def _pattern(config: PreTrainedConfig, header: Header, value: Any) -> bool:
    """Set which blocks have a window in `config.layer_types`; return whether the configuration can express it.

    value: a list of booleans, one for each block, or N, which means that every Nth block has no window.
    """
    count = int(config.num_hidden_layers)
    windowed = value if isinstance(value, list) else [(i + 1) % int(value) != 0 for i in range(count)]
    if not hasattr(config, "layer_types"):
        return not any(windowed)
    config.layer_types = [SLIDING if is_windowed else FULL for is_windowed in windowed]
    return len(windowed) == count


def _cap(field: str) -> Handler:
    def set_cap(config: PreTrainedConfig, header: Header, value: Any) -> bool:
        if hasattr(config, field):
            setattr(config, field, float(value) or None)
        return (getattr(config, field, None) or 0.0) == float(value)

    return set_cap


def _only(*values: object) -> Handler:
    return lambda config, header, value: value in values


def _in_scaling(config: PreTrainedConfig, header: Header, value: Any) -> bool:
    return True  # read by `_scale_rope`


HANDLERS: dict[str, Handler] = {
    "rope.freq_base": _base,
    "rope.freq_base_swa": _window_base,
    "rope.dimension_count": _rotated,
    "rope.scaling.type": _only("none", "linear", "yarn", "longrope"),
    "rope.scaling.factor": _in_scaling,
    "rope.scale_linear": _in_scaling,
    "rope.scaling.original_context_length": _in_scaling,
    "rope.scaling.attn_factor": _in_scaling,
    "rope.scaling.yarn_attn_factor": _only(1.0),
    "rope.scaling.yarn_ext_factor": _only(1.0, -1.0),
    "rope.scaling.yarn_beta_fast": _in_scaling,
    "rope.scaling.yarn_beta_slow": _in_scaling,
    "attention.key_length": _key_length,
    "attention.value_length": lambda config, header, value: value == _head_size(config),
    "attention.sliding_window": _window,
    "attention.sliding_window_pattern": _pattern,
    "attn_logit_softcapping": _cap("attn_logit_softcapping"),
    "final_logit_softcapping": _cap("final_logit_softcapping"),
    "attention.causal": _only(True),
}


def _scale_rope(config: PreTrainedConfig, header: Header) -> None:
    """Set RoPE scaling in `config`, from the header's keys or from tensors of factors, which divide the frequencies.

    Raises ValueError for tensors of another size than the frequencies, and for longrope without such tensors.
    """
    said, rope = header.values, _ropes(config)[0]
    kind = said.get("rope.scaling.type", "linear" if "rope.scale_linear" in said else "none")
    factor: Any = said.get("rope.scaling.factor", said.get("rope.scale_linear", 1.0))
    context = int(config.max_position_embeddings)
    original = int(said.get("rope.scaling.original_context_length", context))
    both, long, short = (header.factors.get(name) for name in FACTORS)
    long, short = long or both, short or both
    if long and short:
        rotated = int(_head_size(config) * rope.get("partial_rotary_factor", 1.0)) // 2
        for name, values in header.factors.items():
            if len(values) != rotated:
                raise ValueError(f"{name} must have {rotated} factors, got {len(values)}")
        if both:  # one set for every length
            original, scale = context, 1.0
        else:
            grown = max(context / original, 1.0)
            scale = math.sqrt(1 + math.log(grown) / math.log(original)) if grown > 1 else 1.0
        rope |= {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        rope |= {"original_max_position_embeddings": original}
        rope |= {"attention_factor": said.get("rope.scaling.attn_factor", scale)}
        if getattr(config, "original_max_position_embeddings", None) is not None:
            config.original_max_position_embeddings = original
    elif kind == "longrope":
        raise ValueError(f"{header.architecture}.rope.scaling.type is longrope, but the file has no {FACTORS[1]}")
    elif kind == "linear" and factor != 1:
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        rope |= {f"beta_{end}": said[name] for end in ("fast", "slow")
                 if (name := f"rope.scaling.yarn_beta_{end}") in said}  # fmt: skip
        if "rope.scaling.attn_factor" in said:
            rope["attention_factor"] = said["rope.scaling.attn_factor"] * (1 + 0.1 * math.log(max(factor, 1)))
