"""Construction of the model that will compute less, from the weights of a dense checkpoint and new mechanisms.

Also the check that the mechanisms change nothing before the first step.

Shape letters: B rows, T tokens, V vocabulary, N tokens of all rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import set_seed

from skipstone.core.routing_module import RoutingModule, causal_obstacle
from skipstone.core.strict import PlainDict, PlainMapping, mistakes
from skipstone.data.rows import Row
from skipstone.measure.passes import inputs_of, real_tokens
from skipstone.mechanisms import DEPTH
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig
from skipstone.model.parts import parse_groups
from skipstone.train.setup import plain

# With these, magnitude groups start as the dense model; of one neuron each, because larger groups are not sparse.
NEURON_DEFAULTS: PlainDict = {"decision": "magnitude", "group_size": 1, "capacity_warmup": 0.15}


def model_mistakes(config: PlainMapping) -> list[str]:
    """Return one message per mistake in the model of a recipe that can be found without the dense checkpoint.

    config: the whole recipe as a plain dict; its other sections may be wrong.
    """
    model = config.get("model")
    if not isinstance(model, Mapping):
        return []
    try:
        entries = mechanisms_of(model)
        # A block for each, because the source decides how many blocks `layers` may name.
        alone = [{**entry, "layers": [i]} for i, entry in enumerate(entries)]
        values: PlainDict = {"mechanisms": alone, "num_hidden_layers": max(len(alone), 1)}
        if "activation" in model:
            values["activation"] = model["activation"]
        SkipstoneConfig.from_plain(values)
        if (groups := model.get("neuron_groups")) is not None:
            parse_groups({**NEURON_DEFAULTS, **groups}, "model.neuron_groups")
    except ValueError as error:
        return mistakes(error)
    return []


def mechanisms_of(model: PlainMapping) -> list[PlainDict]:
    """Return the entries of `mechanisms` in a recipe's section `model`, copied to dicts; [] if there are none.

    Raises ValueError if they are not a list of mappings.
    """
    entries = model.get("mechanisms") or []
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ValueError(f"model.mechanisms must be a list of mappings, got {entries!r}")
    return [dict(entry) for entry in entries]


@dataclass(frozen=True, kw_only=True)
class NeutralStart:
    """The difference between the logits of the routed model before training and those of the dense checkpoint.

    difference: the largest absolute difference. largest: the checkpoint's largest absolute logit. tokens: number of
    tokens that were compared.
    """

    difference: float
    largest: float
    tokens: int

    @property
    def share(self) -> float:
        """The largest difference from the dense checkpoint's logits, divided by its largest absolute logit."""
        return self.difference / self.largest if self.largest else self.difference

    def require(self, tolerance: float) -> None:
        """Raise ValueError if the logits differ by more than `tolerance` times the dense checkpoint's largest one."""
        if not self.share <= tolerance:
            raise ValueError(
                f"the start is not neutral: logits differ by up to {self.difference:.3g}, {self.share:.2g} of the "
                f"largest one (adapt.tolerance {tolerance:g}); mixture_of_depths needs weight tanh or none and a "
                "capacity_warmup above 0, as neuron_groups do, polyglu a source whose activation is silu"
            )

    def __str__(self) -> str:
        return (
            f"neutral start: max |logit difference| {self.difference:.2e} over {self.tokens:,} tokens "
            f"(largest logit {self.largest:.1f})"
        )


def with_defaults(mechanisms: Sequence[PlainMapping]) -> list[PlainDict]:
    """Return copies of entries of `mechanisms` in which missing options have their defaults for adaptation.

    The defaults are the class attribute `adapt_defaults` of the mechanism that an entry names.
    """
    defaults = {name: mechanism.adapt_defaults for name, mechanism in DEPTH.items()}
    return [{**defaults.get(entry.get("name", ""), {}), **entry} for entry in mechanisms]


def drop_blocks(model: SkipstoneForCausalLM, layers: Sequence[int]) -> SkipstoneForCausalLM:
    """Build a copy of a dense model without the blocks whose indices are in `layers`.

    The other blocks keep their weights. The result is in evaluation mode with frozen weights. Raises ValueError if no
    block is left.
    """
    kept = [i for i in range(len(model.model.layers)) if i not in layers]
    if not kept:
        raise ValueError("model.drop_layers drops every block; keep at least one")
    tensors = {}
    for name, value in model.state_dict().items():
        found = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        if found is None:
            tensors[name] = value
        elif int(found[1]) in kept:
            tensors[f"model.layers.{kept.index(int(found[1]))}.{found[2]}"] = value
    left = {"num_hidden_layers": len(kept), **_patterns(model.config, kept)}
    config = SkipstoneConfig.from_plain({**plain(model.config), **left})
    smaller = SkipstoneForCausalLM(config).to(model.dtype)
    smaller.load_state_dict(tensors)
    return smaller.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _patterns(config: SkipstoneConfig, kept: Sequence[int]) -> PlainDict:
    """Return the options that number layers (attention windows, rotary positions), with the kept layers' new numbers.

    config: the configuration of the whole model. kept: indices of the layers that are kept, ascending.
    """
    windowed, rotary = config.windowed_layers(), config.rotary_layers()
    patterns: PlainDict = {}
    if config.window_layers is not None:
        left = [i for i, layer in enumerate(kept) if layer in windowed]
        none = {"attention_window": None, "window_layers": None, "window_rope_parameters": None}
        patterns |= {"window_layers": left} if left else none
    if config.rope_layers is not None:
        patterns["rope_layers"] = [i for i, layer in enumerate(kept) if layer in rotary]
    return patterns


def route(source: SkipstoneForCausalLM, config: SkipstoneConfig, seed: int) -> SkipstoneForCausalLM:
    """Build a model with the source's weights and new mechanisms that initially leave its outputs unchanged.

    source: the dense model. config: the source's configuration with mechanisms added. seed: seed of the mechanisms'
    initial weights. Gates start open, PolyGLU prefers SiLU, and Mixture-of-Depths and the routers of neuron groups
    (sets of MLP neurons) start at capacity 1, which keeps everything, because their schedules start there.
    """
    set_seed(seed)
    model = SkipstoneForCausalLM(config)
    missing, unexpected = model.load_state_dict(source.state_dict(), strict=False)
    own = {name for mechanism in model.routing_modules() for name in _names(model, mechanism)}
    assert not unexpected, unexpected
    assert set(missing) <= own, sorted(set(missing) - own)
    for mechanism in model.routing_modules():
        mechanism.start_as_dense()
    model.generation_config = source.generation_config
    return model


def _names(model: SkipstoneForCausalLM, mechanism: RoutingModule) -> list[str]:
    prefix = next(name for name, module in model.named_modules() if module is mechanism)
    return [f"{prefix}.{name}" for name in mechanism.state_dict()]


@torch.no_grad()
def neutral_start(model: SkipstoneForCausalLM, source: SkipstoneForCausalLM, rows: Sequence[Row]) -> NeutralStart:
    """Compare the logits of the routed model with the source's on the same rows, without exploration noise.

    model: the routed model. source: the dense one. rows: batches to compare on, each with its tensors by name. The
    model decides as in training and, if it can, in a second pass without later tokens; the larger difference counts.
    Returns it with the source's largest logit, for `NeutralStart.require` to judge. Raises ValueError if the source's
    logits are not finite.
    """
    routings = ["oracle"] if causal_obstacle(model.routing_modules()) else ["oracle", "causal"]
    was_training = model.training
    model.eval()
    difference = largest = 0.0
    tokens = 0
    for row in rows:
        inputs, real_BT = inputs_of(row), real_tokens(row)
        expected_NV = source(**inputs, use_cache=False).logits[real_BT]
        if not bool(expected_NV.isfinite().all()):
            raise ValueError("the source's logits are not finite (NaN or infinite): its weights are damaged")
        largest = max(largest, float(expected_NV.abs().max()))
        tokens += len(expected_NV)
        for routing in routings:
            got_NV = model(**inputs, routing=routing, noise=False, use_cache=False).logits[real_BT]
            own = float((got_NV - expected_NV).abs().max())
            difference = own if math.isnan(own) else max(difference, own)  # max() would drop NaN
            if math.isnan(difference):
                break
    model.train(was_training)
    return NeutralStart(difference=difference, largest=largest, tokens=tokens)
