"""`SkipstoneConfig`: a Hugging Face configuration with parts chosen by name and mechanisms as plain dicts."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME

from skipstone.core.strict import PlainDict, build, choose, convert, mistakes, refuse, unknown
from skipstone.model.fields import FORMAT_VERSION, TYPES, ModelFields, refuse_dynamic
from skipstone.model.parts import (
    FIXED_MIX,
    MLPS,
    NORMS,
    ROPES,
    ROW_OF_16_BYTES,
    ActivationEntry,
    Entry,
    ExpertsEntry,
    FixedMixConfig,
    GroupsEntry,
    MechanismEntry,
    parse_activation,
    parse_experts,
    parse_groups,
    parse_mechanisms,
)
from skipstone.model.shim import AUTO_MAP, write_shim
from skipstone.ops.int8 import FINE, GROUP

WITHOUT_IN_PARTS = ("mlp_bias", "mlp_hidden_dropout")  # not supported by MLPs that are computed in parts
ROPE_NUMBERS = ("factor", "rope_theta", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
MOST_DIRECTIONS = 4096  # whose products with numbers of 15 bits can be summed in 32
NEED_A_FACTOR = ("linear", "yarn", "llama3")
# Releases before 0.2 accepted and ignored these options of `neuron_groups` with decision magnitude.
NOT_READ = ("chunk_size", "decay", "router_width", "balance_rate")


@strict
class SkipstoneConfig(ModelFields, PreTrainedConfig):
    """The Hugging Face configuration of a Skipstone model; its fields are those of `ModelFields`, which documents them.

    Invalid values raise ValueError with one line per mistake.
    """

    model_type = "skipstone"
    keys_to_ignore_at_inference = [
        "past_key_values",
        "records",
        "token_loss",
        "auxiliary_loss",
        "distillation_loss",
        "last_hidden_state",
    ]

    def __post_init__(self, **kwargs: object) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"format_version {self.format_version} is not known to this release, which reads {FORMAT_VERSION}: "
                "the model was written by another version of skipstone"
            )
        self._fill()
        self._check_size()
        self._check_rope_numbers()
        refuse(_mistyped(kwargs))
        try:
            PreTrainedConfig.__post_init__(self, **kwargs)
        except AttributeError:  # of torch
            if not isinstance(self.dtype, str):
                raise
            raise ValueError(f"dtype must be a type of torch, such as 'bfloat16', got {self.dtype!r}") from None
        self._check()

    def _check(self) -> None:
        super()._check()
        self._check_names()
        self.parse()
        self._check_activation()
        self._check_experts()
        self._check_neuron_groups()
        self._check_head()
        self._check_weights()

    def _check_weights(self) -> None:
        kind = self.weight_format
        if kind != "float" and self.mlp == "experts":
            raise ValueError(f"weight_format {kind!r} needs mlp 'gated' or 'plain', got 'experts'")
        if self.weight_group not in ((None, GROUP, FINE) if kind in ("int8", "int4") else (None,)):
            raise ValueError(
                f"weight_group must be {GROUP} or {FINE} with weight_format 'int8' or 'int4', or None, got "
                f"{self.weight_group} with {kind!r}"
            )
        if self.weight_int8 is not None and kind != "int4":
            raise ValueError(f"weight_int8 needs weight_format 'int4', got {kind!r}")

    def _check_head(self) -> None:
        """Raise ValueError unless head_candidates and head_directions are both None or both in the supported range."""
        candidates, directions = self.head_candidates, self.head_directions
        if candidates is None and directions is None:
            return
        if candidates is None or not 1 <= candidates <= self.vocab_size:
            raise ValueError(f"head_candidates must be from 1 to vocab_size ({self.vocab_size}), got {candidates}")
        most = min(self.hidden_size, MOST_DIRECTIONS)
        if most < GROUP:
            raise ValueError(f"head_candidates needs a hidden_size of at least {GROUP}, got {self.hidden_size}")
        if directions is None or directions % GROUP or not GROUP <= directions <= most:
            raise ValueError(f"head_directions must be a multiple of {GROUP} from {GROUP} to {most}, got {directions}")

    def _check_rope_numbers(self) -> None:
        """Raise ValueError for RoPE parameters that are not numbers above 0, and for a missing factor of a scaling."""
        for field in ("rope_parameters", "window_rope_parameters"):
            rope = getattr(self, field)
            if not isinstance(rope, dict):
                continue
            refuse_dynamic(rope)
            for key, value in rope.items():
                if key in ROPE_NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
                    raise ValueError(f"{field}.{key} must be a number, got {value!r}")
                if key in ROPE_NUMBERS and not 0 < value < float("inf"):
                    raise ValueError(f"{field}.{key} must be a number above 0, got {value!r}")
            if rope.get("rope_type") in NEED_A_FACTOR and "factor" not in rope:
                raise ValueError(f"{field}.factor must be a number with rope_type {rope['rope_type']!r}, got none")
            low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
            if rope.get("rope_type") == "llama3" and low is not None and high is not None and low >= high:
                raise ValueError(f"{field}.low_freq_factor ({low}) must be below high_freq_factor ({high})")

    def _check_names(self) -> None:
        for name, table in (("norm", NORMS), ("mlp", {**MLPS, "experts": None})):
            choose(name, getattr(self, name), table)
        if self.positions == "rope":
            for rope in (self.rope_parameters, self.window_rope_parameters):
                if (kind := (rope or {}).get("rope_type", "default")) not in ROPES:
                    raise ValueError(unknown("rope_type", kind, ROPES))

    def _check_activation(self) -> None:
        entry = self.activation_entry
        if entry.options is not None and self.mlp != "gated":
            raise ValueError(f"activation {entry.kind!r} needs mlp 'gated', got {self.mlp!r}")
        if isinstance(entry.options, FixedMixConfig):
            entry.options.require(self.num_hidden_layers, self.neurons)

    def _check_experts(self) -> None:
        if self.mlp != "experts":
            if self.experts is not None:
                raise ValueError(f"experts is set, but mlp is {self.mlp!r}; it needs mlp 'experts'")
            return
        if self.hidden_size % ROW_OF_16_BYTES:
            raise ValueError(
                f"hidden_size must be a multiple of {ROW_OF_16_BYTES} with mlp 'experts', got {self.hidden_size}"
            )
        for field in WITHOUT_IN_PARTS:
            if getattr(self, field):
                raise ValueError(f"mlp 'experts' has no {field}, got {getattr(self, field)}")

    def _check_neuron_groups(self) -> None:
        groups = self.groups_entry
        if groups is None:
            return
        if self.mlp != "gated":
            raise ValueError(f"neuron_groups needs mlp 'gated', got {self.mlp!r}")
        if self.activation_entry.kind == FIXED_MIX and groups.kind != "zeros":
            raise ValueError(
                f"neuron_groups cannot be combined with activation {FIXED_MIX!r}, whose neurons lie in its order; "
                "decision 'zeros' can"
            )
        if groups.kind == "zeros" and not self.activation_entry.has_zeros:
            raise ValueError(
                "neuron_groups.decision 'zeros' needs an activation that is exactly 0 for some inputs, relu or a "
                f"{FIXED_MIX} with relu; got {self.activation_entry.kind!r}"
            )
        if price := getattr(self.activation_entry.options, "price", 0.0):
            raise ValueError(
                f"activation.price is of all neurons of an MLP and cannot be combined with neuron_groups, got {price}"
            )
        for field in WITHOUT_IN_PARTS:
            if getattr(self, field):
                raise ValueError(f"neuron_groups cannot be combined with {field}, got {getattr(self, field)}")
        groups.options.require(self.num_hidden_layers, self.neurons)

    def parse(self) -> None:
        """Parse the options of mechanisms, activation, neuron groups and experts that are still plain dicts.

        Options that are parsed already stay the same objects. Raises ValueError for unknown names and keys and for
        invalid values.
        """
        self.mechanisms = list(parse_mechanisms(self.mechanisms or [], self.num_hidden_layers))
        if not isinstance(self.activation, str):
            self.activation = parse_activation(self.activation)
        if self.neuron_groups is not None:
            self.neuron_groups = parse_groups(self.neuron_groups)
        if self.experts is not None:
            self.experts = parse_experts(self.experts)

    @property
    def mechanism_entries(self) -> list[MechanismEntry]:
        """The entries of `mechanisms` as parsed options, each with the blocks that it applies to."""
        return parse_mechanisms(self.mechanisms or [], self.num_hidden_layers)

    @property
    def activation_entry(self) -> ActivationEntry:
        """The parsed options of `activation`."""
        return parse_activation(self.activation)

    @property
    def groups_entry(self) -> GroupsEntry | None:
        """The parsed options of `neuron_groups`; None if all neurons are always multiplied."""
        return None if self.neuron_groups is None else parse_groups(self.neuron_groups)

    @property
    def experts_entry(self) -> ExpertsEntry:
        """The parsed options of `experts`; the default options if that field is None."""
        return parse_experts(self.experts or {})

    @property
    def key_value_heads(self) -> int:
        """The number of key/value heads, `num_key_value_heads` once its default is filled in."""
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads

    def to_dict(self) -> PlainDict:
        """Return the configuration as a dict of plain values; options of mechanisms and other parts are as written."""
        return {name: _plain(value) for name, value in super().to_dict().items()}

    def validate_layer_type(self) -> None:
        """Do nothing: transformers would check `layer_types`, which our configuration derives itself."""

    @property
    def layer_types(self) -> list[str]:
        """The type of each layer, always "skipstone", by which transformers' caches choose the layers' classes."""
        return ["skipstone"] * self.num_hidden_layers

    @property
    def activation_options(self) -> PlainDict:
        """The activation's options as a plain dict that includes its name."""
        return self.activation_entry.plain()

    def save_pretrained(self, save_directory: str | PathLike[str], push_to_hub: bool = False, **kwargs: object) -> None:
        """Save config.json as transformers does, and modeling_skipstone.py, which imports the model from skipstone.

        With modeling_skipstone.py, transformers' Auto classes load the model by `trust_remote_code=True` in processes
        that have not imported skipstone, which must be installed. save_directory: the folder, created if needed.
        push_to_hub: whether to upload the folder to the Hub, too. kwargs: further arguments of
        `PreTrainedConfig.save_pretrained`.
        """
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(str(save_directory), push_to_hub=push_to_hub, **kwargs)

    def to_json_file(self, json_file_path: str | PathLike[str], use_diff: bool = True) -> None:
        """Write the configuration as transformers does; beside a config.json, write modeling_skipstone.py as well.

        modeling_skipstone.py holds the import by which `trust_remote_code=True` finds the model. It is written here
        because `save_pretrained` uploads only files that appear while it runs. json_file_path: the file to write; under
        any other name than config.json, nothing is written beside it. use_diff: whether to write only fields that
        differ from their defaults.
        """
        super().to_json_file(json_file_path, use_diff=use_diff)
        if Path(json_file_path).name == CONFIG_NAME:
            write_shim(Path(json_file_path).parent)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: transformers would copy this file into saved folders, where modeling_skipstone.py imports it.

        auto_class: not used.
        """

    @classmethod
    def from_dict(cls, config_dict: PlainDict, **kwargs: object) -> SkipstoneConfig:
        """Build a configuration from a saved dict as transformers does.

        Options of neuron groups that releases before 0.2 accepted and ignored are dropped. config_dict: the content of
        a config.json. kwargs: values that replace those of the dict, and further arguments of transformers'
        `from_dict`. Raises ValueError for invalid values.
        """
        groups = config_dict.get("neuron_groups")
        if isinstance(groups, dict) and groups.get("decision") == "magnitude":
            config_dict = {**config_dict, "neuron_groups": {k: v for k, v in groups.items() if k not in NOT_READ}}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_plain(cls, values: PlainDict) -> SkipstoneConfig:
        """Build a configuration from a recipe's section `model`, in which nothing unknown is allowed.

        values: plain values by field name; fields that are left out have their defaults. Raises ValueError with a line
        for each unknown key (and the nearest known one), wrong type and invalid value.
        """
        fields = [name for name in cls.__dataclass_fields__ if not name.startswith("_")]
        lines = [unknown("key in model", key, TYPES) for key in values if key not in fields]
        typed, wrong = {}, set()
        for key in (key for key in values if key in fields):
            try:
                typed[key] = convert(TYPES.get(key, Any), values[key], f"model.{key}")
            except ValueError as error:
                lines += mistakes(error)
                wrong.add(key)
        config, found = build(cls._plainly, typed, wrong)
        refuse([*lines, *found])
        assert config is not None
        return config

    @classmethod
    def _plainly(cls, **values: Any) -> SkipstoneConfig:
        """Call the constructor, turning transformers' multi-line errors into their last line, which has the reason."""
        try:
            return cls(**values)
        except StrictDataclassError as error:
            raise ValueError(f"model: {str(error).splitlines()[-1].strip().removeprefix('ValueError: ')}") from None


def _plain(value: Any) -> Any:
    """Return `value` with the parsed options in it converted back to plain dicts."""
    if isinstance(value, Entry):
        return value.plain()
    return [_plain(item) for item in value] if isinstance(value, list) else value


AutoConfig.register("skipstone", SkipstoneConfig, exist_ok=True)


def _mistyped(given: Iterable[str]) -> list[str]:
    """Return a message for each unknown key that is nearly a field's name, and would silently leave its default.

    given: the unknown keys. Others are kept as attributes, as transformers does, and so are names that end in a field's
    (`moe_intermediate_size`), which are those of other families.
    """
    fields = [field.name for field in dataclasses.fields(ModelFields)]
    lines = []
    for key in given:
        near = difflib.get_close_matches(key, fields, n=1, cutoff=0.85)
        if near and not key.endswith(near[0]):
            lines.append(f"unknown key {key!r}; did you mean {near[0]!r}?")
    return lines
