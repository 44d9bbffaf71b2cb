"""`RunTrainer`: the trainer of `skipstone train`, a subclass of transformers' Trainer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers.trainer_utils import rotate_checkpoints

from skipstone.core import atomic_write, checksums
from skipstone.core.noise import draw_seed
from skipstone.core.routing_module import causal_obstacle
from skipstone.core.strict import PlainDict
from skipstone.data.prepare import PreparedData
from skipstone.data.rows import Row
from skipstone.measure.passes import forced_routing
from skipstone.measure.record_meter import RecordMeter, moving
from skipstone.model.causal_lm import CausalLMOutput, SkipstoneForCausalLM
from skipstone.runs import METRICS, count_lines
from skipstone.train import parallel, sharded
from skipstone.train.average import TailAverage
from skipstone.train.checkpoints import PARTIAL, restore_other
from skipstone.train.decay import decaying, with_router_rate
from skipstone.train.finite import FiniteGuard, NotFinite, RowTurns
from skipstone.train.log_window import LogWindow
from skipstone.train.mixin import RoutingTrainer
from skipstone.train.recipe import TrainConfig
from skipstone.train.router_watch import RouterWatch
from skipstone.train.same_state import SameState
from skipstone.train.validation import batches, loss_sums
from skipstone.train.watch import AGREE_EVERY

SCHEDULER = "scheduler.pt"  # Trainer's name for it


class RunTrainer(RoutingTrainer):
    """The trainer of `skipstone train`, with exact resuming, its own validation and atomic checkpoints.

    recipe: the training options. data: rows for training and validation. alone: the trained model, unsharded in the
    first process, which `leave_to_first` sets once training is over; None before. Further arguments are Trainer's.
    """

    alone: SkipstoneForCausalLM | None = None  # the whole model, once the first process works alone

    def __init__(self, *, recipe: TrainConfig, data: PreparedData, **kwargs: object) -> None:
        super().__init__(train_dataset=data.train, eval_dataset=data.validation, data_collator=data.collate, **kwargs)
        # Trainer then neither wraps the model in DDP nor shards it again. Set earlier, it would refuse to save.
        self.is_distributed_loading_by_transformers = parallel.is_sharded(self.model)
        self.recipe, self.data = recipe, data
        self.loss_chunk = recipe.loss_chunk_of(self._plain.config.vocab_size)
        self.window = LogWindow(self.args.device)
        self.meter = RecordMeter()
        self.obstacle = causal_obstacle(self._plain.routing_modules())
        self.seed_of_step: tuple[int, Tensor] | None = None  # the step, and the seed of its random numbers
        self.part = 0  # the micro-batch of the present step
        self.looked_at = 0  # the step whose numbers are watched now
        self.add_callback(SameState(recipe.compare_every))
        self.average = TailAverage(recipe.averaged_steps) if recipe.averaged_steps else None
        if self.average is not None:
            self.add_callback(self.average)
        self.guard, self.routers = self._guard(), self._router_watch()
        self.routing.saves_whole_model = True  # its checkpoints contain adapters with their model

    def _guard(self) -> FiniteGuard:
        state, args = self.accelerator, self.args
        turns = RowTurns(
            rows=args.per_device_train_batch_size,
            parts=args.gradient_accumulation_steps,
            rank=state.process_index,
            count=state.num_processes,
        )
        places = [module.placement for module in self._plain.routing_modules()]
        names = [f"block {place.layer} {place.name}" for place in places]
        folder = Path(args.output_dir).parent
        return FiniteGuard(names, turns, folder, self.recipe.max_skipped_steps, state.gather)

    def _router_watch(self) -> RouterWatch | None:
        """Return what watches the routers; None if they do not decide in this training, or there are none."""
        if self.recipe.routing != "learned" or not any(True for _ in self._plain.routing_modules()):
            return None

        def largest(value: Tensor) -> Tensor:
            return self.accelerator.gather(value[None]).max()  # type: ignore[no-any-return]

        def forward(**inputs: object) -> Any:
            return (self.model if parallel.is_sharded(self.model) else self._plain)(**inputs)

        main = self.accelerator.process_index == 0
        return RouterWatch(self._plain, forward, self.recipe.steps, self._summed, largest, main)

    # Rows are read in order: each is already a random draw from (seed, index), so a step's rows follow from its number.
    def _get_train_sampler(self, train_dataset: Sized | None = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters of `model` with weight decay, according to the recipe's `no_decay`."""
        return decaying(model, (name for name, _ in model.named_parameters()), self.recipe.no_decay)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build Trainer's optimizer for `model`, with a separate learning rate for routers if the recipe sets one."""
        built, rate = super().create_optimizer(model), self.recipe.router_learning_rate
        if rate is not None and not any("own_rate" in group for group in built.param_groups):
            groups = with_router_rate(built.param_groups, self._plain, rate)
            built.param_groups[:] = [{**group, "own_rate": group["lr"] == rate} for group in groups]
        return built

    def floating_point_ops(self, inputs: PlainDict) -> int:
        """Return 0 for any `inputs`: Trainer's estimate would count a routed model as dense."""
        return 0

    def compute_loss(self, model: nn.Module, inputs: PlainDict, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Return the loss of the micro-batch `inputs` by `model`, with `return_outputs` (loss, outputs), and log it."""
        routing = {} if self.recipe.routing == "learned" else {"routing": self._forced(inputs)}
        asked = {"loss_chunk": self.loss_chunk, **inputs, **routing}
        with self._noise_of_step(len(inputs["input_ids"])):
            loss, outputs = super().compute_loss(model, asked, return_outputs=True, **kwargs)
        loss = self.objective(loss, outputs, inputs, kwargs.get("num_items_in_batch"))
        self._look_at(loss, inputs, outputs["records"])
        self.window.add(outputs["token_loss"], outputs["auxiliary_loss"], self._tokens(inputs))
        if self._logs_this_step():
            self.meter.add(self._plain.routing_modules(), outputs["records"])
        return (loss, outputs) if return_outputs else loss

    def _look_at(self, loss: Tensor, inputs: PlainDict, records: Any) -> None:
        """Show a micro-batch to the check for numbers that are not finite, and to the router watch."""
        step = self.state.global_step + 1
        begins = self.looked_at != step
        if begins:
            self.looked_at = step
            self.window.begin_step()
        self.guard.add(step, loss, records)
        if begins and self.routers is not None:
            self.routers.see(step, inputs, records)

    def _noise_of_step(self, rows: int) -> contextlib.AbstractContextManager[None]:
        """Return a context manager for a micro-batch whose random numbers depend on rows' places in the optimizer step.

        They are then the same however a step is divided into micro-batches and processes. rows: rows of the
        micro-batch. With one micro-batch and one process, nothing is changed: the model draws its own seed.
        """
        count = self.accelerator.num_processes
        if count == 1 and self.recipe.gradient_accumulation == 1:
            return contextlib.nullcontext()
        decoder, step, device = self._plain.model, self.state.global_step, self.args.device
        if self.seed_of_step is None or self.seed_of_step[0] != step:
            draws = count > 1 or any(True for _ in self._plain.routing_modules())
            self.seed_of_step = (step, draw_seed(device) if draws else torch.zeros((), dtype=torch.long, device=device))
            self.part = 0
        rank, seed = self.accelerator.process_index, self.seed_of_step[1]
        first = (self.part * count + rank) * rows
        decoder.step_noise = (seed, torch.tensor(first, device=device))
        self.part += 1
        return contextlib.nullcontext() if count == 1 else parallel.own_dropout(seed, rank, self.part, device)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            parallel.complete_gradients(self._plain)
        if self.is_distributed_loading_by_transformers and self.accelerator.sync_gradients:
            parallel.average_gradients(parallel.replicated(self.model))
        if self.routers is not None:
            self.routers.after_backward(self.state.global_step + 1)
            parallel.forget_gathered(self.model)
        return loss

    # What Trainer does for a model that was sharded before it: it needs no settings of transformers for it here.
    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Do nothing: processes begin alike, and `training_step` averages the gradients that FSDP2 does not manage."""

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        model: Any = self.model
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return parallel.full(super()._clip_grad_norm(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient norm; None if the step is skipped because its numbers are not finite (`FiniteGuard`)."""
        norm = parallel.full(super()._get_grad_norm(model, grad_norm))
        self.guard.add_gradient(norm)
        waits = self.args.device.type != "cpu" and not self.recipe.max_skipped_steps
        if waits and (self.state.global_step + 1) % AGREE_EVERY:
            return norm  # an accelerator is only waited for now and then
        if not self.guard.settle(may_skip=True):
            return norm
        self._forget_step(model)
        return None

    def _forget_step(self, model: nn.Module) -> None:
        """Drop the current step's gradients, log sums and routing statistics, so that it changes nothing."""
        for parameter in model.parameters():
            parameter.grad = None  # the optimizer passes over parameters without a gradient
        self.routing.forget()
        self.meter = RecordMeter()
        self.window.skip_step()

    def _tokens(self, inputs: PlainDict) -> int:
        """Return the number of tokens of a micro-batch over all processes, which have rows of equal length."""
        return int(inputs["input_ids"].numel()) * self.accelerator.num_processes

    def objective(self, loss: Tensor, outputs: CausalLMOutput, inputs: PlainDict, items: Tensor | int | None) -> Tensor:
        """Return the loss to minimise, a scalar tensor; by default `loss` unchanged, but subclasses may override it.

        loss: the model's own loss. outputs: the model's output; overrides must keep its losses correct for the log.
        inputs: the micro-batch, by name. items: number of predicted tokens in the whole optimizer step, by which sums
        are divided to give means; None if it is not known.
        """
        return loss

    @property
    def _plain(self) -> SkipstoneForCausalLM:
        return self.alone or self.accelerator.unwrap_model(self.model)

    def leave_to_first(self) -> SkipstoneForCausalLM:
        """Return the trained model, unsharded in the first process, which works alone from now on.

        All processes must call it; the others get their own (possibly sharded) model.
        """
        found = parallel.whole_model(self._plain) if parallel.is_sharded(self.model) else self._plain
        self.alone = found or self._plain
        return self.alone

    def _forced(self, batch: Row) -> dict[int, Tensor]:
        """Return bool masks [B, T] by block that keep exactly the tokens known to need depth (`difficulty` >= 0)."""
        return forced_routing(self._plain, batch["difficulty"] >= 0)

    def _logs_this_step(self) -> bool:
        step = self.state.global_step + 1
        return step in (1, self.state.max_steps) or step % self.recipe.log_every == 0

    # --- logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log Trainer's figures with exact training losses: means since the last log line, also across a resumption.

        Nothing is logged for Trainer's closing summary, or for losses if every step since that line was skipped.
        logs: figures by name; the losses among them are replaced. start_time: passed on to `Trainer.log`.
        """
        if "train_runtime" in logs:
            return  # Trainer's closing summary; result.json has ours
        if "loss" in logs:
            if self.window.only_skipped(self.state.global_step):
                return  # there is nothing to say of steps that were skipped
            logs = {**logs, **self._window_logs()}
        super().log(logs, start_time)

    def _window_logs(self) -> dict[str, float]:
        """Return the figures since the last log line, and begin a new window."""
        window = self.window
        steps = self.state.global_step - window.began - window.skipped
        token_loss, auxiliary_loss = (self.accelerator.reduce(window.sums, "sum") / max(steps, 1)).tolist()
        logs = {"loss": token_loss + auxiliary_loss, "token_loss": token_loss, "auxiliary_loss": auxiliary_loss}
        if window.seconds:
            logs["tokens_per_second"] = window.tokens / window.seconds
        if window.skipped:
            logs["skipped_steps"] = window.skipped
        logs |= self.meter.read(self._summed) | moving(self._plain.routing_modules())
        window.clear(self.state.global_step)
        return logs

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Tensor | float | None, *args: object, **kwargs: object
    ) -> None:
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            if self.args.device.type == "cuda":
                torch.cuda.synchronize()  # queued work belongs to the training time
            self.guard.settle()
            with self.window.paused():
                super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _summed(self, values: Tensor) -> Tensor:
        """Return values summed over all processes that train together; a process that works alone keeps its own."""
        return values if self.alone is not None else self.accelerator.reduce(values, "sum")

    # --- validation

    def evaluate(self, *args: object, **kwargs: object) -> dict[str, float]:
        """Return the validation losses in nats per token, without torch.compile.

        `eval_oracle_loss` is measured with the routing of training, which may look at later tokens of a row. If the
        model can also decide without them, as in generation, `eval_causal_loss` is the loss of such a pass, and entries
        such as `eval_capacity/3/mod` are the shares of tokens kept in that pass, here by the mechanism `mod` of block
        3. Arguments are ignored.
        """
        model: Any = self.alone or self.model
        was_training = model.training
        model.eval()
        with torch.compiler.set_stance("force_eager"):  # validation passes are not worth compiling
            metrics = {"eval_oracle_loss": self._validation_loss("oracle", RecordMeter())}
            if self.obstacle is None:
                meter = RecordMeter()
                metrics["eval_causal_loss"] = self._validation_loss("causal", meter)
                metrics |= {f"eval_{name}": value for name, value in meter.read(self._summed).items()}
        model.train(was_training)
        self.log(metrics)
        handler = self.callback_handler
        self.control: Any = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _validation_loss(self, routing: str, meter: RecordMeter) -> float:
        forced = self.recipe.routing == "difficulty"
        size = self.recipe.eval_batch_size or self.args.per_device_train_batch_size
        together = self.alone is None
        part, parts = (self.accelerator.process_index, self.accelerator.num_processes) if together else (0, 1)
        rows = batches(self.data, self.recipe.eval_rows, size, part, parts)
        chosen = self._forced if forced else lambda _: routing
        sums = loss_sums(self.alone or self.model, rows, chosen, self.args.device, meter, self.loss_chunk)
        loss, count = self._summed(sums).tolist()
        if not math.isfinite(loss) and together:
            step = self.state.global_step
            raise NotFinite(
                f"the {routing} validation loss is not finite after step {step}; {self.guard.good_checkpoint()}"
            )
        return float(loss / count)

    # --- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: PlainDict | None = None) -> None:
        if not parallel.is_sharded(self.model):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            self._plain.config.save_pretrained(output_dir or self.args.output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not parallel.is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        sharded.save(Path(output_dir) / sharded.SHARDS, self.model, self.optimizer)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        shards = Path(resume_from_checkpoint) / sharded.SHARDS
        if parallel.is_sharded(self.model) != shards.is_dir():
            written = "fsdp2" if shards.is_dir() else "ddp"
            raise ValueError(f"checkpoint {resume_from_checkpoint!r} was written with train.parallel={written}")
        if parallel.is_sharded(self.model):
            sharded.load_model(shards, self.model)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.average is not None:
            self.average.load(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not parallel.is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        sharded.load_optimizer(Path(checkpoint) / sharded.SHARDS, self.model, self.optimizer)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or not restore_other(Path(checkpoint), self.args.process_index, self.args.world_size):
            super()._load_rng_state(checkpoint)

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
        """Add what Trainer does not save and all files' hashes to the folder `partial`, and rename it to `final`."""
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle that we never read
        self.window.save(partial, sums, count_lines(final.parent.parent / METRICS))
        if self.average is not None:
            self.average.save(partial)
        checksums.record(partial)
        atomic_write.replace_folder(partial, final)
