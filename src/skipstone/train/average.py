"""`TailAverage`: the mean of the weights over the last steps of a training, which becomes the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FILE = "average.safetensors"  # in a checkpoint that was written within the averaged steps


class TailAverage(TrainerCallback):
    """A callback that averages all parameters over the last steps and gives the mean to the model at the end.

    Averaging lowers the noise that a finite learning rate leaves in the weights (stochastic weight averaging, arXiv
    1803.05407). Buffers, such as routing thresholds, keep their last values. The validation after the last step uses
    the mean, and so does the saved model. Checkpoints contain the running mean, so a resumed run ends with the same
    weights.

    steps: number of optimizer steps at the end of the training whose weights are averaged, at least 1. mean: the
    running mean, one tensor for each parameter by name. count: how many steps the mean covers so far.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.mean: dict[str, Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step <= state.max_steps - self.steps:
            return
        parameters = {name.removeprefix("module."): p for name, p in kwargs["model"].named_parameters()}
        self.count += 1
        for name, parameter in parameters.items():
            if self.count == 1:
                self.mean[name] = parameter.detach().clone()
            else:
                self.mean[name].lerp_(parameter, 1 / self.count)
        if state.global_step == state.max_steps:
            for name, parameter in parameters.items():
                parameter.copy_(self.mean[name])

    def save(self, checkpoint: Path) -> None:
        """Write the running mean and its count to the file average.safetensors in the folder `checkpoint`.

        Nothing is written before the first averaged step.
        """
        if self.count:
            mean = {name: x.contiguous() for name, x in self.mean.items()}
            save_file({**mean, "count": torch.tensor(self.count)}, checkpoint / FILE)

    def load(self, checkpoint: Path) -> None:
        """Restore the running mean and its count from average.safetensors in `checkpoint`, if there is this file."""
        if (checkpoint / FILE).is_file():
            self.mean = load_file(checkpoint / FILE)
            self.count = int(self.mean.pop("count"))
