"""What mechanisms did in each layer, as sections of a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from skipstone.evaluate.tables import Section, number, percent
from skipstone.measure.summaries import ACTIVATION_NAMES

Layers = Sequence[Mapping[str, Mapping[str, Any]]]
MIX_FIGURES = {
    "shares": {
        "entropy / maximum": "entropy",
        "dynamic entropy (nats)": "dynamic_entropy",
        "static entropy (nats)": "static_entropy",
    },
    "neurons": {"differ from most": "diversity"},
}


def layer_sections(layers: Layers, pass_name: str) -> list[Section]:
    """One for depth mechanisms, for activation mechanisms, for experts and for neuron groups, where there are any."""
    entries = [(str(i), name, figures) for i, layer in enumerate(layers) for name, figures in layer.items()]
    depth = [entry for entry in entries if "capacity" in entry[2]]
    activation = [entry for entry in entries if "shares" in entry[2]]
    experts = [entry for entry in entries if "experts" in entry[2]]
    groups = [entry for entry in entries if "groups" in entry[2]]
    return [
        *_depth(depth, pass_name),
        *_activation(activation, pass_name),
        *_experts(experts, pass_name),
        *_groups(groups, pass_name),
    ]


def _depth(entries: Sequence[tuple[str, str, Mapping[str, Any]]], pass_name: str) -> Iterable[Section]:
    if entries:
        yield Section(
            title=f"depth mechanisms by layer, {pass_name}",
            columns=["layer, mechanism", "kept", "99 % of rows keep at most", "weight of a kept update", "F1"],
            rows=[
                [
                    f"{layer} {name}",
                    percent(f["capacity"]),
                    percent(f["capacity_p99"]),
                    number(f["weight"], 3),
                    number(f.get("f1"), 3),
                ]
                for layer, name, f in entries
            ],
            notes=["F1 of the kept tokens: by those that need depth where that is known, else by the best of the row"],
        )


def _activation(entries: Sequence[tuple[str, str, Mapping[str, Any]]], pass_name: str) -> Iterable[Section]:
    if entries:
        for kind, what in (("shares", "activations by layer"), ("neurons", "neurons by their strongest activation")):
            yield Section(
                title=f"{what}, {pass_name}",
                columns=["layer, mechanism", *ACTIVATION_NAMES, *MIX_FIGURES[kind]],
                rows=[
                    [
                        f"{layer} {name}",
                        *(percent(share) for share in f[kind].values()),
                        *(number(f[figure], 4) for figure in MIX_FIGURES[kind].values()),
                    ]
                    for layer, name, f in entries
                ],
            )


def _experts(entries: Sequence[tuple[str, str, Mapping[str, Any]]], pass_name: str) -> Iterable[Section]:
    if entries:
        yield Section(
            title=f"experts by layer, {pass_name}",
            columns=["layer, part", "least chosen expert", "most chosen expert", "no-ops", "entropy / maximum"],
            rows=[[f"{layer} {name}", *_choices(f), number(f["entropy"], 3)] for layer, name, f in entries],
            notes=["shares of all choices of the tokens that reached the experts"],
        )


def _groups(entries: Sequence[tuple[str, str, Mapping[str, Any]]], pass_name: str) -> Iterable[Section]:
    if entries:
        yield Section(
            title=f"neuron groups by layer, {pass_name}",
            columns=["layer, part", "groups", "on", "always on", "never on"],
            rows=[
                [f"{layer} {name}", str(len(f["groups"])), percent(f["on"]), str(f["always_on"]), str(f["never_on"])]
                for layer, name, f in entries
            ],
            notes=["on: share of the groups, mean over the tokens that reached the MLP"],
        )


def _choices(figures: Mapping[str, Any]) -> list[str]:
    shares = figures["experts"] or [None]
    return [percent(min(shares)), percent(max(shares)), percent(figures["no_op"])]
