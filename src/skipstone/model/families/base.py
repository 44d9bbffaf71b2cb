"""The description of a family of pretrained decoders: how to translate its configuration and the names of its tensors.

Each family is one `Family` in a file of its own and one line of the table in `__init__.py`. Both directions are
defined: `read` and `Layout.ours` load a checkpoint, `write` and `Layout.theirs` write one for transformers' class of
the family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from skipstone.core.strict import PlainDict, choose
from skipstone.model.config import SkipstoneConfig

Options = PlainDict
Tensors = dict[str, Tensor]

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "tanh": "tanh",
}


@dataclass(frozen=True, kw_only=True)
class Fused:
    """A projection of a pretrained architecture that is several projections of ours, such as queries, keys and values.

    parts: the names of our projections, such as "q_proj". split: divides the fused tensor (weight or bias) into the
    parts' tensors, given our configuration. join: the reverse of split; by default it concatenates along the first
    axis.
    """

    parts: tuple[str, ...]
    split: Callable[[Tensor, SkipstoneConfig], list[Tensor]]
    join: Callable[[list[Tensor], SkipstoneConfig], Tensor] = lambda parts, config: torch.cat(parts)


def halves(config: SkipstoneConfig) -> Tensor:
    """Return the permutation of a head's features from RoPE on neighbouring pairs to RoPE on halves, int64 [head_size].

    Of the features that RoPE rotates (`partial_rotary_factor` of the head), the even ones come first, then the odd
    ones; features that it does not rotate follow. config: our configuration, which gives head size and RoPE parameters.
    """
    turned = int(config.head_size * (config.rope_parameters or {}).get("partial_rotary_factor", 1.0))
    features = torch.arange(config.head_size)
    return torch.cat([features[:turned:2], features[1:turned:2], features[turned:]])


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The correspondence between a family's tensor names and shapes and ours.

    names: substrings of the family's tensor names, each with what replaces it in our names. fused: projections of the
    family that are several of ours, by name. transposed: projections of the family whose weights are stored [in, out].
    interleaved: our names of the projections and norms with one entry for each feature of each head, if the family's
    RoPE rotates neighbours (2i, 2i + 1); ours rotates (i, i + n / 2) of the n rotated features, so the entries are
    permuted.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, Fused] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    interleaved: tuple[str, ...] = ()

    def ours(self, theirs: Mapping[str, Tensor], config: SkipstoneConfig) -> Tensors:
        """Translate `theirs`, a state dict of the family, to our names and shapes.

        config: our configuration of the model. Returns contiguous tensors by name.
        """
        found: Tensors = {}
        for name, tensor in theirs.items():
            value = tensor.t() if self._is_transposed(name) else tensor
            whole = next((projection for projection in self.fused if f".{projection}." in name), None)
            if whole is None:
                found[_renamed(name, self.names)] = value
                continue
            fused = self.fused[whole]
            for part, piece in zip(fused.parts, fused.split(value, config), strict=True):
                found[_renamed(name.replace(f".{whole}.", f".{part}."), self.names)] = piece
        return {name: self._sorted(name, x, halves(config)).contiguous() for name, x in found.items()}

    def theirs(self, ours: Mapping[str, Tensor], config: SkipstoneConfig) -> Tensors:
        """Translate `ours`, a state dict of our model, to the family's names and shapes.

        config: our configuration of the model. Returns contiguous tensors by name.
        """
        back = {new: old for old, new in self.names.items()}
        found: Tensors = {}
        pieces: dict[tuple[str, str], Tensors] = {}
        pairs = halves(config).argsort()
        for name, turned in ours.items():
            value = self._sorted(name, turned, pairs)
            whole = next(
                ((projection, part) for projection, fused in self.fused.items() for part in fused.parts
                 if f".{part}." in name), None
            )  # fmt: skip
            if whole is None:
                found[_renamed(name, back)] = value
            else:
                projection, part = whole
                at = _renamed(name, back).replace(f".{part}.", f".{projection}.")
                pieces.setdefault((at, projection), {})[part] = value
        for (at, projection), parts in pieces.items():
            fused = self.fused[projection]
            found[at] = fused.join([parts[part] for part in fused.parts], config)
        return {n: (x.t() if self._is_transposed(n) else x).contiguous() for n, x in found.items()}

    def _sorted(self, ours: str, value: Tensor, order: Tensor) -> Tensor:
        """Return the tensor `value` with the features of each head in another order, if its features are interleaved.

        ours: our name of the tensor, which tells that. order: int64 [head_size].
        """
        if not any(f".{name}." in ours for name in self.interleaved):
            return value
        inputs = value.shape[1] if value.dim() == 2 and "norm." not in ours else 1  # a norm's are [E] or [H, E]
        return value.reshape(-1, len(order), inputs)[:, order].reshape(value.shape)

    def _is_transposed(self, theirs: str) -> bool:
        return theirs.endswith(".weight") and any(f".{name}." in theirs for name in self.transposed)


def _renamed(name: str, names: Mapping[str, str]) -> str:
    if not names:
        return name
    return re.sub("|".join(re.escape(old) for old in names), lambda found: names[found[0]], name)


@dataclass(frozen=True, kw_only=True)
class Family:
    """The rules by which a family of pretrained decoders is translated to our configuration and back.

    read: a function of a configuration of the family that returns our configuration fields. write: a function of our
    configuration and of the family's name of the activation that returns the family's fields, except those that have
    the same names in all families, such as vocab_size, which `family_config` adds. layout: translates state dicts.
    only: settings of the family that change its result, each with the values that we support, its default first.
    """

    read: Callable[[PreTrainedConfig], Options]
    write: Callable[[SkipstoneConfig, str], Options]
    layout: Layout = field(default_factory=Layout)
    only: Mapping[str, tuple[object, ...]] = field(default_factory=dict)


FULL, SLIDING = "full_attention", "sliding_attention"  # types of attention, as `layer_types` names them


def context_of(theirs: PreTrainedConfig) -> int:
    """Return the context length in tokens of `theirs`, a configuration of transformers.

    With YaRN it is the extended length, even if the file names the original one.
    """
    named: int = theirs.max_position_embeddings
    rope = getattr(theirs, "rope_parameters", None) or {}
    rope = rope.get(FULL) or rope  # some families have RoPE parameters for each type of attention
    if rope.get("rope_type") != "yarn" or "original_max_position_embeddings" not in rope:
        return named
    return max(named, int(rope["original_max_position_embeddings"] * float(rope.get("factor") or 1)))


def special_of(theirs: PreTrainedConfig, name: str) -> int | list[int] | None:
    """Return the special token id or ids in a field of a transformers configuration; None if negative or not set.

    theirs: the configuration. name: the name of the field.
    """
    value: int | list[int] | None = getattr(theirs, name)
    return None if isinstance(value, int) and value < 0 else value


SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")
SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "initializer_range",
    "tie_word_embeddings",
    "use_cache",
    *SPECIAL,
)


def shared(theirs: PreTrainedConfig) -> Options:
    """Return our configuration fields for the settings that have the same names in all families, such as vocab_size.

    theirs: a configuration of transformers.
    """
    names = {name: getattr(theirs, name) for name in SHARED}
    special = {name: special_of(theirs, name) for name in SPECIAL}
    return {**names, **special, "max_position_embeddings": context_of(theirs)}


def shared_back(config: SkipstoneConfig) -> Options:
    """Return transformers' configuration fields for the settings that have the same names in all families.

    These are, for instance, vocab_size and the special tokens. config: our configuration.
    """
    return {name: getattr(config, name) for name in SHARED}


def whole_rope(rope: Options) -> Options:
    """Return RoPE parameters without `partial_rotary_factor`, for families that rotate whole heads regardless.

    rope: the parameters, as in transformers' `rope_parameters`.
    """
    return {name: value for name, value in rope.items() if name != "partial_rotary_factor"}


def llama_like(theirs: PreTrainedConfig, activation: str = "hidden_act", partial: bool = False) -> Options:
    """Return our configuration fields for a family like Llama.

    That is: RMSNorm, RoPE, grouped-query attention, a gated MLP, no biases. theirs: a configuration of transformers.
    activation: the name of its field for the activation. partial: whether the family's code in transformers reads
    `partial_rotary_factor`; if not, it is dropped.
    """
    return {
        **shared(theirs),
        "intermediate_size": theirs.intermediate_size,
        "num_key_value_heads": theirs.num_key_value_heads,
        "head_dim": getattr(theirs, "head_dim", None),
        "norm_eps": theirs.rms_norm_eps,
        "rope_parameters": dict(theirs.rope_parameters) if partial else whole_rope(theirs.rope_parameters),
        "activation": choose(activation, getattr(theirs, activation), ACTIVATIONS),
        "attention_dropout": theirs.attention_dropout or 0.0,  # some files say null
    }


def llama_like_back(config: SkipstoneConfig, activation: str) -> Options:
    """Return transformers' configuration fields for a model like Llama, including `attention_bias` and `mlp_bias`.

    config: our configuration. activation: the family's name of the activation function.
    """
    return {
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope_back(config),
        "hidden_act": activation,
        "attention_dropout": config.attention_dropout,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def rope_back(config: SkipstoneConfig) -> Options:
    """Return transformers' `rope_parameters` for our `config`; if it sets none, plain RoPE with theta 10,000."""
    return dict(config.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0})


def ropes_by_type(theirs: PreTrainedConfig) -> Options:
    """Return our RoPE fields for a family with separate `rope_parameters` for full and sliding-window attention.

    theirs: a configuration of transformers. Returns `rope_parameters` and `window_rope_parameters`, the latter None if
    no block has a window. YaRN's `truncate` is left out: transformers looks for it beside these dicts and not in them.
    """
    full, local = (_untruncated(whole_rope(theirs.rope_parameters[kind])) for kind in (FULL, SLIDING))
    return {"rope_parameters": full, "window_rope_parameters": local if windows(theirs) else None}


def _untruncated(rope: Options) -> Options:
    return {name: value for name, value in rope.items() if name != "truncate"}


def ropes_by_type_back(config: SkipstoneConfig) -> Options:
    """Return transformers' `rope_parameters` with a dict for each type of attention.

    The types are "full_attention" and "sliding_attention". config: our configuration.
    """
    full = rope_back(config)
    return {"rope_parameters": {FULL: full, SLIDING: dict(config.window_rope_parameters or full)}}


def windows(theirs: PreTrainedConfig) -> Options:
    """Return our fields for sliding-window attention, attention_window and window_layers; {} if no block has a window.

    attention_window is the window in tokens, and window_layers the list of blocks that `layer_types` calls sliding, or
    None for all blocks. theirs: a configuration of transformers. Raises ValueError for types of attention that are
    neither full nor sliding, and for sliding ones without a window.
    """
    window, types = getattr(theirs, "sliding_window", None), list(getattr(theirs, "layer_types", None) or [])
    if other := sorted(set(types) - {FULL, SLIDING}):
        raise ValueError(f"layer_types has {other[0]!r}; supported: {FULL}, {SLIDING}")
    layers = [i for i, kind in enumerate(types) if kind == SLIDING] if types else None
    if window is None and layers:
        raise ValueError(f"sliding_window is null, but layer_types has {SLIDING!r}")
    if window is None or layers == []:
        return {}
    return {"attention_window": window, "window_layers": layers if layers and len(layers) < len(types) else None}


def one_window(theirs: PreTrainedConfig) -> Options:
    """Return {"attention_window": tokens} for a family with the same window in every block, or {} if there is none.

    theirs: a configuration of transformers. Raises ValueError if its `layer_types` contradicts its `sliding_window`:
    the class in transformers would follow the first in passes with a cache, and the second in those without.
    """
    window, types = theirs.sliding_window, {*(getattr(theirs, "layer_types", None) or [])}
    if types - {FULL if window is None else SLIDING}:
        raise ValueError(
            f"layer_types has {' and '.join(sorted(types))} with sliding_window={window}; {theirs.model_type} has a "
            "window in every block or, with null, in none"
        )
    return {} if window is None else {"attention_window": window}


def layer_types(config: SkipstoneConfig) -> list[str]:
    """Return transformers' `layer_types` for our `config`: "sliding_attention" or "full_attention" for each block."""
    windowed = config.windowed_layers()
    return [SLIDING if i in windowed else FULL for i in range(config.num_hidden_layers)]


def window_back(config: SkipstoneConfig) -> int:
    """Return transformers' `sliding_window` for our `config`, in tokens.

    If no block has a window, it is the context length, because it cannot be None.
    """
    return config.attention_window or config.max_position_embeddings
