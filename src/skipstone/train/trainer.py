"""The trainer of `skipstone train`."""

from __future__ import annotations

import math
from collections.abc import Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers.trainer_utils import rotate_checkpoints

from skipstone.core import atomic_write, checksums
from skipstone.core.routing_module import causal_obstacle
from skipstone.core.strict import PlainDict
from skipstone.data.prepare import PreparedData
from skipstone.data.rows import Row
from skipstone.measure.passes import forced_routing
from skipstone.measure.record_meter import RecordMeter, moving
from skipstone.model.causal_lm import CausalLMOutput, SkipstoneForCausalLM
from skipstone.runs import METRICS, count_lines
from skipstone.train.checkpoints import PARTIAL
from skipstone.train.decay import decaying
from skipstone.train.log_window import LogWindow
from skipstone.train.mixin import RoutingTrainer
from skipstone.train.recipe import TrainConfig
from skipstone.train.validation import batches, loss_sums


class RunTrainer(RoutingTrainer):
    """The trainer of `skipstone train`, with exact resuming, its own validation and atomic checkpoints."""

    def __init__(self, *, recipe: TrainConfig, data: PreparedData, **kwargs: object) -> None:
        super().__init__(train_dataset=data.train, eval_dataset=data.validation, data_collator=data.collate, **kwargs)
        self.recipe, self.data = recipe, data
        self.loss_chunk = recipe.loss_chunk_of(self._plain.config.vocab_size)
        self.window = LogWindow(self.args.device)
        self.meter = RecordMeter()
        self.obstacle = causal_obstacle(self._plain.routing_modules())
        self.routing.saves_whole_model = True  # its checkpoints contain adapters with their model

    # Rows are read in order: each is already a random draw from (seed, index), so a step's rows follow from its number.
    def _get_train_sampler(self, train_dataset: Sized | None = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of parameters with weight decay, by the recipe's `no_decay`."""
        return decaying(model, (name for name, _ in model.named_parameters()), self.recipe.no_decay)

    def floating_point_ops(self, inputs: PlainDict) -> int:
        """Return 0: Trainer's estimate would count a routed model as dense; the cost model counts exactly."""
        return 0

    def compute_loss(self, model: nn.Module, inputs: PlainDict, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Return the loss of a micro-batch, adding to the sums for the next log line."""
        routing = {} if self.recipe.routing == "learned" else {"routing": self._forced(inputs)}
        asked = {"loss_chunk": self.loss_chunk, **inputs, **routing}
        loss, outputs = super().compute_loss(model, asked, return_outputs=True, **kwargs)
        loss = self.objective(loss, outputs, inputs, kwargs.get("num_items_in_batch"))
        self.window.add(outputs["token_loss"], outputs["auxiliary_loss"], self._tokens(inputs))
        if self._logs_this_step():
            self.meter.add(self._plain.routing_modules(), outputs["records"])
        return (loss, outputs) if return_outputs else loss

    def _tokens(self, inputs: PlainDict) -> int:
        """Return the tokens of a micro-batch over all processes, which have rows of equal length."""
        return int(inputs["input_ids"].numel()) * self.accelerator.num_processes

    def objective(self, loss: Tensor, outputs: CausalLMOutput, inputs: PlainDict, items: Tensor | int | None) -> Tensor:
        """Return the loss to minimise, by default the model's own. Overrides must keep `outputs` correct for the log.

        items: predicted tokens of the whole optimizer step, by which sums are divided.
        """
        return loss

    @property
    def _plain(self) -> SkipstoneForCausalLM:
        return self.accelerator.unwrap_model(self.model)

    def _forced(self, batch: Row) -> dict[int, Tensor]:
        """Return masks that keep exactly the tokens known to need depth, for every block that routes."""
        return forced_routing(self._plain, batch["difficulty"] >= 0)

    def _logs_this_step(self) -> bool:
        step = self.state.global_step + 1
        return step in (1, self.state.max_steps) or step % self.recipe.log_every == 0

    # --- logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with our own training losses: means since the last line, exact across a resumption."""
        if "train_runtime" in logs:
            return  # Trainer's closing summary; result.json has ours
        if "loss" in logs:
            logs = {**logs, **self._window_logs()}
        super().log(logs, start_time)

    def _window_logs(self) -> dict[str, float]:
        """Return the figures since the last log line, and begin a new window."""
        window = self.window
        steps = self.state.global_step - window.began
        token_loss, auxiliary_loss = (self.accelerator.reduce(window.sums, "sum") / max(steps, 1)).tolist()
        logs = {"loss": token_loss + auxiliary_loss, "token_loss": token_loss, "auxiliary_loss": auxiliary_loss}
        if window.seconds:
            logs["tokens_per_second"] = window.tokens / window.seconds
        logs |= self.meter.read() | moving(self._plain.routing_modules())
        window.clear(self.state.global_step)
        return logs

    def _check_finite(self, grad_norm: Tensor | float | None) -> None:
        """Raise ValueError for a loss or gradient that is not finite, before anything is logged or saved.

        The host waits once for both.
        """
        pair = torch.stack((self.window.sums.sum(), torch.as_tensor(grad_norm).to(self.window.sums)))
        loss, norm = pair.tolist()
        if not math.isfinite(loss + norm):
            what = "training loss" if not math.isfinite(loss) else "gradient"
            raise ValueError(
                f"the {what} was not finite between step {self.window.began} and step {self.state.global_step}, "
                "so the run has stopped; lower train.learning_rate, or lengthen train.warmup_steps"
            )

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Tensor | float | None, *args: object, **kwargs: object
    ) -> None:
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            if self.args.device.type == "cuda":
                torch.cuda.synchronize()  # queued work belongs to the training time
            self._check_finite(grad_norm)
            with self.window.paused():
                super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    # --- validation

    def evaluate(self, *args: object, **kwargs: object) -> dict[str, float]:
        """Return `eval_oracle_loss` and, if the model can decide causally, `eval_causal_loss` with the capacities of
        that pass.
        """
        model, was_training = self.model, self.model.training
        model.eval()
        with torch.compiler.set_stance("force_eager"):  # validation passes are not worth compiling
            metrics = {"eval_oracle_loss": self._validation_loss("oracle", RecordMeter())}
            if self.obstacle is None:
                meter = RecordMeter()
                metrics["eval_causal_loss"] = self._validation_loss("causal", meter)
                metrics |= {f"eval_{name}": value for name, value in meter.read().items()}
        model.train(was_training)
        self.log(metrics)
        handler = self.callback_handler
        self.control: Any = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _validation_loss(self, routing: str, meter: RecordMeter) -> float:
        forced = self.recipe.routing == "difficulty"
        size = self.recipe.eval_batch_size or self.args.per_device_train_batch_size
        part, parts = self.accelerator.process_index, self.accelerator.num_processes
        rows = batches(self.data, self.recipe.eval_rows, size, part, parts)
        chosen = self._forced if forced else lambda _: routing
        sums = loss_sums(self.model, rows, chosen, self.args.device, meter, self.loss_chunk)
        loss, count = self.accelerator.reduce(sums, "sum").tolist()
        return loss / count

    # --- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Save a checkpoint under a temporary name and rename it when it is complete."""
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        partial = folder / PARTIAL
        if self.args.should_save:
            atomic_write.remove(partial)
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(partial)
        try:
            with atomic_write.naming(folder / name):
                super()._save_checkpoint(model, trial)
                sums = self.accelerator.reduce(self.window.sums, "sum")
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._close_checkpoint(partial / name, folder / name, sums)
        except BaseException:
            if self.args.should_save:
                atomic_write.remove(partial)  # it may have filled the disk
            raise
        finally:
            self.args.output_dir = str(folder)
        if self.args.should_save:
            partial.rmdir()
            rotate_checkpoints(str(folder), self.recipe.keep_checkpoints)

    def _close_checkpoint(self, partial: Path, final: Path, sums: Tensor) -> None:
        """Add what Trainer does not save and the hashes of all files, then rename."""
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle that we never read
        self.window.save(partial, sums, count_lines(final.parent.parent / METRICS))
        checksums.record(partial)
        atomic_write.replace_folder(partial, final)
