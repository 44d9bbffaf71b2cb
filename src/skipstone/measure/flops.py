"""Counting of executed FLOPs by kind, and of waits of the CPU for the device, and comparison with the cost model.

An operation is in the FLOP table, or it is free by convention (pointwise, view, reduction, or named below), or it is
reported as unknown. Fused attention counts 4 H E Tq Tk forward (H heads of width E, Tq queries, Tk keys) and twice that
backward: the scores that a fused kernel recomputes are not counted, as in MFU, so that no figure depends on the choice
of kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

from skipstone.core.progress_bar import advance
from skipstone.core.strict import PlainDict
from skipstone.measure.passes import Pass
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.cost import cost, kept_from_records
from skipstone.ops import float16, head_preview, int4, int8, magnitude

aten = torch.ops.aten

COUNTED_BATCHES = 4  # FLOPs of a model are counted on so many

FREE_NAMES = """
_softmax _safe_softmax tril _softmax_backward_data _log_softmax _log_softmax_backward_data
nll_loss_forward nll_loss_backward binary_cross_entropy_with_logits
native_layer_norm native_layer_norm_backward native_dropout gelu gelu_backward threshold_backward
embedding embedding_dense_backward constant_pad_nd slice_backward select_backward cat stack flip roll
sort cumsum cummax cummin nonzero nonzero_static index index_put index_put_ _index_put_impl_ index_select
index_add index_copy gather scatter scatter_ scatter_add topk searchsorted
floor_divide _local_scalar_dense item _to_copy copy_ masked_fill_
index_copy_ squeeze_ unsqueeze_ _unsafe_view _reshape_alias lift_fresh
arange empty empty_like new_empty empty_strided new_empty_strided scalar_tensor zeros zeros_like new_zeros
ones ones_like new_ones full full_like new_full fill_ exponential_ bernoulli_ uniform_ rand_like randint
"""  # softmax, losses, norms; looking up; sorting, gathering, copying; filling, drawing
FREE = frozenset(FREE_NAMES.split())


@dataclass(frozen=True, kw_only=True)
class FlopCount:
    """The FLOPs of all operations that executed while a function ran. A multiply-accumulate counts as 2.

    total: all FLOPs. by_kind: FLOPs by part of the model: "attention_linear", "attention_score", "mlp", "router",
    "head" and "other" in forward passes, "backward" for all backward passes. unknown: names of executed operations that
    are neither counted nor known to be free; if there are any, the total is incomplete.
    """

    total: int
    by_kind: Mapping[str, int]
    unknown: tuple[str, ...]


def count_flops(fn: Callable[[], object]) -> FlopCount:
    """Count the FLOPs of everything that executes while `fn()` runs: forward passes, backward passes, or both.

    fn: called once, without arguments. Pointwise operations, norms and copies count as 0. A forward pass that
    activation checkpointing repeats is counted, as backward. Returns the sum, its parts by kind, and operations that
    the counter does not know.
    """
    return _counted(fn)[0]


def count_host_syncs(fn: Callable[[], object]) -> Counter[str]:
    """Return how often the host had to wait for the device while `fn()` ran, by name of the operation.

    The host waits when it needs a value from the device, or a shape that depends on such a value. Keys are names such
    as "aten.nonzero.default". fn: called once, without arguments. On a CPU nothing waits, but operations with such
    results are counted all the same.
    """
    with _Operations() as operations:
        fn()
    return operations.syncs


def _counted(fn: Callable[[], object]) -> tuple[FlopCount, Counter[str]]:
    """Return what `count_flops` and `count_host_syncs` return, from one call of `fn`."""
    by_kind: Counter[str] = Counter()

    def tally(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: PlainDict, out: Any) -> None:
        if (formula := TABLE.get(op.overloadpacket)) is not None:
            flops = formula(*args, **kwargs, out_val=out)
            by_kind["backward" if tracker.is_bw else kind_of(tracker.parents)] += flops

    with ModuleTracker() as tracker, _Operations(tally) as operations:
        fn()
    unknown = sorted(str(op) for op in operations.seen if op.overloadpacket not in TABLE and not is_free(op))
    return FlopCount(total=by_kind.total(), by_kind=dict(by_kind), unknown=tuple(unknown)), operations.syncs


def kind_of(modules: set[str]) -> str:
    """Return the kind of a matrix product (a key of `FlopCount.by_kind`) from the modules that are running.

    The kinds are "attention_linear", "attention_score", "mlp", "router", "head" and "other". modules: full names of the
    modules whose forward is running, in any order, such as {"model.layers.0.mlp", "model.layers.0.mlp.up_proj"}.
    """
    parts = {name.rpartition(".")[2] for name in modules}
    if "self_attn" in parts:
        return "attention_linear" if any(part.endswith("_proj") for part in parts) else "attention_score"
    if "mlp" in parts:
        return "router" if parts & {"activation", "router"} else "mlp"
    if parts & {"lm_head", "head_preview"}:
        return "head"
    return "router" if any(".mechanisms." in name for name in modules) else "other"


def is_free(op: torch._ops.OpOverload) -> bool:
    """Return whether an operation counts as 0 FLOPs: a view, pointwise, a reduction, or named in `FREE`.

    `FREE` is this module's set of such operations' names. op: an operation as torch dispatches it.
    """
    tags = {torch.Tag.pointwise, torch.Tag.reduction, torch.Tag.view_copy}
    return bool(op.is_view or tags & set(op.tags) or op.overloadpacket.__name__ in FREE)


def is_sync(op: torch._ops.OpOverload, args: tuple[Any, ...], out: Any) -> bool:
    """Return whether an operation makes the host wait for the device.

    It does if its result is a value for the host or has a shape that depends on data, if it indexes with a bool mask,
    and if it copies data from the device to the CPU. op: the operation as torch dispatches it. args: its positional
    arguments. out: its result.
    """
    if op.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if op.overloadpacket in (aten._to_copy, aten.copy_):
        source = args[1] if op.overloadpacket is aten.copy_ else args[0]
        return bool(source.device.type != "cpu" and out.device.type == "cpu")
    return _shape_or_value_depends_on_data(op)


@cache  # an operation that runs is asked this and the next each time; its tags never change
def _shape_or_value_depends_on_data(op: torch._ops.OpOverload) -> bool:
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(op.tags))


@cache
def _consists_of_others(op: object) -> bool:
    """Return whether an operation has no kernel of its own, but is written in terms of other operations."""
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return isinstance(op, torch._ops.OpOverload) and (
        composite in op.py_kernels or torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), composite)
    )


class _Operations(TorchDispatchMode):
    """A dispatch mode that notes which torch operations ran (`seen`) and how often each made the host wait (`syncs`).

    tally: called with each operation after it has run, with its arguments and its result.
    """

    def __init__(self, tally: Callable[[torch._ops.OpOverload, tuple[Any, ...], PlainDict, Any], None] | None = None):
        super().__init__()
        self.seen: set[torch._ops.OpOverload] = set()
        self.syncs: Counter[str] = Counter()
        self._tally = tally

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: PlainDict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _consists_of_others(func):
            with self:  # inference mode hands over whole functions, such as linear; what they consist of is counted
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if isinstance(func, torch._ops.OpOverload):
            self.seen.add(func)
            if is_sync(func, args, out):
                self.syncs[str(func)] += 1
            if self._tally is not None:
                self._tally(func, args, kwargs, out)
        return out


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: object, **kwargs: object) -> int:
    """Return the FLOPs of attention: two products for each pair of query and key in every query head."""
    *rows_and_heads, queries, width = query.shape
    pairs = queries * key.shape[-2]
    for size in rows_and_heads:
        pairs *= size
    return 2 * pairs * (width + value.shape[-1])


def _attention_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: object, **kwargs: Any
) -> int:
    return 2 * _attention(query, key, value)


def _grouped(
    a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor | None = None, *args: object, **kwargs: object
) -> int:
    """Return the FLOPs of a grouped product, in which groups end at `offs`.

    Groups are rows of a (2 axes by 3), columns of b (3 by 2) or parts of the summed axis (2 by 2).
    """
    inside = int(offs[-1]) if offs is not None and len(offs) else 0
    if a.dim() == b.dim() == 2:
        return 2 * a.shape[0] * inside * b.shape[1]
    return 2 * inside * (a.shape[1] * b.shape[2] if a.dim() == 2 else a.shape[1] * a.shape[2])


def _magnitude(*args: Any, **kwargs: object) -> int:
    """Return the FLOPs of an MLP whose neurons are chosen by magnitude, from the arguments of its operation.

    The up projection is multiplied for the neuron groups that were tried, the down projection for those that are kept.
    """
    up_FD, tried, kept, size = args[3], *args[5:8]
    return 2 * (tried + kept) * size * up_FD.shape[1]  # type: ignore[no-any-return]


def _by_candidates(*args: Any, **kwargs: object) -> int:
    turn, weight_VD, candidates = args[1], args[6], args[8]
    return head_preview.flops(weight_VD.shape[1], weight_VD.shape[0], turn.shape[0] - 1, candidates)


FORWARD = (
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_fused_attention_overrideable,
)
BACKWARD = (
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
    aten._scaled_dot_product_flash_attention_backward,
    aten._scaled_dot_product_efficient_attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward,
    aten._scaled_dot_product_fused_attention_overrideable_backward,
)
TABLE: dict[object, Callable[..., int]] = {
    **flop_registry,
    **dict.fromkeys(FORWARD, _attention),
    **dict.fromkeys(BACKWARD, _attention_backward),
    aten._grouped_mm: _grouped,
    float16.NATIVE: lambda x, weight, *args, **kwargs: 2 * x.numel() * weight.shape[0],
    int4.NATIVE: lambda x, weight, *args, **kwargs: 2 * x.numel() * weight.shape[0],
    int8.NATIVE: lambda x, weight, *args, **kwargs: 2 * x.numel() * weight.shape[0],
    head_preview.NATIVE: _by_candidates,
    magnitude.NATIVE: _magnitude,
    magnitude.NATIVE_LARGEST: lambda *args, **kwargs: 0,
}


@dataclass(frozen=True, kw_only=True)
class FlopCheck:
    """Forward FLOPs per token of a model on whole rows without a cache, as counted and as the cost model predicts them.

    Padding counts as tokens, because it is computed. counted: FLOPs of the operations that ran. predicted: what
    `model.cost` derives for the recorded decisions. needed: the same, but without the padding of rows that keep fewer
    tokens than the row of the batch that keeps the most. dense: what `model.cost` derives for the same model without
    mechanisms. syncs: mean number of times that a forward pass made the host wait for the device. unknown: operations
    that ran but that the counter does not know; if there are any, `counted` is incomplete.
    """

    counted: float
    predicted: float
    needed: float
    dense: float
    syncs: float
    unknown: tuple[str, ...]

    @property
    def agree(self) -> bool:
        """Whether counted and predicted FLOPs differ by a share of at most 1e-9, and no operation was unknown."""
        return abs(self.counted - self.predicted) <= 1e-9 * max(self.counted, 1) and not self.unknown

    @property
    def share(self) -> float:
        """The counted FLOPs divided by those of the dense model."""
        return self.counted / self.dense


def flop_check(model: SkipstoneForCausalLM, forward: Pass, batches: Iterable[Mapping[str, torch.Tensor]]) -> FlopCheck:
    """Count the FLOPs of a model's forward passes and compare them with the prediction by formulas (`model.cost`).

    forward: the kind of pass, which says how the model decides and executes. batches: dicts of input tensors with
    `input_ids` [B, T] (rows, tokens). Each batch is run twice, once to count FLOPs and host syncs (waits of the CPU for
    the device) and once to record the decisions. FLOPs are means over all tokens, syncs the mean over batches. The
    result has counted and predicted FLOPs per token and the names of operations that the counter does not know. Raises
    ValueError without any tokens.
    """
    totals, passes = dict.fromkeys(("counted", "predicted", "needed", "dense", "tokens", "syncs"), 0.0), 0
    unknown: set[str] = set()
    for batch in batches:
        run = partial(forward.run, model, batch)
        found, syncs = _counted(run)
        for name, value in {**_predicted(model, forward, batch), "counted": found.total}.items():
            totals[name] += value
        totals["tokens"] += batch["input_ids"].numel()
        totals["syncs"] += syncs.total()
        unknown |= {*found.unknown}
        passes += 1
        advance("rows", len(batch["input_ids"]), "counting FLOPs")
    tokens, waits = totals.pop("tokens"), totals.pop("syncs")
    if not tokens:
        raise ValueError("there is no token in the batches: no FLOPs to count")
    per_token = {name: value / tokens for name, value in totals.items()}
    return FlopCheck(**per_token, syncs=waits / passes, unknown=tuple(sorted(unknown)))


def _predicted(model: SkipstoneForCausalLM, forward: Pass, batch: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return a batch's forward FLOPs by the cost model, with the keys "predicted", "needed" and "dense" of `FlopCheck`.

    forward: the pass whose decisions are taken. batch: input tensors by name.
    """
    rows, length = batch["input_ids"].shape
    records = forward.run(model, batch, output_records=True).records or ()
    widest, mean = (
        cost(
            model,
            tokens=length,
            batch=rows,
            routing=forward.routing,
            kept=kept_from_records(model, records, rows=which),
        )
        for which in ("widest", "mean")
    )
    assert widest.dense is not None
    return {
        "predicted": widest.forward.total,
        "needed": mean.forward.total,
        "dense": widest.dense.forward.total,
    }
