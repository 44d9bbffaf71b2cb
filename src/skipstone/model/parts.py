"""Parsed entries: the options of a model's parts (mechanisms, activation, neuron groups, experts) as immutable objects.

An entry is also the mapping that the user wrote, which config.json keeps; `options` has the same values with all
defaults, and is passed to constructors as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from skipstone.core.strict import choose, finite, from_dict, mistakes, refuse, unknown
from skipstone.mechanisms import ACTIVATION, DEPTH, GROUPS
from skipstone.mechanisms.grouping import NeuronChoiceConfig
from skipstone.mechanisms.polyglu import PolyGLUConfig
from skipstone.model.fields import Written as Written
from skipstone.model.layers import parse_layers
from skipstone.nn.block import SEGMENT
from skipstone.nn.experts import ROW_OF_16_BYTES as ROW_OF_16_BYTES
from skipstone.nn.experts import ExpertsConfig
from skipstone.nn.mlp import FIXED_MIX, FUNCTIONS, FixedMix, FixedMixConfig
from skipstone.nn.mlp import MLPS as MLPS
from skipstone.nn.norm import NORMS as NORMS
from skipstone.nn.positions import ROPES as ROPES


@dataclass(frozen=True, eq=False)
class Entry(Mapping[str, object]):
    """The options of one part of a model as the user wrote them, as an immutable mapping.

    It equals a dict with the same items. written: the mapping. Subclasses add `options`, the same values parsed, with
    all defaults.
    """

    written: Written

    def __getitem__(self, key: str) -> object:
        return self.written[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.written)

    def __len__(self) -> int:
        return len(self.written)

    def __repr__(self) -> str:
        return repr(self.plain())

    def plain(self) -> dict[str, object]:
        """Return the options as written, as an independent dict of plain values."""
        return copy.deepcopy(dict(self.written))


@dataclass(frozen=True, eq=False, repr=False)
class MechanismEntry(Entry):
    """A parsed entry of `SkipstoneConfig.mechanisms`: one mechanism with the blocks that it applies to and its options.

    kind: the mechanism's name, such as "mixture_of_depths". site: what it wraps: "block", "attention", "mlp" or
    "segment" (several neighbouring blocks, for which it decides once). layers: indices of its blocks, ascending, out of
    `num_layers`. options: an instance of the mechanism's `Config`.
    """

    kind: str
    site: str
    layers: tuple[int, ...]
    num_layers: int
    options: object

    @property
    def key(self) -> str:
        """The name of the mechanism in a block, under which its parameters are stored and its decisions returned.

        It is the mechanism's name (`kind`), followed by "_on_" and the site if this is not the mechanism's default
        site, as in "gate_skip_on_mlp".
        """
        return self.kind if self.site == DEPTH[self.kind].sites[0] else f"{self.kind}_on_{self.site}"

    @property
    def homes(self) -> tuple[int, ...]:
        """Indices of the blocks that hold a module of this entry: all of `layers`, or only the first of a segment."""
        return self.layers[:1] if self.site == SEGMENT else self.layers

    def changed(self, **changes: object) -> MechanismEntry:
        """Return a new entry with some options changed; the entry itself stays as it is.

        changes: new values by option; None restores a default. Raises ValueError for invalid options.
        """
        written = {key: value for key, value in {**self.written, **changes}.items() if value is not None}
        return _parse_mechanism(written, self.num_layers, self.kind)


WITH_ZEROS = ("relu", "relu2")  # functions that are exactly 0 for a range of inputs


@dataclass(frozen=True, eq=False, repr=False)
class ActivationEntry(Entry):
    """The parsed options of an MLP's activation.

    kind: the name of a function, "fixed_mix" or "polyglu". options: the parsed options of "fixed_mix" or "polyglu";
    None for a function.
    """

    kind: str
    options: FixedMixConfig | PolyGLUConfig | None

    @property
    def has_zeros(self) -> bool:
        """Whether some neurons can be exactly 0 for a range of inputs, as with ReLU and its square."""
        if isinstance(self.options, FixedMixConfig):
            return not self.options.functions.isdisjoint(WITH_ZEROS)
        return self.kind in WITH_ZEROS


@dataclass(frozen=True, eq=False, repr=False)
class GroupsEntry(Entry):
    """The parsed options of neuron groups, which switch parts of an MLP on and off.

    kind: the option `decision`: "learned", "random", "magnitude" or "zeros". options: the parsed options of this kind.
    """

    kind: str
    options: NeuronChoiceConfig


@dataclass(frozen=True, eq=False, repr=False)
class ExpertsEntry(Entry):
    """The parsed options of an MLP that is a mixture of experts. options: an `ExpertsConfig`."""

    options: ExpertsConfig


def parse_mechanisms(entries: Sequence[Written], num_layers: int) -> list[MechanismEntry]:
    """Parse the entries of `SkipstoneConfig.mechanisms` strictly for a model of `num_layers` blocks.

    Entries that are parsed already for as many blocks stay the same objects. Raises ValueError, with one line per
    mistake, for unknown names, options, sites or blocks, for overlapping segments, and for a mechanism that appears
    twice in one place of a block.
    """
    parsed: list[MechanismEntry] = []
    lines: list[str] = []
    for i, written in enumerate(entries):
        entry = written
        try:
            if not isinstance(entry, MechanismEntry) or entry.num_layers != num_layers:
                entry = _parse_mechanism(written, num_layers, f"mechanisms[{i}]")
            shared = [other for other in parsed if set(entry.layers) & set(other.layers)]
            if any(entry.key == other.key for other in shared):
                raise ValueError(f"mechanisms[{i}]: {entry.kind} sits twice on the same {entry.site}")
            if entry.site == SEGMENT and any(o.site == SEGMENT and o.layers != entry.layers for o in shared):
                raise ValueError(
                    f"mechanisms[{i}].layers {_span(entry)} overlap another segment; one ends before the next"
                )
            parsed.append(entry)
        except ValueError as error:
            lines += mistakes(error)
    refuse(lines)
    return parsed


def _parse_mechanism(written: Written, num_layers: int, where: str) -> MechanismEntry:
    values = copy.deepcopy(_with_words(written))
    options = dict(values)
    kind = options.pop("name", None)
    mechanism = choose(f"{where}.name", kind, DEPTH)
    site = options.pop("on", mechanism.sites[0])
    asked = options.pop("layers", mechanism.default_layers)
    lines = [] if site in mechanism.sites else [unknown(f"{where}.on", site, mechanism.sites)]
    layers: list[int] = []
    config: object = None
    try:
        layers = parse_layers(asked, num_layers, f"{where}.layers")
    except ValueError as error:
        lines += mistakes(error)
    if site == SEGMENT and layers and layers != list(range(layers[0], layers[-1] + 1)):
        lines.append(f"{where}.layers must be neighbouring blocks for a segment, got {asked!r}")
    try:
        config = finite(from_dict(mechanism.Config, options, where), where)
    except ValueError as error:
        lines += mistakes(error)
    refuse(lines)
    return MechanismEntry(values, str(kind), str(site), tuple(layers), num_layers, config)


def _span(entry: MechanismEntry) -> str:
    return f"{entry.layers[0]} to {entry.layers[-1]}"


def _with_words(written: Mapping[object, object] | Written) -> dict[str, object]:
    """Return an entry with the key `on`, which YAML reads as the boolean true."""
    return {"on" if key is True else str(key): value for key, value in written.items()}


def parse_activation(activation: str | Written) -> ActivationEntry:
    """Parse the option `activation` of a model: the name of a function, or a mapping with the key `name` and options.

    Raises ValueError for unknown names and keys and for invalid values.
    """
    if isinstance(activation, ActivationEntry):
        return activation
    written = {"name": activation} if isinstance(activation, str) else copy.deepcopy(dict(activation))
    options = dict(written)
    kind = options.pop("name", None)
    choose("activation", kind, {**FUNCTIONS, **ACTIVATION, FIXED_MIX: FixedMix})
    if kind in FUNCTIONS:
        if options:
            raise ValueError(unknown(f"key in activation {kind!r}", next(iter(options)), ["name"]))
        return ActivationEntry(written, str(kind), None)
    if kind == FIXED_MIX:
        return ActivationEntry(
            written, FIXED_MIX, finite(from_dict(FixedMixConfig, options, "activation"), "activation")
        )
    config = finite(from_dict(ACTIVATION[str(kind)].Config, options, "activation"), "activation")
    return ActivationEntry(written, str(kind), config)


def parse_groups(written: Written, where: str = "neuron_groups") -> GroupsEntry:
    """Parse the options by which groups of MLP neurons are left out; their `decision` tells which options there are.

    written: the options as a mapping, as in `SkipstoneConfig.neuron_groups`; a `GroupsEntry` is returned unchanged.
    where: their name in error messages. Raises ValueError for unknown keys, for invalid values, and for an option that
    only other decisions read.
    """
    if isinstance(written, GroupsEntry):
        return written
    decision = written.get("decision", "learned")
    config = choose(f"{where}.decision", decision, GROUPS).Config
    for key in written:
        readers = [name for name, router in GROUPS.items() if key in {field.name for field in fields(router.Config)}]
        if readers and decision not in readers:
            raise ValueError(f"{where}.{key} is read with decision {' or '.join(readers)} alone, got {decision!r}")
    values = copy.deepcopy(dict(written))
    return GroupsEntry(values, str(decision), finite(from_dict(config, values, where), where))


def parse_experts(written: Written) -> ExpertsEntry:
    """Parse the options of an MLP of experts.

    written: the options as a mapping, as in `SkipstoneConfig.experts` (see `ExpertsConfig`); an `ExpertsEntry` is
    returned unchanged. Raises ValueError for unknown keys and invalid values.
    """
    if isinstance(written, ExpertsEntry):
        return written
    values = copy.deepcopy(dict(written))
    return ExpertsEntry(values, finite(from_dict(ExpertsConfig, values, "experts"), "experts"))
