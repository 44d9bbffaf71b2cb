"""Build modules from a configuration; the only file that imports both decoder parts and mechanisms."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial

from torch import nn
from transformers import initialization as init

from skipstone.core.routing_module import RoutingModule
from skipstone.core.width import Activation, ActivationGroupRouter, FeedForward
from skipstone.mechanisms import (
    ACTIVATION,
    DEPTH,
    GROUPS,
    DepthMechanism,
    MagnitudeGroups,
    NeuronGroups,
    Placement,
    ZeroNeurons,
)
from skipstone.mechanisms.grouping import NAME as NEURON_GROUPS
from skipstone.model.config import SkipstoneConfig
from skipstone.model.parts import GroupsEntry, MechanismEntry
from skipstone.nn.attention import Attention, AttentionShape
from skipstone.nn.block import SEGMENT as SEGMENT
from skipstone.nn.block import SITES, Block, Residual
from skipstone.nn.compiled_blocks import runs_of as runs_of
from skipstone.nn.compiled_run import CompiledRun as CompiledRun
from skipstone.nn.embedding import ScaledEmbedding
from skipstone.nn.experts import ExpertsMLP
from skipstone.nn.few_tokens import multiplied as multiplied
from skipstone.nn.float16 import Float16Linear as Float16Linear
from skipstone.nn.formats import BY_NEURON as BY_NEURON
from skipstone.nn.formats import Format as Format
from skipstone.nn.formats import layers_of as layers_of
from skipstone.nn.grouped_mlp import GroupedMLP
from skipstone.nn.head_preview import HeadPreview as HeadPreview
from skipstone.nn.int4 import Int4Linear as Int4Linear
from skipstone.nn.int8 import Int8Linear as Int8Linear
from skipstone.nn.int8 import Int8Weights as Int8Weights
from skipstone.nn.linear import OutputLinear
from skipstone.nn.magnitude_mlp import MagnitudeMLP as MagnitudeMLP
from skipstone.nn.mlp import MLPS, FixedActivation, FixedMix, FixedMixConfig
from skipstone.nn.mlp import plain_mlps as plain_mlps
from skipstone.nn.norm import NORMS
from skipstone.nn.positions import Rotary as Rotary
from skipstone.nn.stored_weights import StoredLinear as StoredLinear
from skipstone.nn.stored_weights import StoredWeights as StoredWeights
from skipstone.nn.windows import pairs as pairs

PLACEMENTS = {  # norm_placement: the norms of `nn/block.py` that a block has
    "before": ("before_attention", "before_mlp"),
    "after": ("after_attention", "after_mlp"),
    "around": ("before_attention", "before_mlp", "after_attention", "after_mlp"),
    "shared": ("before_attention",),
}


def _norm(config: SkipstoneConfig, width: int) -> nn.Module:
    return NORMS[config.norm](width, config.norm_eps)


def _activation(config: SkipstoneConfig, layer: int) -> Activation:
    entry = config.activation_entry
    if isinstance(entry.options, FixedMixConfig):
        return FixedMix(entry.options.of(layer, config.neurons))
    if entry.options is None:
        return FixedActivation(entry.kind)
    placement = _everywhere(config, layer, entry.kind)
    return ACTIVATION[entry.kind](config.hidden_size, _neurons(config, layer), placement, entry.options)


def _neurons(config: SkipstoneConfig, layer: int) -> int:
    """Return the number of neurons of block `layer`'s MLP: the configured number, or fewer if some were pruned."""
    groups = config.groups_entry
    return config.neurons if groups is None else groups.options.neurons(layer, config.neurons)


def _everywhere(config: SkipstoneConfig, layer: int, name: str) -> Placement:
    """Return the placement, in block `layer`, of a part called `name` that every block of the model has."""
    layers = config.num_hidden_layers
    return Placement(layer=layer, num_layers=layers, index=layer, count=layers, name=name)


def _attention(config: SkipstoneConfig, layer: int) -> Attention:
    shape = AttentionShape(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_key_value_heads=config.key_value_heads,
        head_dim=config.head_size,
        bias=config.attention_bias,
        output_bias=config.attention_output_bias,
        dropout=config.attention_dropout,
        residual_dropout=config.residual_dropout,
        norm=partial(_norm, config) if config.qk_norm else None,
        norm_over=config.qk_norm_over,
        scale=config.attention_scale,
        soft_cap=config.attention_soft_cap,
        window=config.attention_window if layer in config.windowed_layers() else None,
    )
    return Attention(shape, config, layer)


class Blocks(nn.ModuleList):
    """The blocks of a decoder: an `nn.ModuleList` whose items are typed as `Block`."""

    def __iter__(self) -> Iterator[Block]:
        return super().__iter__()  # type: ignore[return-value]

    def __getitem__(self, index: int) -> Block:  # type: ignore[override]
        return super().__getitem__(index)  # type: ignore[return-value]


def format_of(config: SkipstoneConfig) -> Format | None:
    """Return the compact format in which `config` stores a model's weights; None for parameters in floating point.

    A compact format holds weights in integers of 8 or 4 bits with scales, or in 16 bits, and cannot be trained.
    """
    if config.weight_format == "float":
        return None
    return Format(name=config.weight_format, group=config.weight_group, left=config.weight_int8 or ())


def build_blocks(config: SkipstoneConfig) -> Blocks:
    """Build all blocks of a model with their attention, MLPs and mechanisms.

    config: the model's configuration, whose options are parsed first. Warns of options for which a mechanism has a
    warning (`build_warning`), once per text.
    """
    config.parse()
    entries = config.mechanism_entries
    blocks: list[Block] = []
    for layer in range(config.num_hidden_layers):
        blocks.append(_block(config, layer, [e for e in entries if layer in e.layers], blocks))
    mechanisms = [mechanism for block in blocks for mechanism in block.routing_modules().values()]
    for reason in sorted({reason for mechanism in mechanisms if (reason := mechanism.build_warning())}):
        warnings.warn(reason, stacklevel=2)
    return Blocks(blocks)


def _block(config: SkipstoneConfig, layer: int, entries: list[MechanismEntry], earlier: list[Block]) -> Block:
    """Build block `layer` with its mechanisms.

    entries: the parsed options of the mechanisms that apply to it. earlier: the blocks before it, of which it needs the
    first of its segment.
    """
    mechanisms: dict[str, DepthMechanism] = {}
    sites = {site: [e.key for e in entries if e.site == site] for site in SITES}
    segment = next((e.layers for e in entries if e.site == SEGMENT), (layer,))
    for entry in entries:
        if layer not in entry.homes:
            continue
        placement = Placement(
            layer=layer,
            num_layers=config.num_hidden_layers,
            index=entry.homes.index(layer),
            count=len(entry.homes),
            name=entry.key,
        )
        mechanisms[entry.key] = DEPTH[entry.kind](config.hidden_size, placement, config=entry.options)
    feed = _mlp(config, layer)
    first = segment[0]
    return Block(
        _attention(config, layer),
        feed,
        _residual(config),
        mechanisms,
        sites,
        span=len(segment) if layer == first else 1,
        around=None if layer == first else earlier[first],
        turned_by=_turned_by(config, layer),
    )


def _turned_by(config: SkipstoneConfig, layer: int) -> str:
    """Return which rotary angles a block uses: "row", "window" (those of blocks with a window), or "none".

    layer: index of the block.
    """
    if config.positions != "rope" or layer not in config.rotary_layers():
        return "none"
    return "window" if config.window_rope_parameters is not None and layer in config.windowed_layers() else "row"


def _residual(config: SkipstoneConfig) -> Residual:
    norms = {name: _norm(config, config.hidden_size) for name in PLACEMENTS[config.norm_placement]}
    shared = config.norm_placement == "shared"
    return Residual(**norms, shared=shared, parallel=config.parallel_residual, scale=config.residual_scale)  # type: ignore[arg-type]


def _mlp(config: SkipstoneConfig, layer: int) -> FeedForward:
    activation = _activation(config, layer)
    dropout = config.residual_dropout if config.mlp_dropout is None else config.mlp_dropout
    if config.mlp == "experts":
        placement = _everywhere(config, layer, "experts")
        assert isinstance(activation, FixedActivation), "checked with the configuration"
        options = config.experts_entry.options
        return ExpertsMLP(config.hidden_size, config.neurons, activation, dropout, placement, options)
    if config.groups_entry is not None:
        return _grouped_mlp(config, config.groups_entry, layer, activation, dropout)
    mlp: Callable[..., FeedForward] = MLPS[config.mlp]
    return mlp(config.hidden_size, config.neurons, activation, config.mlp_bias, dropout, config.mlp_hidden_dropout)


def _grouped_mlp(
    config: SkipstoneConfig, groups: GroupsEntry, layer: int, activation: Activation, dropout: float
) -> FeedForward:
    """Build the MLP of block `layer` if groups of its neurons can be left out, with the router that chooses them.

    groups: the options of the router. activation, dropout: as in the MLP's constructor.
    """
    placement = _everywhere(config, layer, NEURON_GROUPS)
    router: Callable[..., NeuronGroups | MagnitudeGroups | ZeroNeurons] = GROUPS[groups.kind]
    chooses = router(config.hidden_size, config.neurons, placement, groups.options)
    neurons = _neurons(config, layer)
    if isinstance(chooses, ActivationGroupRouter):
        return MagnitudeMLP(config.hidden_size, neurons, activation, chooses, dropout)
    return GroupedMLP(config.hidden_size, neurons, activation, chooses, dropout)


def build_norm(config: SkipstoneConfig) -> nn.Module:
    """Build the norm after the last block, as `config.norm` says."""
    return _norm(config, config.hidden_size)


def build_embedding(config: SkipstoneConfig) -> nn.Embedding:
    """Build the token embedding, [vocab_size, hidden_size], with the factor `config.embedding_scale` on its output."""
    sizes = (config.vocab_size, config.hidden_size, config.pad_token_id)
    return nn.Embedding(*sizes) if config.embedding_scale == 1 else ScaledEmbedding(*sizes, config.embedding_scale)


def build_positions(config: SkipstoneConfig) -> nn.Module:
    """Build the module of position embeddings: rotary angles or a learned embedding, as `config.positions` says."""
    if config.positions == "rope":
        return Rotary(config)
    return nn.Embedding(config.max_position_embeddings, config.hidden_size)


def build_window_positions(config: SkipstoneConfig) -> Rotary | None:
    """Build the rotary angles of the blocks with sliding-window attention, as `config.window_rope_parameters` says.

    None if these blocks use the same angles as all others.
    """
    rope = config.window_rope_parameters
    return None if rope is None or config.positions != "rope" else Rotary(config, rope)


def initialise(module: nn.Module, config: SkipstoneConfig) -> None:
    """Initialise one module of a model where our rule differs from transformers' `_init_weights`, which ran before.

    Linear layers follow `config.linear_init`, projections into the residual stream `config.scaled_output_init`. Routing
    modules and all other modules of ours initialise themselves by `reset_parameters`.
    """
    if isinstance(module, nn.Linear) and config.linear_init == "torch":
        _start_as_torch(module)
    if isinstance(module, ExpertsMLP):
        _start_experts(module, config)
    elif isinstance(module, OutputLinear) and config.scaled_output_init:
        init.normal_(module.weight, 0.0, config.initializer_range / (2 * config.num_hidden_layers) ** 0.5)
    elif isinstance(module, RoutingModule) or _is_ours(module):
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()


def _is_ours(module: nn.Module) -> bool:
    """Return whether a module initialises itself by `reset_parameters`; transformers initialises all others."""
    return type(module).__module__.startswith("skipstone.") and not isinstance(module, nn.Linear | nn.Embedding)


def _start_as_torch(module: nn.Linear) -> None:
    """Initialise a linear layer as nn.Linear does: weights and bias U(-1/sqrt(inputs), 1/sqrt(inputs))."""
    bound = module.in_features**-0.5
    for parameter in (module.weight, module.bias):
        if parameter is not None:
            init.uniform_(parameter, -bound, bound)


def _start_experts(module: ExpertsMLP, config: SkipstoneConfig) -> None:
    """Initialise all experts of an MLP like the linear layers of a dense one, as the configuration says."""
    for weight in (module.gate_proj, module.up_proj, module.down_proj):
        if weight is module.down_proj and config.scaled_output_init:
            init.normal_(weight, 0.0, config.initializer_range / (2 * config.num_hidden_layers) ** 0.5)
        elif config.linear_init == "torch":
            init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)
        else:
            init.normal_(weight, 0.0, config.initializer_range)
