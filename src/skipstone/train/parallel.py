"""Training on several processes: DDP replicates the model, FSDP2 shards it.

Hooks give every parameter a gradient in every process, also in blocks that keep no token there.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

import gc
import os
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from skipstone.core.strict import PlainDict
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.nn.block import SEGMENT
from skipstone.train.recipe import TrainConfig

_GROUPS_OF_ONE: dict[int, dist.DeviceMesh] = {}  # by the process that has made a group of itself
_ENDED: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()  # destroyed, but still referred to


def processes() -> int:
    """Return the number of processes that train together; 1 for a single process."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def prepare(model: SkipstoneForCausalLM, train: TrainConfig, device: torch.device) -> None:
    """Prepare a model for training on several processes; shard its parameters if the recipe sets parallel=fsdp2.

    model: changed in place. train: the recipe's training options. device: where this process trains. Raises ValueError
    if accelerate is configured to shard the model itself (environment variable ACCELERATE_USE_FSDP), or if a parameter
    would stay unsharded.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "accelerate is configured to shard the model itself (use_fsdp); leave that out and set train.parallel=fsdp2"
        )
    sharded = train.parallel == "fsdp2"
    if processes() > 1 or sharded:
        _touch_blocks(model)
        model.model.every_block_runs = any(block.sites[SEGMENT] for block in model.model.layers)
    if sharded:
        shard(model, device)


def leave() -> None:
    """Destroy the process group that `shard` created for a process that trains alone; do nothing otherwise."""
    mesh = _GROUPS_OF_ONE.pop(os.getpid(), None)
    if mesh is not None:
        _ENDED.add(mesh.get_group())
        dist.destroy_process_group()
        getattr(mesh, "_pg_registry", {}).clear()  # DTensor's caches keep the mesh for as long as the process lives


def _free_ended() -> None:
    """Free the groups that `leave` has destroyed, and end their threads.

    A fork does not copy these threads. If it freed such a group later, gloo would wait for them and abort the process.
    """
    if _ENDED:
        gc.collect()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_free_ended)


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP2 has sharded the parameters of `model`."""
    return isinstance(model, FSDPModule)


def shard(model: SkipstoneForCausalLM, device: torch.device) -> None:
    """Move the model to `device` and shard its parameters over all processes with FSDP2, in place.

    Each block is one FSDP group (and so is a mechanism that skips several blocks at once); all other parameters form
    another. Parameters are gathered in fp32, so that
    routers and norms compute as in one process; autocast then rounds the matrices for the products. Scalar parameters
    cannot be sharded and stay replicated. If torch.distributed is not initialised, this process becomes a process group
    of one. model: may be on any device before. device: the device of this process. Raises ValueError if a parameter
    stays unsharded.
    """
    alone = not dist.is_initialized()
    if alone:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    if alone:
        _GROUPS_OF_ONE[os.getpid()] = mesh
    # FSDP2 warns of in-place writes to outputs that are views; there are none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    model.to(device)
    whole = {parameter for parameter in model.parameters() if parameter.dim() == 0}
    for block in model.model.layers:
        for name in block.sites[SEGMENT] if block.span > 1 else ():  # it runs outside of the block's forward
            fully_shard(block.mechanisms[name], mesh=mesh, ignored_params=whole)
        fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    _require_sharded(model)
    model._is_fsdp_managed_module = True  # for Trainer, which then defers the reduction of micro-batches' gradients


def forget_gathered(model: nn.Module) -> None:
    """Free the full weights that a pass without gradients gathered in a sharded model; do nothing otherwise.

    FSDP2 keeps parameters outside of blocks gathered after such a pass, and the next pass would use these copies
    although the optimizer has changed the shards in between.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def _require_sharded(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() and not isinstance(parameter, DTensor):
            raise ValueError(f"train.parallel=fsdp2 has left the parameter {name!r} whole: it is no DTensor")


def full(norm: Any) -> Any:
    """Return a gradient norm as a plain tensor.

    norm: a distributed tensor (DTensor) if the gradients are sharded, which is gathered; anything else is returned
    unchanged.
    """
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def replicated(model: nn.Module) -> list[nn.Parameter]:
    """Return the trained parameters of a sharded model that every process holds in full."""
    return [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]


@torch.no_grad()
def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average the gradients of `parameters`, which FSDP2 does not manage, over all processes, in place.

    All gradients travel in one message. Every parameter must have a gradient.
    """
    if parameters and processes() > 1:
        flat = torch.cat([p.grad.flatten() for p in parameters])  # type: ignore[union-attr]
        dist.all_reduce(flat)
        parts = (flat / processes()).split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad.copy_(part.view_as(parameter))  # type: ignore[union-attr]


def by_layout(groups: Iterable[PlainDict]) -> list[PlainDict]:
    """Split optimizer groups so that none contains both sharded and unsharded parameters; fused AdamW needs this.

    groups: torch's parameter groups, each with `params`; other options are copied. Empty groups are left out.
    """
    found = []
    for group in groups:
        for sharded in (True, False):
            parts = [p for p in group["params"] if isinstance(p, DTensor) == sharded]
            if parts:
                found.append({**group, "params": parts})
    return found


# --- every process uses every parameter of every block


class _Touched(torch.autograd.Function):
    """The identity of x, whose backward pass adds a gradient of zeros for each of the parameters.

    A block may keep no token, or an expert get none. Its parameters then have no gradient in this process but one in
    another: FSDP2 would wait for ever, and DDP would have to search the graph in each step.
    """

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return x_BTD.view_as(x_BTD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.like)
        return (*gradients, *zeros)


def _touch_blocks(model: SkipstoneForCausalLM) -> None:
    for block in model.model.layers:
        block.register_forward_pre_hook(_touch)  # FSDP2's own comes first, so that the parameters are whole


def _touch(block: nn.Module, given: tuple[object, ...]) -> tuple[object, ...]:
    """Return the block's arguments unchanged, so marked that every parameter of the block will get a gradient.

    This is a hook that runs before the block's forward. given: the arguments; the first is its input.
    """
    parameters = [p for p in block.parameters() if p.requires_grad]
    if not parameters or not torch.is_grad_enabled():
        return given
    x_BTD, *rest = given
    return (_Touched.apply(x_BTD, *parameters), *rest)  # type: ignore[no-untyped-call]


def complete_gradients(model: SkipstoneForCausalLM) -> None:
    """Give every trained parameter of the blocks that has no gradient in this step a gradient of zeros.

    A block that keeps no token in a step has no gradients if there is one process, but zeros if there are several,
    because hooks add them. The optimizer leaves out a parameter without a gradient, whereas for zeros it still applies
    momentum and weight decay. Without this function, the result would therefore depend on the number of processes.
    model: after its backward pass.
    """
    for parameter in model.model.layers.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


# --- gathering the whole model


def whole_model(model: SkipstoneForCausalLM) -> SkipstoneForCausalLM | None:
    """Return an unsharded copy of a sharded model in the first process, and None in the others; all must call it.

    model: sharded by FSDP2. The copy is on the same device.
    """
    first, state = dist.get_rank() == 0, {}
    for name, value in model.state_dict().items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if first:
            state[name] = full.detach().cpu()
    if not first:
        return None
    with torch.random.fork_rng():
        plain = SkipstoneForCausalLM(model.config)
    plain.load_state_dict(state)
    return plain.to(next(model.parameters()).device)


# --- random numbers


@contextmanager
def own_dropout(seed: Tensor, rank: int, part: int, device: torch.device) -> Iterator[None]:
    """Give this process its own random numbers, such as those of dropout, inside a `with` block.

    Afterwards the generators of all processes are equal again. seed: int64 [], of the optimizer step, equal in all
    processes. rank: index of this process. part: the micro-batch within the step. device: whose generator is used,
    besides the CPU's.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices, device_type=device.type if device.type != "cpu" else "cuda"):
        torch.manual_seed(int(seed) + (part * processes() + rank + 1) * 0x9E3779B1)
        yield
