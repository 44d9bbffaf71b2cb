"""Conversion of PolyGLU to a fixed activation for each neuron, without a router.

    k_f = argmax_k (preference_fk + mean over calibration tokens of the context's logit k)

Gate and up rows and down columns are then sorted by k, and the activation becomes a `fixed_mix`. The result differs by
the weaker parts of each mix and by the influence of the context; it is exact where the entropy of the mix is 0.

Shape letters: B rows, T tokens, F neurons, A activations.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from skipstone.adapt import export_calibrated
from skipstone.core.records import ActivationRecord, expect
from skipstone.measure.passes import Pass
from skipstone.mechanisms import PolyGLU
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.loading import from_tensors, quiet
from skipstone.nn.mlp import FIXED_MIX
from skipstone.ops import reference as ops

NAMES = tuple(function.__name__ for function in ops.ACTIVATIONS)
ALPHABETICAL = sorted(range(len(NAMES)), key=NAMES.__getitem__)  # the order in which a fixed mix groups its neurons


def export_hardened(
    folder: str | Path, out: Path, dtype: str | None = None, corpus: str | None = None
) -> SkipstoneForCausalLM:
    """Give each PolyGLU neuron of a run or saved model one fixed activation, write the model to `out`, and return it.

    The strongest activation of each neuron is measured on training rows. folder: the folder of the run or saved model.
    dtype: dtype of the written weights; None keeps the dtype as loaded. corpus: name of the corpus to measure on, such
    as "enwik8"; None means the run's own (a saved model has none). Raises ValueError for a model without PolyGLU or
    with neuron groups, and without a corpus, and FileExistsError if `out` is not empty.
    """
    return export_calibrated.export(
        folder,
        out,
        dtype,
        corpus,
        require=require_polyglu,
        change=lambda model, forward, rows: harden(model, mean_logits(model, forward, rows)),
    )


@torch.no_grad()
def harden(model: SkipstoneForCausalLM, dynamic: Sequence[Tensor] | None = None) -> SkipstoneForCausalLM:
    """Build a model in which each PolyGLU neuron has only its strongest activation, and no router is left.

    PolyGLU mixes several activation functions in each neuron. model: stays as it is; in the result, neurons are sorted
    by their activation. dynamic: for each layer, the mean logits that the router adds to those of the neurons, fp32 [A]
    for the A activations, as `mean_logits` measures them; with None, only the neurons' learned preferences count.
    Raises ValueError for a model without PolyGLU or with neuron groups.
    """
    require_polyglu(model)
    tensors, groups = {n: x for n, x in model.state_dict().items() if ".mlp.activation." not in n}, []
    for layer, activation in enumerate(model.modules_of(PolyGLU)):
        logits_FA = activation.preference_FA + (0 if dynamic is None else dynamic[layer])
        best_F = logits_FA[:, ALPHABETICAL].argmax(-1)
        groups.append({NAMES[k]: int((best_F == i).sum()) for i, k in enumerate(ALPHABETICAL)})
        _sort_neurons(tensors, f"model.layers.{layer}.mlp.", best_F.argsort(stable=True))
    config = copy.deepcopy(model.config)
    config.activation = {"name": FIXED_MIX, "groups": groups}
    with quiet():
        hardened = from_tensors(config, {n: x.clone() for n, x in tensors.items()}, model.dtype)
    hardened.generation_config = copy.deepcopy(model.generation_config)
    return hardened.train(model.training)


def mean_logits(model: SkipstoneForCausalLM, forward: Pass, batches: Iterable[Mapping[str, Tensor]]) -> list[Tensor]:
    """Return the PolyGLU router's mean logits over all tokens, fp32 [A] for each layer; A is the number of activations.

    model: the model to measure. forward: the kind of pass, which says whether decisions may look at later tokens and
    whether skipped tokens are computed. batches: the input tensors of each pass, by name. A layer that no token reached
    has zeros.
    """
    activations = model.modules_of(PolyGLU)
    sums = [torch.zeros(len(NAMES) + 1, dtype=torch.float64) for _ in activations]
    for batch in batches:
        records = forward.run(model, batch, output_records=True).records
        assert records is not None
        for total, decided, activation in zip(sums, records, activations, strict=True):
            record = expect(decided[activation.placement.name], ActivationRecord)
            logits_NA = record.logits_BTA.expand(*record.reached_BT.shape, -1)[record.reached_BT].double().cpu()
            total += torch.cat((logits_NA.sum(0), torch.tensor([float(len(logits_NA))]).double()))
    return [(total[:-1] / total[-1].clamp(min=1)).float().to(model.device) for total in sums]


def require_polyglu(model: SkipstoneForCausalLM) -> None:
    """Raise ValueError for a model without PolyGLU (neurons that mix several activations), or with neuron groups."""
    if not model.modules_of(PolyGLU):
        name = model.config.activation_options["name"]
        raise ValueError(f"only activation 'polyglu' can be hardened, this model has {name!r}")
    if model.config.neuron_groups is not None:
        raise ValueError(
            "a model with neuron_groups cannot be hardened: sorting by activation would break up the groups"
        )


def _sort_neurons(tensors: dict[str, Tensor], prefix: str, order_F: Tensor) -> None:
    for name in ("gate_proj.weight", "gate_proj.bias", "up_proj.weight", "up_proj.bias"):
        if prefix + name in tensors:
            tensors[prefix + name] = tensors[prefix + name][order_F]
    tensors[f"{prefix}down_proj.weight"] = tensors[f"{prefix}down_proj.weight"][:, order_F]
