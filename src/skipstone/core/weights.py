"""Checks of whether a linear layer's weight may be used without calling the layer, and counts of its weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.module_tracker import ModuleTracker

from skipstone.ops import int4


def hooks_on_all_modules() -> bool:
    """Return whether hooks for all modules of the process are registered (`register_module_forward_hook` and its like).

    Hooks by which torch itself tracks the running module (`ModuleTracker`, used by its FLOP counter) change no result
    and are ignored.
    """
    hooks = (*torch_module._global_forward_hooks.values(), *torch_module._global_forward_pre_hooks.values())
    return any(not isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


def weight_is_readable(linear: nn.Module) -> bool:
    """Return whether multiplying by `linear.weight` gives the same result as calling the layer.

    False for a layer with a bias (ours have none where this is asked, but a layer may have been replaced), and if
    something acts in place of the layer or around its call: an adapter, a parametrisation, hooks (accelerate's
    offloading, an observer, hooks on all modules), a replaced forward, a sharded weight, or one on the meta device.
    True for a weight that torchao has quantised.
    """
    if type(linear).forward is not nn.Linear.forward or "forward" in vars(linear) or hooks_on_all_modules():
        return False
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks:
        return False
    weight = linear.weight
    if linear.bias is not None:
        return False
    return weight.device.type != "meta" and (type(weight) is nn.Parameter or is_quantised(linear))


def weight_marks(*linears: nn.Module) -> list[int]:
    """Return numbers that change once a weight is replaced or written into, so that stale copies are noticed.

    linears: the layers whose weights are watched.
    """
    weights = [linear.weight for linear in linears]
    places = [id(w) if type(w) is not nn.Parameter else w.data_ptr() for w in weights]
    return [*places, *(0 if w.is_inference() else w._version for w in weights)]  # type: ignore[operator, union-attr, misc]


def weights_multiplied(linear: nn.Module) -> int:
    """Return the number of weights that each token is multiplied with in a call of a linear layer.

    Low-rank adapters of PEFT beside the layer are included while they are active and not merged. Other adapters are
    not; `warn_of_uncounted` names them.
    """
    if not linear._modules:  # no adapter; looking for its parts takes a hundred times as long
        return parameter_count([linear.weight])  # type: ignore[list-item]
    return linear.weight.numel() + sum(  # type: ignore[union-attr, operator]
        matrix[name].weight.numel()
        for matrix in (getattr(linear, "lora_A", {}), getattr(linear, "lora_B", {}))
        for name in _active(linear)
        if name in matrix
    )


def parameter_count(parameters: Iterable[Tensor]) -> int:
    """Return the number of parameters in tensors, in which four-bit matrices (uint8, `ops/int4.py`) are packed."""
    return sum(x.shape[0] * int4.inputs_of(x) if x.dtype == torch.uint8 else x.numel() for x in parameters)


def warn_of_uncounted(layers: nn.Module) -> None:
    """Warn of active adapters within `layers` whose products `weights_multiplied` does not count, such as DoRA."""
    kinds = {kind for part in layers.modules() if hasattr(part, "base_layer") and (kind := _uncounted(part))}
    if kinds:
        warnings.warn(
            f"the cost leaves out what adapters of these kinds compute: {', '.join(sorted(kinds))}; merge them for "
            "exact FLOPs",
            stacklevel=3,
        )


def _uncounted(linear: nn.Module) -> str | None:
    """Return the class of an active adapter beside a linear layer that is not counted; None if there is none.

    Scaling vectors (IA3) need no products, and low-rank matrices are counted; DoRA also computes the norms of weights.
    """
    active = _active(linear)
    if not active or hasattr(linear, "ia3_l"):
        return None
    if not hasattr(linear, "lora_A"):
        return f"{type(linear).__module__}.{type(linear).__name__}"
    dora = getattr(linear, "use_dora", {})
    return "DoRA" if any(dora.get(name) for name in active) else None


def _active(linear: nn.Module) -> list[str]:
    """Return the names of the adapters that PEFT computes beside a linear layer; none if merged or disabled."""
    if getattr(linear, "merged", False) or getattr(linear, "disable_adapters", False):
        return []
    return list(getattr(linear, "active_adapters", ()))


def compute_dtype(linear: nn.Module) -> torch.dtype:
    """Return the dtype of the outputs of the layer `linear`; if it is quantised, its weight has another dtype."""
    dtype: torch.dtype = linear.weight.dtype if linear.weight.dtype.is_floating_point else linear.compute_dtype  # type: ignore[assignment, union-attr]
    return dtype


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor if FSDP2 has sharded it, else the tensor itself; all processes must call this together."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def is_quantised(linear: nn.Module) -> bool:
    """Return whether the weight of `linear` is a quantised tensor of torchao, which stores integers and not values."""
    weight = linear.weight
    return isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize
