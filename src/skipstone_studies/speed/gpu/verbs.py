"""Part of the GPU study: train, resume, evaluate and generate by the functions behind the commands of these names."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from skipstone.core.strict import PlainDict, PlainMapping
from skipstone.evaluate.evaluation import evaluate
from skipstone.generate.text_generation import stream_text
from skipstone.runs import Run
from skipstone.train.training import train
from skipstone_studies.speed.gpu.bench import RIGHT, WRONG, Bench

EQUAL = 1e-5  # nats between losses of one process and of a group of one that shards the model, in fp32
MECHANISMS: list[PlainDict] = [
    {"name": "mixture_of_depths", "layers": "1::2", "capacity": 0.5, "decision": "ema_threshold"},
    {"name": "token_selective", "layers": [1], "training": "hard", "capacity": 0.5, "guidance": True},
    {"name": "early_exit", "layers": "1:"},
]
MODELS: dict[str, PlainDict] = {
    "dense": {},
    "top-k": {"mechanisms": [{"name": "mixture_of_depths", "layers": "1::2", "decision": "topk"}]},
    "all": {"mechanisms": MECHANISMS, "activation": "polyglu"},
}


class Stopped(Exception):
    """Raised to interrupt a training after a given step."""


class StopAt(TrainerCallback):
    """A callback that interrupts a training, by raising `Stopped`, after optimizer step `step`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step == self.step:
            raise Stopped


def measure(bench: Bench) -> None:
    """Train small models in four ways, then evaluate the fp32 run of each and generate text with it.

    The ways are fp32, FSDP2 with one process, interrupted and resumed, and bf16. bench: gives the device and the sizes,
    and stores for every model the figures of each way, and of its fp32 run the validation loss and the number of pieces
    in which `stream_text` yielded the generated text (none for a model whose decisions need later tokens).
    """
    for name in bench.sizes["models"]:
        with tempfile.TemporaryDirectory() as folder:
            root, plain = Path(folder), recipe(bench, MODELS[name])
            bench.measure(f"{name}, fp32", plainly, plain, root)
            bench.measure(f"{name}, FSDP2", sharded, plain, root)
            bench.measure(f"{name}, resumed", resumed, plain, root)
            bench.measure(f"{name}, bf16", in_bf16, plain, root)
            bench.measure(f"{name}, evaluated and written", used, root / "whole")


def recipe(bench: Bench, model: PlainMapping) -> PlainDict:
    """Return the recipe of a small model on the source files of Python's library, which every machine has.

    bench: gives the sizes and the number of steps. model: options of the model, added to those of the bench.
    """
    train_options = {
        "batch_size": 4,
        "learning_rate": 1e-3,
        "eval_every": 0,
        "eval_rows": 8,
        "log_every": 1,
        "save_every": max(bench.sizes["steps"] // 2, 1),
        "steps": bench.sizes["steps"],
    }
    data = {"corpus": "python-stdlib", "tokenizer": "byte", "context": bench.sizes["context"], "validation_rows": 8}
    return {"model": {**bench.sizes["model"], **model}, "data": data, "train": train_options}


def _train(plain: PlainDict, root: Path, name: str, **options: object) -> Path:
    return train({**plain, "train": {**plain["train"], **options}}, out=root / name, progress=False)


def losses(folder: Path) -> list[float]:
    """Return the training loss of every step of the run in `folder`, in nats per token."""
    return [float(line["loss"]) for line in Run(folder).metrics() if line["split"] == "train"]


def figures(folder: Path) -> PlainDict:
    """Return figures of a finished run: `first_loss` and `last_loss` of training, and `tokens_per_second`.

    folder: the run folder. Losses are in nats per token.
    """
    found, result = losses(folder), Run(folder).result()
    return {
        "first_loss": found[0],
        "last_loss": found[-1],
        "tokens_per_second": result["tokens"] / result["seconds"],
    }


def against(folder: Path, other: Path, limit: float) -> PlainDict:
    """Compare the training losses of two runs step by step, and return the figures of the first with the comparison.

    folder, other: the run folders. limit: the largest difference in nats that counts as equal. The result has
    `first_loss`, `last_loss` and `tokens_per_second` of the first, and `difference` (the largest of any step, in nats),
    `tolerance` (the limit) and `equal` (1 or 0).
    """
    pairs = zip(losses(folder), losses(other), strict=True)
    worst = max(abs(one - two) for one, two in pairs)
    return {**figures(folder), "difference": worst, "tolerance": limit, "equal": RIGHT if worst <= limit else WRONG}


def plainly(bench: Bench, plain: PlainDict, root: Path) -> PlainDict:
    """Train in fp32, and return `first_loss`, `last_loss` (nats per token) and `tokens_per_second` of the run.

    bench: not used. plain: the recipe as a dict. root: the folder in which the run folder `whole` is written.
    """
    return figures(_train(plain, root, "whole"))


def in_bf16(bench: Bench, plain: PlainDict, root: Path) -> PlainDict:
    """Train in bf16 under autocast, and return `first_loss`, `last_loss` and `tokens_per_second` of the run.

    bench: not used. Losses are in nats per token. plain: the recipe as a dict. root: the folder in which the run folder
    `bf16` is written.
    """
    return figures(_train(plain, root, "bf16", precision="bf16"))


def sharded(bench: Bench, plain: PlainDict, root: Path) -> PlainDict:
    """Train in fp32 under FSDP2 in one process, and compare the losses with those of the run that `plainly` made.

    The result has `first_loss`, `last_loss` (nats per token), `tokens_per_second`, `difference` (the largest of any
    step, in nats), `tolerance` (nats) and `equal` (1 or 0). bench: not used. plain: the recipe as a dict. root: the
    folder that holds the run of `plainly`, and in which the sharded run is written.
    """
    return against(_train(plain, root, "sharded", parallel="fsdp2"), root / "whole", EQUAL)


def resumed(bench: Bench, plain: PlainDict, root: Path) -> PlainDict:
    """Train, interrupt the training after its first checkpoint, resume it, and compare the losses with a whole run's.

    The losses have to be exactly equal on a CPU; on a GPU some sums are atomic, so their order may change the last
    bits. The result has `first_loss`, `last_loss` (nats per token), `tokens_per_second`, `difference` (the largest of
    any step, in nats), `tolerance` (nats) and `equal` (1 or 0). bench: knows the device. plain: the recipe as a dict.
    root: the folder that holds the whole run, which `plainly` made, and in which the resumed run is written.
    """
    folder = root / "resumed"
    stop = plain["train"]["save_every"] + 1
    shutil.rmtree(folder, ignore_errors=True)
    try:
        train(plain, out=folder, progress=False, callbacks=[StopAt(stop)])
    except Stopped:
        train(plain, out=folder, progress=False, resume=True)
    return against(folder, root / "whole", EQUAL if bench.on_gpu else 0.0)


def used(bench: Bench, folder: Path) -> PlainDict:
    """Evaluate the run in `folder`, and generate text if its model can decide without later tokens.

    bench: not used. folder: the run folder. Keys of the result: `evaluated_loss`, the validation loss in nats per
    token, and `pieces`, the number of pieces in which the text came, absent for a model whose decisions need later
    tokens.
    """
    found = evaluate(folder)
    loss = {"evaluated_loss": found.measured[found.primary].loss}
    if "executed" not in found.measured:
        return loss  # of decisions that rank the whole row: such a model cannot write
    return {**loss, "pieces": len(list(stream_text(folder, "def ", max_new_tokens=16, greedy=True)))}
