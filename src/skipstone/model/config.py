"""The model's configuration: a Hugging Face config with parts chosen by name and mechanisms as plain dicts."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, get_type_hints

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME

from skipstone.core.strict import choose, convert, unknown
from skipstone.model.parts import (
    FIXED_MIX,
    MLPS,
    NORMS,
    ROW_OF_16_BYTES,
    STATIC_ROPE,
    ActivationEntry,
    Entry,
    ExpertsEntry,
    FixedMixConfig,
    GroupsEntry,
    MechanismEntry,
    Written,
    parse_activation,
    parse_experts,
    parse_groups,
    parse_mechanisms,
)
from skipstone.model.shim import AUTO_MAP, write_shim

FORMAT_VERSION = 1
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
DROPOUTS = ("embedding_dropout", "attention_dropout", "residual_dropout", "mlp_dropout", "mlp_hidden_dropout")
ALLOWED = {
    "positions": ("rope", "learned"),
    "linear_init": ("normal", "torch"),
    "auxiliary_loss_over": ("labelled", "all"),
    "training_routing": ("oracle", "causal"),
}
WITHOUT_IN_PARTS = ("mlp_bias", "mlp_hidden_dropout")  # which an MLP that is computed in parts does not have
DYNAMIC_ROPE = ("dynamic", "longrope", "proportional")
# Releases before 0.2 took these options of `neuron_groups` with decision magnitude, and did not read them.
NOT_READ = ("chunk_size", "decay", "router_width", "balance_rate")


@strict
class SkipstoneConfig(PreTrainedConfig):
    """Sizes as in Llama; parts by name; mechanisms as a list of plain dicts, the outermost first.

    norm: rmsnorm | layernorm. positions: rope | learned. mlp: gated | plain | experts, the last one's options in
    `experts` (see `nn/experts.py`). activation: a function's name, or a dict `{name: polyglu, ...}`
    or `{name: fixed_mix, groups: {silu: 96, gelu: 32}}` (see `nn/mlp.py`). neuron_groups: options of groups of a gated
    MLP's neurons that are off for a while (see `mechanisms/neuron_groups.py`); None: all are always on.
    mechanisms: `{name, on: block | attention | mlp, layers: "1::2" or a list, ...options}`.
    attention_bias: biases on queries, keys and values; attention_output_bias: on their output projection.
    linear_init: how linear layers start, normal (N(0, initializer_range), biases 0) or torch (nn.Linear's own).
    scaled_output_init: start the projections into the residual stream N(0, initializer_range / sqrt(2 * layers)), as
    GPT-2 and PolyGLU do. residual_dropout: on the output of attention and MLP; mlp_dropout: on the MLP's alone, where
    it differs; mlp_hidden_dropout: on the MLP's neurons. auxiliary_loss_over: which tokens the auxiliary losses are
    averaged over, labelled or all (padding excepted). training_routing: the decisions of a forward pass in training
    mode that is not told which, oracle or causal (those of generation, without noise: for preference and RL training).
    """

    model_type = "skipstone"
    keys_to_ignore_at_inference = ["past_key_values", "records", "token_loss", "auxiliary_loss", "distillation_loss"]

    format_version: int = FORMAT_VERSION
    vocab_size: int = 256
    hidden_size: int = 256
    intermediate_size: int | None = None
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 1024
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    positions: str = "rope"
    rope_parameters: dict[str, Any] | None = None
    qk_norm: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp: str = "gated"
    mlp_bias: bool = False
    experts: Written | None = None
    neuron_groups: Written | None = None
    activation: str | Written = "silu"
    mechanisms: Sequence[Written] | None = None
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    mlp_dropout: float | None = None
    mlp_hidden_dropout: float = 0.0
    auxiliary_loss_over: str = "labelled"
    training_routing: str = "oracle"
    initializer_range: float = 0.02
    linear_init: str = "normal"
    scaled_output_init: bool = False
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"format_version {self.format_version} is not known to this release, which reads {FORMAT_VERSION}: "
                "the model was written by another version of skipstone"
            )
        self._fill()
        super().__post_init__(**kwargs)
        self._check()

    def _fill(self) -> None:
        """Defaults that follow from other values."""
        if self.num_attention_heads < 1:
            raise ValueError(f"num_attention_heads must be at least 1, got {self.num_attention_heads}")
        gated = self.mlp != "plain"
        if self.intermediate_size is None:  # as many parameters as a plain MLP of 4 d, rounded up to 32
            self.intermediate_size = -(-8 * self.hidden_size // 96) * 32 if gated else 4 * self.hidden_size
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads

    def _check(self) -> None:
        for field in SIZES:
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        for field in DROPOUTS:
            if not 0 <= (getattr(self, field) or 0) < 1:
                raise ValueError(f"{field} must be in [0, 1), got {getattr(self, field)}")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be above 0, got {self.norm_eps}")
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        rope = self.rope_parameters or {}
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"partial_rotary_factor must be 1, got {rope['partial_rotary_factor']}: heads turn as a whole"
            )
        kind = rope.get("rope_type", "default")
        if self.positions == "rope" and kind in DYNAMIC_ROPE:
            raise ValueError(
                f"rope_type {kind!r} changes its frequencies with the input's length, so that cached keys go stale; "
                "supported: default, linear, llama3, yarn"
            )
        self._check_names()
        self.parse()
        self._check_activation()
        self._check_experts()
        self._check_neuron_groups()

    def _check_names(self) -> None:
        for name, table in (("norm", NORMS), ("mlp", {**MLPS, "experts": None})):
            choose(name, getattr(self, name), table)
        for field, allowed in ALLOWED.items():
            if getattr(self, field) not in allowed:
                raise ValueError(unknown(field, getattr(self, field), allowed))
        if self.positions == "rope":
            kind = (self.rope_parameters or {}).get("rope_type", "default")
            if kind not in STATIC_ROPE:
                raise ValueError(unknown("rope_type", kind, STATIC_ROPE))

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
        if self.activation_entry.kind == FIXED_MIX:
            raise ValueError(
                f"neuron_groups cannot be combined with activation {FIXED_MIX!r}, whose neurons lie in its order"
            )
        for field in WITHOUT_IN_PARTS:
            if getattr(self, field):
                raise ValueError(f"neuron_groups cannot be combined with {field}, got {getattr(self, field)}")
        groups.options.require(self.num_hidden_layers, self.neurons)

    def parse(self) -> None:
        """Parse the options of parts that were assigned since; what is parsed stays the same object.

        Raises ValueError for unknown names and keys, and for values that cannot be.
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
        """`mechanisms`, parsed."""
        return parse_mechanisms(self.mechanisms or [], self.num_hidden_layers)

    @property
    def activation_entry(self) -> ActivationEntry:
        """`activation`, parsed."""
        return parse_activation(self.activation)

    @property
    def groups_entry(self) -> GroupsEntry | None:
        """`neuron_groups`, parsed; None where all neurons are always on."""
        return None if self.neuron_groups is None else parse_groups(self.neuron_groups)

    @property
    def experts_entry(self) -> ExpertsEntry:
        """`experts`, parsed; all defaults where nothing is said."""
        return parse_experts(self.experts or {})

    @property
    def neurons(self) -> int:
        """`intermediate_size`, filled in."""
        assert self.intermediate_size is not None
        return self.intermediate_size

    @property
    def head_size(self) -> int:
        """`head_dim`, filled in."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def key_value_heads(self) -> int:
        """`num_key_value_heads`, filled in."""
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, options of parts as they were written."""
        return {name: _plain(value) for name, value in super().to_dict().items()}

    def validate_layer_type(self) -> None:
        """All layers share one cache class; transformers' own list of layer types does not apply."""

    @property
    def layer_types(self) -> list[str]:
        """The cache class of each layer, as transformers' DynamicCache asks for it."""
        return ["skipstone"] * self.num_hidden_layers

    @property
    def activation_options(self) -> dict[str, Any]:
        """The activation as a dict with a name."""
        return self.activation_entry.plain()

    def save_pretrained(self, save_directory: str | PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in transformers, with the shim that serves processes which never import this package."""
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(str(save_directory), push_to_hub=push_to_hub, **kwargs)

    def to_json_file(self, json_file_path: str | PathLike[str], use_diff: bool = True) -> None:
        """As in transformers, and the shim beside a config.json.

        Written here and not in `save_pretrained`: that uploads the files which are new since it began.
        """
        super().to_json_file(json_file_path, use_diff=use_diff)
        if Path(json_file_path).name == CONFIG_NAME:
            write_shim(Path(json_file_path).parent)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: transformers would copy this source file into saved folders, where the shim already is."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers: from what is saved. Options of neuron groups that were never read are left out."""
        groups = config_dict.get("neuron_groups")
        if isinstance(groups, dict) and groups.get("decision") == "magnitude":
            config_dict = {**config_dict, "neuron_groups": {k: v for k, v in groups.items() if k not in NOT_READ}}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> SkipstoneConfig:
        """From a recipe: like the constructor, but strict about keys and types, naming the nearest key."""
        fields = [name for name in cls.__dataclass_fields__ if not name.startswith("_")]
        for key in values:
            if key not in fields:
                raise ValueError(unknown("key in model", key, [f for f in fields if f in OWN_FIELDS]))
        typed = {k: convert(HINTS[k], v, f"model.{k}") if k in HINTS else v for k, v in values.items()}
        try:
            return cls(**typed)
        except StrictDataclassError as error:  # transformers' own checks; the last line says what is wrong
            raise ValueError(f"model: {str(error).splitlines()[-1].strip().removeprefix('ValueError: ')}") from None


OWN_FIELDS = frozenset(SkipstoneConfig.__annotations__)
# The types of our own fields; transformers' own annotations do not all resolve.
HINTS = get_type_hints(
    type("Own", (), {"__annotations__": dict(SkipstoneConfig.__annotations__), "__module__": __name__})
) | {  # as a recipe writes them
    "mechanisms": list[dict[str, object]] | None,
    "experts": dict[str, object] | None,
    "neuron_groups": dict[str, object] | None,
    "activation": str | dict[str, object],
}


def _plain(value: Any) -> Any:
    """`value` with entries of parts as dicts."""
    if isinstance(value, Entry):
        return value.plain()
    return [_plain(item) for item in value] if isinstance(value, list) else value


AutoConfig.register("skipstone", SkipstoneConfig, exist_ok=True)
