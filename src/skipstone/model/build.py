"""From configuration to modules: the only file that sees both the decoder's parts and the mechanisms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import initialization as init

from skipstone.core.strict import choose, from_dict, unknown
from skipstone.mechanisms import ACTIVATION, DEPTH, Place
from skipstone.model.layers import parse_layers
from skipstone.nn.attention import Attention, AttentionShape
from skipstone.nn.block import SITES, Block
from skipstone.nn.linear import OutputLinear
from skipstone.nn.mlp import FUNCTIONS, MLPS, FixedActivation
from skipstone.nn.norm import NORMS
from skipstone.nn.positions import STATIC_ROPE, Rotary

if TYPE_CHECKING:
    from skipstone.model.config import SkipstoneConfig

DEFAULT_LAYERS = {"mixture_of_depths": "1::2", "token_selective": "1:", "early_exit": "1:"}
POSITIONS = ("rope", "learned")


@dataclass(frozen=True)
class Placed:
    """One entry of the config's mechanisms: where it sits and its options."""

    kind: str
    site: str
    layers: list[int]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Name of its parameters and records in a block."""
        return self.kind if self.site == "block" else f"{self.kind}_on_{self.site}"


def placed(config: SkipstoneConfig) -> list[Placed]:
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
        layers = options.pop("layers", DEFAULT_LAYERS.get(kind, ":"))
        layers = parse_layers(layers, config.num_hidden_layers, f"{where}.layers")
        from_dict(DEPTH[kind].Config, options, where)
        entries.append(Placed(kind, site, layers, options))
        if sum(e.key == entries[-1].key and set(e.layers) & set(layers) != set() for e in entries) > 1:
            raise ValueError(f"{where}: {kind} sits twice on the same {site}")
    return entries


def check(config: SkipstoneConfig) -> None:
    """Raise ValueError for a configuration that cannot be built."""
    choose("norm", config.norm, NORMS)
    choose("mlp", config.mlp, MLPS)
    if config.positions not in POSITIONS:
        raise ValueError(unknown("positions", config.positions, POSITIONS))
    if config.positions == "rope":
        kind = (config.rope_parameters or {}).get("rope_type", "default")
        if kind not in STATIC_ROPE:
            raise ValueError(unknown("rope_type", kind, STATIC_ROPE))
    activation = config.activation_options
    name = activation.pop("name", None)
    choose("activation", name, {**FUNCTIONS, **ACTIVATION})
    if name in ACTIVATION:
        if config.mlp != "gated":
            raise ValueError(f"activation {name!r} needs mlp 'gated', got {config.mlp!r}")
        from_dict(ACTIVATION[name].Config, activation, "activation")
    elif activation:
        raise ValueError(unknown(f"key in activation {name!r}", next(iter(activation)), ["name"]))
    placed(config)


def _norm(config: SkipstoneConfig, width: int) -> nn.Module:
    return NORMS[config.norm](width, config.norm_eps)


def _activation(config: Any, layer: int) -> nn.Module:
    options = config.activation_options
    name = options.pop("name")
    if name in FUNCTIONS:
        return FixedActivation(name)
    place = Place(
        layer=layer, num_layers=config.num_hidden_layers, index=layer, count=config.num_hidden_layers, name=name
    )
    return ACTIVATION[name](config.hidden_size, config.intermediate_size, place, **options)


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


def build_blocks(config: SkipstoneConfig) -> list[Block]:
    """All blocks of a model, mechanisms in place."""
    entries = placed(config)
    return [
        _block(config, layer, [e for e in entries if layer in e.layers]) for layer in range(config.num_hidden_layers)
    ]


def _block(config: SkipstoneConfig, layer: int, entries: list[Placed]) -> Block:
    mechanisms, sites = {}, {site: [e.key for e in entries if e.site == site] for site in SITES}
    for entry in entries:
        place = Place(
            layer=layer,
            num_layers=config.num_hidden_layers,
            index=entry.layers.index(layer),
            count=len(entry.layers),
            name=entry.key,
        )
        mechanisms[entry.key] = DEPTH[entry.kind](config.hidden_size, place, **entry.options)
    mlp: Callable[..., nn.Module] = MLPS[config.mlp]
    feed = mlp(
        config.hidden_size,
        config.intermediate_size,
        _activation(config, layer),
        config.mlp_bias,
        config.residual_dropout if config.mlp_dropout is None else config.mlp_dropout,
    )
    norms = (_norm(config, config.hidden_size), _norm(config, config.hidden_size))
    return Block(_attention(config, layer), feed, *norms, mechanisms, sites)


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
    if isinstance(module, OutputLinear) and config.scaled_output_init:
        init.normal_(module.weight, 0.0, config.initializer_range / (2 * config.num_hidden_layers) ** 0.5)
    elif type(module).__module__.startswith("skipstone.") and not isinstance(module, nn.Linear):
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
