"""Tiny models whose decisions are not trivial: about half of the tokens are kept, and rows differ.

A mechanism that is added to the tables is tested by every law without a change here, because laws and `enliven` use
only what it declares (`core/routing_module.py`, `core/depth.py`).
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from laws.enliven import LENGTH as LENGTH
from laws.enliven import ROWS as ROWS
from laws.enliven import VOCAB as VOCAB
from laws.enliven import enliven as enliven
from laws.enliven import ids as ids
from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.mechanisms import ACTIVATION, DEPTH
from skipstone.mechanisms.decisions import DECISIONS
from skipstone.mechanisms.mixture_of_depths import WEIGHTS

LAYERS = 3
TOLERANCE = 2e-5  # fp32 logits of order 1
ROUTED = [1, 2]
OPTIONS: dict[str, dict[str, Any]] = {
    # oracle and causal pass differ, and the weight has a gradient: more can go wrong than with the defaults
    "mixture_of_depths": {"capacity": 0.5, "decision": "predictor", "weight": "raw"},
    "segment": {"capacity": 0.5, "decision": "predictor", "weight": "raw"},
    "dynamic_chunking": {"share": 0.5, "ratio_weight": 1.0},
    "layer_dropout": {"rate": 0.6, "over_depth": "constant"},
}
ACTIVATIONS = ["silu", *ACTIVATION]
FORMS: dict[str, dict[str, Any]] = {  # of activations, with options that change what is computed
    "polyglu-exponential": {"name": "polyglu", "context": "exponential_mean", "decay": 0.7},
    "polyglu-token": {"name": "polyglu", "context": "token"},
    "polyglu-chunk": {"name": "polyglu", "context": "chunk", "chunk_size": 3},
    "polyglu-price": {"name": "polyglu", "price": 0.5},
    "fixed_mix": {"name": "fixed_mix", "groups": {"gelu": 11, "relu": 9, "silu": 20, "tanh": 8}},
}


@dataclass(frozen=True)
class Case:
    """A composition of mechanisms on which laws are tested.

    mechanisms: entries as in the configuration, but as tuples of (key, value), because cases are hashed. activation:
    that of the MLPs. more: further options of the configuration.
    """

    name: str
    mechanisms: tuple[tuple[tuple[str, Any], ...], ...] = ()
    activation: str = "silu"
    more: tuple[tuple[str, Any], ...] = field(default=())

    def __str__(self) -> str:
        return self.name

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [dict(m) for m in self.mechanisms]

    @property
    def oracle_only(self) -> bool:
        return any(e.get("decision") == "topk" for e in self.entries)


class Frozen(dict[str, Any]):
    """A mapping that can be hashed, as the value of an option in a case."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))


def entry(name: str, **options: Any) -> tuple[tuple[str, Any], ...]:
    values = {"name": name, "layers": tuple(ROUTED), **OPTIONS.get(name, {}), **options}
    return tuple(sorted(values.items()))


def case(*entries: tuple[tuple[str, Any], ...], activation: str = "silu", **more: Any) -> Case:
    def short(e: tuple[tuple[str, Any], ...]) -> str:
        values = dict(e)
        shown = [
            str(v)
            for k, v in values.items()
            if k not in ("name", "layers") and OPTIONS.get(values["name"], {}).get(k) != v
        ]
        return "-".join([values["name"], *shown])

    name = "+".join(short(e) for e in entries) or "dense"
    extra = "".join(f"-{k}={v}" for k, v in more.items())
    return Case(f"{name}/{activation}{extra}", entries, activation, tuple(more.items()))


# One for each way to treat tokens: fewer of them, a gain and a wish, a state that crosses blocks.
KINDS = ("mixture_of_depths", "token_selective", "early_exit")


def orders() -> Iterator[tuple[str, ...]]:
    """Yield every order of up to three depth mechanisms of different kinds, outermost first."""
    for count in range(4):
        yield from itertools.permutations(KINDS, count)


def others() -> Iterator[Case]:
    """Yield cases of every other depth mechanism: alone, and outside and inside of Mixture-of-Depths."""
    for name in [name for name in DEPTH if name not in KINDS]:
        yield case(entry(name))
        yield case(entry("mixture_of_depths"), entry(name), activation="polyglu")
        yield case(entry(name), entry("mixture_of_depths"), activation="polyglu")


ORDERS = [*(case(*map(entry, names), activation=a) for a in ACTIVATIONS for names in orders()), *others()]
SITES = [
    case(entry(name, on=on), activation=activation)
    for activation in ACTIVATIONS
    for name in DEPTH
    for on in ("attention", "mlp")
    if (name in KINDS or activation == "silu") and on in DEPTH[name].sites
]
EXPERTS = [  # a mixture of experts alone, staged (inside Mixture-of-Depths), integrated (no-ops), inside all three
    case(mlp="experts", experts=Frozen(count=4)),
    case(entry("mixture_of_depths"), mlp="experts", experts=Frozen(count=4, top_k=1, renormalise=False)),
    case(mlp="experts", experts=Frozen(count=4, no_op=2, balance_rate=0.1, z_weight=0.1)),
    case(*map(entry, KINDS), mlp="experts", experts=Frozen(count=3, no_op=2, top_k=3)),
]
GROUPS = [  # of neurons: alone, as in the middle of a warm-up, drawn, and inside mechanisms that leave tokens out
    case(neuron_groups=Frozen(group_size=8, capacity=0.5, chunk_size=4)),
    case(
        activation="polyglu",
        neuron_groups=Frozen(group_size=4, capacity=0.4, capacity_warmup=0.5, chunk_size=3, balance_rate=0.1),
    ),
    case(entry("mixture_of_depths"), neuron_groups=Frozen(group_size=8, capacity=0.4, chunk_size=2, decay=0.5)),
    case(entry("early_exit"), neuron_groups=Frozen(group_size=16, capacity=0.7, chunk_size=4, decision="random")),
    case(*map(entry, KINDS), activation="polyglu", neuron_groups=Frozen(group_size=8, capacity=0.5, chunk_size=2)),
    case(neuron_groups=Frozen(decision="magnitude", group_size=1, capacity=0.5)),
    case(
        *map(entry, KINDS),
        activation="polyglu",
        neuron_groups=Frozen(decision="magnitude", group_size=4, capacity=0.4, capacity_warmup=0.5, down_capacity=0.25),
    ),
    case(
        entry("mixture_of_depths", decision="ema_threshold", kv="full"),
        neuron_groups=Frozen(decision="magnitude", group_size=1, capacity=0.7, down_capacity=0.5),
    ),
    case(activation="relu", neuron_groups=Frozen(decision="zeros")),
    case(*map(entry, KINDS), activation="relu", neuron_groups=Frozen(decision="zeros", price=0.1)),
]
WINDOWS = [  # of slots, with every mechanism: shorter than a row, so that tokens that were skipped count
    case(attention_window=4),
    *(case(entry(name), attention_window=3) for name in DEPTH),
    case(entry("mixture_of_depths", kv="full"), entry("early_exit", on="mlp"), attention_window=2),
    case(entry("token_selective", on="attention"), activation="polyglu", attention_window=5),
]
DECODERS = [  # parts of Gemma, of OLMo, SmolLM and Granite, of GPT-NeoX, StableLM, Cohere, Nemotron
    case(
        *map(entry, KINDS[:2]),
        attention_window=4,
        window_layers="::2",
        window_rope_parameters=Frozen(rope_theta=50.0),
        norm="rmsnorm_offset",
        norm_placement="around",
        qk_norm=True,
        attention_scale=0.3,
        attention_soft_cap=5.0,
        logit_soft_cap=4.0,
        embedding_scale=3.0,
    ),
    case(
        entry("mixture_of_depths"),
        norm_placement="after",
        qk_norm=True,
        qk_norm_over="all_heads",
        rope_layers=(0, 2),
        residual_scale=0.5,
        logit_scale=0.3,
    ),
    case(
        entry("early_exit"),
        entry("mixture_of_depths", on="mlp"),
        parallel_residual=True,
        rope_parameters=Frozen(rope_type="default", rope_theta=100.0, partial_rotary_factor=0.5),
        norm="layernorm",
        mlp="plain",
        mlp_bias=True,
    ),
    case(entry("token_selective"), parallel_residual=True, norm_placement="shared", norm="layernorm_without_bias"),
    case(entry("mixture_of_depths"), norm="layernorm_without_bias", qk_norm=True, qk_norm_over="each_head"),
    case(entry("mixture_of_depths"), norm="layernorm_offset", activation="relu2", mlp="plain", qk_norm=True),
]
NESTED = [
    case(entry("mixture_of_depths"), entry("mixture_of_depths", on="mlp"), activation="polyglu"),
    case(*[entry(n, on=on) for n in DEPTH for on in DEPTH[n].sites if on != "segment"], activation="polyglu"),
    case(entry("early_exit"), entry("token_selective", on="attention"), entry("mixture_of_depths", on="mlp")),
    case(entry("mixture_of_depths"), entry("early_exit", on="attention"), entry("early_exit", on="mlp")),
    case(entry("token_selective", hard_gain="one"), entry("early_exit"), activation="polyglu"),
    case(entry("token_selective", execution="soft"), entry("early_exit", execution="soft")),
    case(entry("mixture_of_depths", layers=(1,)), entry("token_selective"), positions="learned", norm="layernorm"),
    case(entry("mixture_of_depths", layers=(0, 2)), entry("early_exit", layers=(0, 1, 2)), mlp="plain", qk_norm=True),
    *(case(*map(entry, names), activation=form) for form in FORMS for names in ((), KINDS[:1], KINDS)),
    case(entry("layer_dropout", over_depth="rising"), entry("mixture_of_depths", decision="ema_threshold")),
    case(entry("layer_dropout", over_training="constant", scaled=False), entry("layer_dropout", on="mlp")),
    *EXPERTS,
    *GROUPS,
    *WINDOWS,
    *DECODERS,
]
BOUNDARIES: dict[str, Frozen] = {  # of the tiny vocabulary: about half, and a quarter of the tokens are kept
    "every": Frozen(ids=("0-29", 47), at="every"),
    "first": Frozen(ids=("0-29", 47), at="first"),
    "after": Frozen(ids=("0-9", "20-29", "40-49"), at="after"),
}
DECISION_OPTIONS: dict[str, dict[str, Any]] = {"boundary": {"boundary": BOUNDARIES["every"]}}
SEGMENTS = [  # of blocks inside one decision, with mechanisms inside, and blocks whose rotary angles differ
    case(entry("segment", kv="full", decision="ema_threshold", weight="none"), entry("early_exit", layers=(0, 1, 2))),
    case(entry("segment", layers=(0, 1, 2), skip="low_rank", weight="tanh"), *map(entry, KINDS), activation="polyglu"),
    case(
        entry("segment", decision="boundary", boundary=BOUNDARIES["every"], weight="none"),
        entry("token_selective", on="mlp"),
        attention_window=3,
        window_layers="::2",
        window_rope_parameters=Frozen(rope_theta=50.0),
        rope_layers=(1, 2),
    ),
    case(entry("dynamic_chunking", layers=(0, 1, 2)), *map(entry, KINDS), activation="polyglu", positions="learned"),
    case(entry("segment", kv="full", decision="topk"), mlp="experts", experts=Frozen(count=3, no_op=2)),
]
EVERY_DECISION = [  # with every weight
    case(entry("mixture_of_depths", decision=decision, weight=weight, **DECISION_OPTIONS.get(decision, {})))
    for decision in DECISIONS
    for weight in WEIGHTS
    if decision != "forced"
]
GATES: list[dict[str, Any]] = [  # Token-Selective Attention trained as it is executed, and its controls
    {"training": "hard", "capacity": (0.4, 0.7), "kv": "kept"},
    {"training": "hard", "capacity": 0.5, "guidance": True, "hard_gain": "one", "router_norm": True},
    {"training": "hard", "capacity": 0.5, "guidance": True, "capacity_warmup": 0.5, "kv": "kept"},
    {"training": "straight_through", "capacity": 0.5, "hard_gain": "one"},
    {"training": "straight_through", "guidance": True, "capacity": 0.5, "on": "mlp"},
    {"training": "hard", "capacity": 0.5, "decision": "random"},
    {"training": "hard", "capacity": 0.5, "decision": "positional", "gate": "constant", "kv": "kept"},
    {"capacity": 0.5},
    {"learn": False, "start_bias": 0.0},
]
VARIANTS = [  # of Mixture-of-Depths, after later papers, and of gates that have options of their own
    case(entry("mixture_of_depths", kv="full")),
    case(entry("mixture_of_depths", kv="full", decision="topk", skip="low_rank"), activation="polyglu"),
    case(entry("mixture_of_depths", skip="low_rank", skip_rank=3, on="mlp", z_loss=0.1)),
    case(entry("mixture_of_depths", capacity=Frozen(start=0.7, end=0.3), weight="tanh", router_norm=True)),
    case(entry("mixture_of_depths", capacity=(0.3, 0.8), router="mlp", decision="threshold", exploration=0.5)),
    case(entry("mixture_of_depths", decision="threshold_p", weight="sigmoid", router="mlp", exploration=0.5)),
    case(entry("mixture_of_depths", decision="ema_threshold", capacity_warmup=0.5, exploration=0.5, kv="full")),
    case(
        entry("mixture_of_depths", capacity_warmup=0.5, warmup_shape="cosine", exploration=0.5, weight="none", z_loss=1)
    ),
    case(entry("mixture_of_depths", kv="full", skip="low_rank"), entry("mixture_of_depths", on="mlp", skip="low_rank")),
    case(entry("token_selective"), entry("mixture_of_depths", skip="low_rank"), entry("early_exit")),
    case(entry("mixture_of_depths", kv="full"), entry("token_selective"), entry("early_exit", on="mlp")),
    case(entry("mixture_of_depths", decision="ema_threshold", guidance=True, weight="none", router_norm=True)),
    case(entry("mixture_of_depths", guidance=True, router="mlp", kv="full"), entry("early_exit")),
    case(entry("mixture_of_depths", benefit=True, decision="ema_threshold", router_norm=True), entry("early_exit")),
    case(entry("token_selective"), entry("mixture_of_depths", decision="ema_threshold", weight="none")),
    case(
        entry("mixture_of_depths", decision="boundary", boundary=BOUNDARIES["first"], kv="full", capacity_warmup=0.5),
        entry("mixture_of_depths", on="mlp", decision="boundary", boundary=BOUNDARIES["after"]),
    ),
    case(entry("mixture_of_depths", on="attention"), entry("mixture_of_depths", on="mlp")),  # SkipGPT
    case(entry("gate_skip", on="attention"), entry("gate_skip", on="mlp", gate="token"), activation="polyglu"),
    *(case(entry("token_selective", **options)) for options in GATES),
    case(entry("token_selective", training="straight_through", capacity=0.5), entry("mixture_of_depths")),
    case(entry("mixture_of_depths"), entry("token_selective", **GATES[0]), entry("early_exit"), activation="polyglu"),
    case(entry("token_selective", **GATES[0]), entry("token_selective", on="mlp", **GATES[1])),
]
DECIDED = [c for c in EVERY_DECISION if c.entries[0]["weight"] == "raw" or c.entries[0]["decision"] == "predictor"]
VARIANTS += SEGMENTS
ALL = ORDERS + SITES + NESTED + DECIDED + VARIANTS
CAUSAL = [c for c in ALL if not c.oracle_only]


def config(chosen: Case, **more: Any) -> SkipstoneConfig:
    named = {name: {"name": name} for name in ACTIVATION}
    activation: Any = {**named, **FORMS}.get(chosen.activation, chosen.activation)
    mechanisms = [{k: _as_in_json(v) for k, v in e.items()} for e in chosen.entries]
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
    return SkipstoneConfig(**{**sizes, "activation": activation, "mechanisms": mechanisms, **dict(chosen.more), **more})


def _as_in_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_in_json(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def fresh(chosen: Case, **more: Any) -> SkipstoneForCausalLM:
    """Return a case's model as it is initialised, in evaluation mode. more: further options of the configuration."""
    torch.manual_seed(11)
    return SkipstoneForCausalLM(config(chosen, **more)).eval()


class _Packed(pickle.Pickler):
    """A model as bytes, beside its tensors: copies are made of it in less than half of the time of `copy.deepcopy`."""

    def __init__(self, model: SkipstoneForCausalLM) -> None:
        self.tensors: list[Tensor] = []
        self.numbers: dict[int, int] = {}
        self.file = io.BytesIO()
        super().__init__(self.file, pickle.HIGHEST_PROTOCOL)
        self.dump(model)

    def persistent_id(self, given: object) -> int | None:
        if isinstance(given, Tensor) and id(given) not in self.numbers:
            self.numbers[id(given)] = len(self.tensors)
            self.tensors.append(given)
        return self.numbers.get(id(given)) if isinstance(given, Tensor) else None


class _Unpacked(pickle.Unpickler):
    def __init__(self, packed: _Packed) -> None:
        super().__init__(io.BytesIO(packed.file.getvalue()))
        self.tensors = copy.deepcopy(packed.tensors)

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]


@cache
def _lively(chosen: Case) -> _Packed:
    model = fresh(chosen)
    enliven(model)
    return _Packed(model)


def lively(chosen: Case) -> SkipstoneForCausalLM:
    """Return a copy of the case's model with weights and thresholds with which decisions vary (`enliven`)."""
    return _Unpacked(_lively(chosen)).load()  # type: ignore[no-any-return]


def depth_records(out: Any) -> Iterator[tuple[int, str, Any]]:
    for layer, records in enumerate(out.records):
        for name, record in records.items():
            if hasattr(record, "kept_BT"):
                yield layer, name, record


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradient of every parameter by name, zeros where there is none."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_close(a: Tensor, b: Tensor, what: str = "", tolerance: float = TOLERANCE) -> None:
    assert a.shape == b.shape, f"{what}: {tuple(a.shape)} is not {tuple(b.shape)}"
    assert a.isfinite().equal(b.isfinite()), f"{what}: not finite at different places"
    worst = (a - b).nan_to_num(0, 0, 0).abs().max().item() if a.numel() else 0.0
    assert worst <= tolerance, f"{what}: differs by {worst:.2e}"


def assert_same_records(one: Any, other: Any, tolerance: float = TOLERANCE) -> None:
    """Assert that two passes' records have exactly equal decisions, and numbers that are equal up to `tolerance`."""
    for layer, (mine, yours) in enumerate(zip(one, other, strict=True)):
        assert mine.keys() == yours.keys(), f"block {layer}: {sorted(mine)} is not {sorted(yours)}"
        for name, record in mine.items():
            for field_name, a in record._asdict().items():
                b = getattr(yours[name], field_name)
                if field_name in ("loss_BT", "carry") and not (
                    record.reached_BT.any() and yours[name].reached_BT.any()
                ):
                    continue  # nobody asked: whether there is a loss of 0 or none is all the same
                where = f"block {layer} {name} {field_name}"
                if isinstance(a, Tensor) and a.dtype == torch.bool:
                    assert torch.equal(a, b), where
                elif isinstance(a, Tensor):
                    assert_close(a, b, where, tolerance * max(1.0, a.nan_to_num().abs().max().item()))
                elif isinstance(a, dict):
                    for key, value in a.items():
                        assert_close(value, b[key], f"{where} {key}", tolerance)
