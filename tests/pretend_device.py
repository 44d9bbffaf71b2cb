"""A device that computes on the CPU but is not the CPU: what a GPU would refuse fails on it as well.

A tensor on `pretend` wraps one of the CPU. An operation on tensors of both devices raises, unless one of them has no
dimension or the operation copies. Operations that make the host wait, and copies from the host, which no CUDA graph can
hold, are counted in `waits` and `uploads`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from skipstone.measure.flops import is_sync

NAME = "pretend"
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
waits: Counter[str] = Counter()
uploads: Counter[str] = Counter()


class Pretend(torch.Tensor):
    """A tensor whose data are on the CPU and whose device is not."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Pretend:
        made: Pretend = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretend({self.raw!r})"

    def tolist(self) -> Any:
        waits["tolist"] += 1
        return self.raw.tolist()


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours, wanted = [x for x in tensors if isinstance(x, Pretend)], kwargs.get("device")
    theirs = [x for x in tensors if not isinstance(x, Pretend)]
    there = bool(ours) if wanted is None else torch.device(wanted).type == NAME
    if ours and func not in COPIES and any(x.dim() for x in theirs):
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} got {NAME} and cpu")
    if not ours and there and tensors:
        uploads[str(func)] += 1
    raw = tree_map(lambda x: x.raw if isinstance(x, Pretend) else x, (args, kwargs))
    if wanted is not None:
        raw[1]["device"] = torch.device("cpu")
    out = func(*raw[0], **raw[1])
    if ours and (is_sync(func, raw[0], out) or (func is COPIES[0] and not there)):
        waits[str(func)] += 1
    if func is COPIES[1]:
        uploads[str(func)] += bool(isinstance(args[0], Pretend) and theirs and theirs[0].dim())
    return _wrapped(func, args, out) if there else out


def _wrapped(func: Any, args: Any, out: Any) -> Any:
    """Wrap the tensors that an operation returned, so that they are on the pretended device.

    args: the operation's arguments; a tensor that it wrote in place is returned itself.
    """
    known = {id(x.raw): x for x in tree_leaves(args) if isinstance(x, Pretend)}

    def wrap(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return known[id(x)] if id(x) in known else Pretend(x)

    return tree_map(wrap, out)


class _Module:
    """The module that torch requires of a device, as `torch.cuda` is for CUDA."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Do nothing, because random numbers come from the CPU's generator, which is seeded already."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)


@contextmanager
def pretending(default: bool = False) -> Iterator[torch.device]:
    """Let `torch.device("pretend")` exist inside a `with` block; with `default`, factories make tensors there."""
    device = torch.device(NAME, 0)
    waits.clear()
    uploads.clear()
    # torch.tensor(..., device=...) then makes a tensor of the CPU first, and its copy is an operation that is seen.
    lifting = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Mode(), device if default else nullcontext():
            yield device
    finally:
        torch._C._set_only_lift_cpu_tensors(lifting)


# Before the first backward pass of the process: autograd then counts the kinds of devices, once.
_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
# Autocast as on a GPU: products in its dtype; all else is left as it is.
_LIBRARIES = (
    library.Library("_", "IMPL", "AutocastPrivateUse1"),
    library.Library("aten", "IMPL", "AutocastPrivateUse1"),
)
_LIBRARIES[0].fallback(library.fallthrough_kernel)


def _product(op: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(NAME)
        cast = tree_map(lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, args)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return op(*cast, **kwargs)

    return run


for _name in ("linear", "matmul", "mm", "bmm", "addmm", "scaled_dot_product_attention"):
    _LIBRARIES[1].impl(_name, _product(getattr(torch.ops.aten, _name)))
