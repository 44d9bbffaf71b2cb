"""Removal of neuron groups (neurons that a router switches together) that a calibration set never uses.

On that set the pruned model computes the same as before, because the remaining groups keep their order. On other text,
the next best group takes the place of a removed one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from skipstone.adapt import export_calibrated
from skipstone.core.records import NeuronGroupsRecord, expect
from skipstone.measure.passes import Pass
from skipstone.mechanisms.neuron_groups import NAME, NeuronGroups
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.loading import from_tensors, quiet
from skipstone.ops.neurons import kept_part


def export_pruned(
    folder: str | Path, out: Path, dtype: str | None = None, corpus: str | None = None
) -> SkipstoneForCausalLM:
    """Remove neuron groups that training rows never use from a run or saved model, write it to `out`, and return it.

    A neuron group is a set of adjacent MLP neurons that are switched together. folder: the folder of the run or saved
    model. dtype: dtype of the written weights; None keeps the dtype as loaded. corpus: name of the corpus to measure
    on, such as "enwik8"; None means the run's own (a saved model has none). Raises ValueError for a model without
    neuron groups that a router chooses, and without a corpus, and FileExistsError if `out` is not empty.
    """
    return export_calibrated.export(
        folder,
        out,
        dtype,
        corpus,
        require=require_groups,
        change=lambda model, forward, rows: prune(model, used_groups(model, forward, rows)),
    )


@torch.no_grad()
def prune(model: SkipstoneForCausalLM, used: Sequence[Tensor]) -> SkipstoneForCausalLM:
    """Build a model with only the neuron groups that are used.

    model: stays as it is. used: for each layer a bool mask [G] over its G groups, True for groups that are used. If a
    layer has fewer used groups than each token keeps, its first unused groups are kept as well. Raises ValueError for a
    model without neuron groups, and for one in which no router chooses them.
    """
    require_groups(model)
    tensors, left = dict(model.state_dict()), []
    for layer, router in enumerate(model.modules_of(NeuronGroups)):
        used_first_G = (~used[layer]).to(torch.int8).argsort(stable=True)
        count = max(int(used[layer].sum()), router.config.kept(router.neurons))
        group_K = used_first_G[:count].sort().values
        _cut(tensors, f"model.layers.{layer}.mlp.", group_K, router.total)
        left.append(count)
    config = copy.deepcopy(model.config)
    config.neuron_groups = {**(config.neuron_groups or {}), "left": left}
    with quiet():
        pruned = from_tensors(config, {n: x.clone() for n, x in tensors.items()}, model.dtype)
    pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned.train(model.training)


def used_groups(model: SkipstoneForCausalLM, forward: Pass, batches: Iterable[Mapping[str, Tensor]]) -> list[Tensor]:
    """Return which neuron groups at least one token keeps, bool [G] for the G groups of each layer.

    A neuron group is a set of adjacent MLP neurons that are switched together. model: the model to measure. forward:
    the kind of pass, which says whether decisions may look at later tokens and whether skipped tokens are computed.
    batches: the input tensors of each pass, by name.
    """
    routers = model.modules_of(NeuronGroups)
    used = [torch.zeros(router.total, dtype=torch.bool, device=model.device) for router in routers]
    for batch in batches:
        records = forward.run(model, batch, output_records=True).records
        assert records is not None
        for used_G, decided in zip(used, records, strict=True):
            record = expect(decided[NAME], NeuronGroupsRecord)
            used_G |= record.kept_BTG.any(0).any(0)
    return used


def require_groups(model: SkipstoneForCausalLM) -> None:
    """Raise ValueError for a model without neuron groups, adjacent MLP neurons that are switched together.

    A model in which no router chooses the groups is refused, too, because every group is then used for some token.
    """
    if model.config.neuron_groups is None:
        raise ValueError("only models with neuron_groups can be pruned; this one has none")
    if model.config.neuron_groups.get("decision", "learned") != "learned":
        raise ValueError(
            f"neuron_groups with decision {model.config.neuron_groups['decision']!r} use every group sooner or later; "
            "nothing can be pruned"
        )


def _cut(tensors: dict[str, Tensor], prefix: str, group_K: Tensor, total: int) -> None:
    for name, axis in (("gate_proj.weight", 0), ("up_proj.weight", 0), ("down_proj.weight", 1)):
        tensors[prefix + name] = kept_part(tensors[prefix + name], group_K, total, axis)
    if prefix + "activation.preference_bias" in tensors:  # of PolyGLU, one for each neuron
        name = prefix + "activation.preference_bias"
        tensors[name] = kept_part(tensors[name], group_K, total, 0)
    for name in ("router.score_weight", "router.score_bias", "router.balance_bias"):
        if prefix + name in tensors:
            tensors[prefix + name] = tensors[prefix + name].index_select(0, group_K)
