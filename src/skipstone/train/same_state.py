"""`SameState` stops a training whose processes hold different values of a tensor that each holds whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from skipstone.train.parallel import processes

ODD = 0x9E3779B1  # places of a tensor weigh differently in its hash


class SameState(TrainerCallback):
    """A callback that checks every `steps` steps that replicated tensors and learning rates are equal in all processes.

    Parameters and buffers are compared by hashes: all of them under DDP, and those that are not sharded under FSDP2.
    steps: interval in optimizer steps; the last step is checked, too; 0 disables all checks, also the last. Raises
    ValueError in every process, naming the first tensor that differs.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        last = state.global_step >= state.max_steps
        if self.steps and processes() > 1 and (last or state.global_step % self.steps == 0):
            rates = {f"learning rate {i}": rate for i, rate in enumerate(kwargs["lr_scheduler"].get_last_lr())}
            compare(dict(_replicated(kwargs["model"])), rates, args.device, state.global_step)


def compare(tensors: dict[str, Tensor], numbers: dict[str, float], device: torch.device, step: int) -> None:
    """Raise ValueError in every process if a tensor or number differs between processes; all must call it.

    The message names the first value that differs, and the step. tensors, numbers: what this process holds, by name.
    device: the device on which hashes are exchanged. step: the optimizer step.
    """
    named = tensors | {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    if not named:
        return
    hashes = torch.stack([_hash(value).to(device) for value in named.values()])
    least, most = hashes.clone(), hashes.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    differing = [name for name, one in zip(named, (least != most).tolist(), strict=True) if one]
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise ValueError(
            f"the processes have diverged: {differing[0]!r}{more} differed at step {step}; resume from the "
            "last checkpoint, which was written before"
        )


def _replicated(model: Any) -> Iterator[tuple[str, Tensor]]:
    while not hasattr(model, "routing_modules") and hasattr(model, "module"):
        model = model.module
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if not isinstance(value, DTensor):
            yield name, value.detach()


def _hash(value: Tensor) -> Tensor:
    """Return a hash of all bits of a tensor, int64 scalar; sums wrap around, so their order does not matter."""
    words = value.contiguous().view(torch.uint8).flatten() if value.dim() else value.reshape(1).view(torch.uint8)
    size = {0: torch.int32, 2: torch.int16}.get(words.numel() % 4, torch.uint8)
    words = words.view(size).long()
    place = torch.arange(1, words.numel() + 1, device=words.device) * ODD | 1
    return ((words ^ place) * place).sum()
