"""From configuration to modules: the only file that sees both the decoder's parts and the mechanisms."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import initialization as init

from skipstone.core.strict import choose, from_dict, unknown
from skipstone.core.width import Activation, FeedForward
from skipstone.mechanisms import ACTIVATION, DEPTH, GROUPS, MagnitudeGroups, Placement
from skipstone.mechanisms.grouping import NAME as NEURON_GROUPS
from skipstone.mechanisms.grouping import GroupingConfig
from skipstone.model.layers import parse_layers
from skipstone.nn.attention import Attention, AttentionShape
from skipstone.nn.block import SITES, Block
from skipstone.nn.experts import ROW_OF_16_BYTES, ExpertsConfig, ExpertsMLP
from skipstone.nn.grouped_mlp import GroupedMLP
from skipstone.nn.linear import OutputLinear
from skipstone.nn.magnitude_mlp import MagnitudeMLP
from skipstone.nn.mlp import FIXED_MIX, FUNCTIONS, MLPS, FixedActivation, FixedMix, FixedMixConfig
from skipstone.nn.norm import NORMS
from skipstone.nn.positions import STATIC_ROPE, Rotary

if TYPE_CHECKING:
    from skipstone.model.config import SkipstoneConfig

POSITIONS = ("rope", "learned")
LINEAR_INITS = ("normal", "torch")
AUXILIARY_LOSS_OVER = ("labelled", "all")
ROUTINGS = ("oracle", "causal")


@dataclass(frozen=True)
class MechanismEntry:
    """One entry of the config's mechanisms: where it sits and its options."""

    kind: str
    site: str
    layers: list[int]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Name of its parameters and records in a block."""
        return self.kind if self.site == "block" else f"{self.kind}_on_{self.site}"


def parse_mechanisms(config: SkipstoneConfig) -> list[MechanismEntry]:
    """The config's mechanisms, read strictly. Raises ValueError for unknown names, keys, sites or layers."""
    entries = []
    for i, entry in enumerate(config.mechanisms or []):
        where = f"mechanisms[{i}]"
        options = dict(entry)
        kind = options.pop("name", None)
        choose(f"{where}.name", kind, DEPTH)
        site = options.pop("on", "block")
        if site not in SITES:
            raise ValueError(unknown(f"{where}.on", site, SITES))
        layers = options.pop("layers", DEPTH[kind].default_layers)
        layers = parse_layers(layers, config.num_hidden_layers, f"{where}.layers")
        from_dict(DEPTH[kind].Config, options, where)
        entries.append(MechanismEntry(kind, site, layers, options))
        if sum(e.key == entries[-1].key and set(e.layers) & set(layers) != set() for e in entries) > 1:
            raise ValueError(f"{where}: {kind} sits twice on the same {site}")
    return entries


def check(config: SkipstoneConfig) -> None:
    """Raise ValueError for a configuration that cannot be built."""
    choose("norm", config.norm, NORMS)
    choose("mlp", config.mlp, {**MLPS, "experts": ExpertsMLP})
    _check_experts(config)
    for field, allowed in (
        ("positions", POSITIONS),
        ("linear_init", LINEAR_INITS),
        ("auxiliary_loss_over", AUXILIARY_LOSS_OVER),
        ("training_routing", ROUTINGS),
    ):
        if getattr(config, field) not in allowed:
            raise ValueError(unknown(field, getattr(config, field), allowed))
    if config.positions == "rope":
        kind = (config.rope_parameters or {}).get("rope_type", "default")
        if kind not in STATIC_ROPE:
            raise ValueError(unknown("rope_type", kind, STATIC_ROPE))
    _check_activation(config)
    _check_neuron_groups(config)
    parse_mechanisms(config)


def _check_activation(config: Any) -> None:
    options = config.activation_options
    name = options.pop("name", None)
    choose("activation", name, {**FUNCTIONS, **ACTIVATION, FIXED_MIX: FixedMix})
    if name in FUNCTIONS:
        if options:
            raise ValueError(unknown(f"key in activation {name!r}", next(iter(options)), ["name"]))
        return
    if config.mlp != "gated":
        raise ValueError(f"activation {name!r} needs mlp 'gated', got {config.mlp!r}")
    if name == FIXED_MIX:
        groups = from_dict(FixedMixConfig, options, "activation")
        groups.require(config.num_hidden_layers, config.intermediate_size)
    else:
        from_dict(ACTIVATION[name].Config, options, "activation")


def _check_experts(config: SkipstoneConfig) -> None:
    if config.mlp != "experts":
        if config.experts is not None:
            raise ValueError(f"experts is set, but mlp is {config.mlp!r}; it needs mlp 'experts'")
        return
    from_dict(ExpertsConfig, config.experts or {}, "experts")
    if config.hidden_size % ROW_OF_16_BYTES:
        raise ValueError(
            f"hidden_size must be a multiple of {ROW_OF_16_BYTES} with mlp 'experts', got {config.hidden_size}"
        )
    for field in ("mlp_bias", "mlp_hidden_dropout"):
        if getattr(config, field):
            raise ValueError(f"mlp 'experts' has no {field}, got {getattr(config, field)}")


def parse_groups(values: Mapping[str, object], where: str = "neuron_groups") -> GroupingConfig:
    """The options of neuron groups, of the class that their `decision` asks for.

    Raises ValueError as `from_dict`, and for an option that only another decision reads.
    """
    decision = values.get("decision", "learned")
    config = choose(f"{where}.decision", decision, GROUPS).Config
    names = {field.name for field in fields(config)}
    for key in values:
        readers = [name for name, router in GROUPS.items() if key in {field.name for field in fields(router.Config)}]
        if readers and key not in names:
            raise ValueError(f"{where}.{key} is read with decision {' or '.join(readers)} alone, got {decision!r}")
    return from_dict(config, values, where)


def _check_neuron_groups(config: Any) -> None:
    if config.neuron_groups is None:
        return
    options = parse_groups(config.neuron_groups)
    if config.mlp != "gated":
        raise ValueError(f"neuron_groups needs mlp 'gated', got {config.mlp!r}")
    if config.activation_options["name"] == FIXED_MIX:
        raise ValueError(
            f"neuron_groups cannot be combined with activation {FIXED_MIX!r}, whose neurons lie in its order"
        )
    for field in ("mlp_bias", "mlp_hidden_dropout"):
        if getattr(config, field):
            raise ValueError(f"neuron_groups cannot be combined with {field}, got {getattr(config, field)}")
    options.require(config.num_hidden_layers, config.intermediate_size)


def _norm(config: SkipstoneConfig, width: int) -> nn.Module:
    return NORMS[config.norm](width, config.norm_eps)


def _activation(config: Any, layer: int) -> Activation:
    options = config.activation_options
    name = options.pop("name")
    if name in FUNCTIONS:
        return FixedActivation(name)
    if name == FIXED_MIX:
        return FixedMix(FixedMixConfig(**options).of(layer, config.intermediate_size))
    placement = _everywhere(config, layer, name)
    return ACTIVATION[name](config.hidden_size, _neurons(config, layer), placement, **options)


def _neurons(config: Any, layer: int) -> int:
    """Of the layer's MLP: all, unless some were cut."""
    if config.neuron_groups is None:
        return config.intermediate_size  # type: ignore[no-any-return]
    return parse_groups(config.neuron_groups).neurons(layer, config.intermediate_size)


def _everywhere(config: Any, layer: int, name: str) -> Placement:
    """The placement of a part that every block has."""
    layers = config.num_hidden_layers
    return Placement(layer=layer, num_layers=layers, index=layer, count=layers, name=name)


def _attention(config: Any, layer: int) -> Attention:
    shape = AttentionShape(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        bias=config.attention_bias,
        output_bias=config.attention_output_bias,
        dropout=config.attention_dropout,
        residual_dropout=config.residual_dropout,
        head_norm=partial(_norm, config) if config.qk_norm else None,
    )
    return Attention(shape, config, layer)


class Blocks(nn.ModuleList):
    """The blocks of a decoder, as such also for a type checker."""

    def __iter__(self) -> Iterator[Block]:
        return super().__iter__()  # type: ignore[return-value]

    def __getitem__(self, index: int) -> Block:  # type: ignore[override]
        return super().__getitem__(index)  # type: ignore[return-value]


def build_blocks(config: SkipstoneConfig) -> Blocks:
    """All blocks of a model, mechanisms in place. Warns once of each thing that a mechanism has to be trusted with."""
    entries = parse_mechanisms(config)
    blocks = [
        _block(config, layer, [e for e in entries if layer in e.layers]) for layer in range(config.num_hidden_layers)
    ]
    mechanisms = [mechanism for block in blocks for mechanism in block.routing_modules().values()]
    for reason in sorted({reason for mechanism in mechanisms if (reason := mechanism.build_warning())}):
        warnings.warn(reason, stacklevel=2)
    return Blocks(blocks)


def _block(config: SkipstoneConfig, layer: int, entries: list[MechanismEntry]) -> Block:
    mechanisms, sites = {}, {site: [e.key for e in entries if e.site == site] for site in SITES}
    for entry in entries:
        placement = Placement(
            layer=layer,
            num_layers=config.num_hidden_layers,
            index=entry.layers.index(layer),
            count=len(entry.layers),
            name=entry.key,
        )
        mechanisms[entry.key] = DEPTH[entry.kind](config.hidden_size, placement, **entry.options)
    feed = _mlp(config, layer)
    norms = (_norm(config, config.hidden_size), _norm(config, config.hidden_size))
    return Block(_attention(config, layer), feed, *norms, mechanisms, sites)


def _mlp(config: Any, layer: int) -> FeedForward:
    activation = _activation(config, layer)
    dropout = config.residual_dropout if config.mlp_dropout is None else config.mlp_dropout
    sizes = (config.hidden_size, config.intermediate_size)
    if config.mlp == "experts":
        placement = _everywhere(config, layer, "experts")
        assert isinstance(activation, FixedActivation), "checked with the configuration"
        return ExpertsMLP(*sizes, activation, dropout, placement, **(config.experts or {}))
    if config.neuron_groups is not None:
        return _grouped_mlp(config, layer, activation, dropout)
    mlp: Callable[..., FeedForward] = MLPS[config.mlp]
    return mlp(*sizes, activation, config.mlp_bias, dropout, config.mlp_hidden_dropout)


def _grouped_mlp(config: Any, layer: int, activation: Activation, dropout: float) -> FeedForward:
    """What chooses the groups, and the MLP that executes it."""
    router = GROUPS[config.neuron_groups.get("decision", "learned")]
    width, placement = config.hidden_size, _everywhere(config, layer, NEURON_GROUPS)
    chooses = router(width, config.intermediate_size, placement, **config.neuron_groups)
    neurons = _neurons(config, layer)
    if isinstance(chooses, MagnitudeGroups):
        return MagnitudeMLP(width, neurons, activation, chooses, dropout)
    return GroupedMLP(width, neurons, activation, chooses, dropout)


def build_norm(config: SkipstoneConfig) -> nn.Module:
    """The final norm."""
    return _norm(config, config.hidden_size)


def build_positions(config: SkipstoneConfig) -> nn.Module:
    """Rotary angles, or an embedding of positions."""
    if config.positions == "rope":
        return Rotary(config)
    return nn.Embedding(config.max_position_embeddings, config.hidden_size)


def initialise(module: nn.Module, config: SkipstoneConfig) -> None:
    """Start one module where transformers' own defaults are not ours."""
    if isinstance(module, nn.Linear) and config.linear_init == "torch":
        _start_as_torch(module)
    if isinstance(module, ExpertsMLP):
        _start_experts(module, config)
    elif isinstance(module, OutputLinear) and config.scaled_output_init:
        init.normal_(module.weight, 0.0, config.initializer_range / (2 * config.num_hidden_layers) ** 0.5)
    elif type(module).__module__.startswith("skipstone.") and not isinstance(module, nn.Linear):
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()


def _start_as_torch(module: nn.Linear) -> None:
    """What nn.Linear does when it is built: weights and bias U(-1/sqrt(inputs), 1/sqrt(inputs))."""
    bound = module.in_features**-0.5
    for parameter in (module.weight, module.bias):
        if parameter is not None:
            init.uniform_(parameter, -bound, bound)


def _start_experts(module: ExpertsMLP, config: SkipstoneConfig) -> None:
    """As the linear layers of a dense MLP start."""
    for weight in (module.gate_proj, module.up_proj, module.down_proj):
        if weight is module.down_proj and config.scaled_output_init:
            init.normal_(weight, 0.0, config.initializer_range / (2 * config.num_hidden_layers) ** 0.5)
        elif config.linear_init == "torch":
            init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)
        else:
            init.normal_(weight, 0.0, config.initializer_range)
