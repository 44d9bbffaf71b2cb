"""A study of whether a Mixture-of-Depths training step takes less time in proportion to its fewer FLOPs.

Time and FLOPs of a step (forward, backward and AdamW) are divided by those of the dense model. FLOPs are counted while
the step runs, without the optimizer, which has no matrix products. The way "bf16" of running a step is autocast with
fp32 weights, as `Trainer` does it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.core.records import Records
from skipstone.core.strict import PlainDict
from skipstone.measure.flops import count_flops, count_host_syncs
from skipstone.train import RoutingTrainer
from skipstone_studies.speed.interleaved import time_ratio
from skipstone_studies.study import Column, Figures, RecipeDict, Study

CAPACITY = 0.125
MOVING = ("ema_threshold",)
TRAINER = "RoutingTrainer, fp32"
STEP_KINDS = ("fp32", "bf16", TRAINER)
SMALL = {"width": 128, "blocks": 6, "context": 256, "rows": 8, "limit": 1.10, "rounds": 15, "trainer_steps": 16}
LARGE = {"width": 512, "blocks": 12, "context": 1024, "rows": 4, "limit": 1.02, "rounds": 3, "trainer_steps": 2}
SIZES: tuple[tuple[PlainDict, tuple[str, ...]], ...] = (
    (SMALL, ("topk", "predictor", "ema_threshold")),
    ({**SMALL, "rows": 32, "rounds": 9}, ("topk",)),
    (LARGE, ("topk", "ema_threshold")),
)


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the settings of every timing by its name: one for each model size, routing decision and way to run a step.

    Each is a dict that `measured` takes. The ways, `STEP_KINDS`, are "fp32", "bf16" (autocast) and "RoutingTrainer,
    fp32", a few steps by our trainer. scale: not used.
    """
    return {
        name_of(size, decision, way): {**size, "decision": decision, "way": way}
        for size, decisions in SIZES
        for decision in decisions
        for way in STEP_KINDS
    }


def name_of(size: PlainDict, decision: str, way: str) -> str:
    """Return the name under which the table shows the timing of a Mixture-of-Depths training step.

    size: a mapping with the keys "width", "rows" and "context". decision: name of the router's decision, such as
    "topk". way: how the step is run, such as "fp32".
    """
    return f"d {size['width']}, {size['rows']} rows of {size['context']}, {decision}, {way}"


def model_of(size: RecipeDict, decision: str | None) -> SkipstoneForCausalLM:
    """Build a model with random weights whose every second block is routed, or a dense model.

    size: a mapping with the keys "width", "blocks" and "context" (largest number of tokens of a row). decision: how its
    Mixture-of-Depths routers choose tokens, such as "topk"; None means a dense model.
    """
    mod = {"name": "mixture_of_depths", "layers": "1::2", "capacity": CAPACITY, "decision": decision}
    torch.manual_seed(0)
    config = SkipstoneConfig(
        vocab_size=256,
        hidden_size=size["width"],
        num_hidden_layers=size["blocks"],
        num_attention_heads=max(1, size["width"] // 64),
        max_position_embeddings=size["context"],
        mechanisms=[mod] if decision else [],
    )
    return SkipstoneForCausalLM(config).train()


def ids_of(size: RecipeDict) -> torch.Tensor:
    """Return random token ids, int64 [rows, context].

    size: a mapping with the keys "rows" and "context".
    """
    return torch.randint(0, 256, (size["rows"], size["context"]), generator=torch.Generator().manual_seed(0))


def training_step(model: SkipstoneForCausalLM, ids: torch.Tensor, bf16: bool) -> Callable[[], None]:
    """Return a function that runs one training step: forward, backward, AdamW, and the update of routing thresholds.

    model: the model, which is changed by the step. ids: token ids, int64 [rows, context], which are also the labels.
    bf16: whether the forward pass runs under autocast.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            out = model(ids, labels=ids, use_cache=False, output_records=True)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        advance(model, out.records)

    return step


def advance(model: SkipstoneForCausalLM, records: Sequence[Records]) -> None:
    """Update the routing thresholds of a model after a training step, as if half of the training were done.

    records: what each mechanism decided in the step, one dict by name for each block.
    """
    blocks = model.model.layers
    for block, record in zip(blocks, records, strict=True):
        for name, mechanism in block.routing_modules().items():
            mechanism.advance(0.5, mechanism.statistics(record[name]))


class Repeated(Dataset[dict[str, torch.Tensor]]):
    """A dataset that has the rows `ids`, int64 [rows, tokens], `times` times one after the other.

    An item is {"input_ids", "labels"}, both the same row.
    """

    def __init__(self, ids: torch.Tensor, times: int) -> None:
        self.ids, self.times = ids, times

    def __len__(self) -> int:
        return len(self.ids) * self.times

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        row = self.ids[at % len(self.ids)]
        return {"input_ids": row, "labels": row}


def trainer_steps(model: SkipstoneForCausalLM, size: RecipeDict, folder: str) -> Callable[[], None]:
    """Return a function that trains for a few steps by `RoutingTrainer`, our subclass of transformers' Trainer.

    Each call sets up a new trainer, which takes part of its time. model: the model to train. size: a mapping with the
    keys "rows", "context" and "trainer_steps", the number of steps. folder: for Trainer's output.
    """
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=size["trainer_steps"],
        per_device_train_batch_size=size["rows"],
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = Repeated(ids_of(size), size["trainer_steps"])

    def steps() -> None:
        RoutingTrainer(model=model, args=arguments, train_dataset=rows).train()

    return steps


def measured(recipe: RecipeDict) -> Figures:
    """Time a Mixture-of-Depths training step in turns with the dense model's, and count the FLOPs of both.

    recipe: an entry of `arms`, with sizes, "decision", "way" (the kind of step), "limit" and "rounds". Keys of the
    result: `flops` and `time`, those of the routed step divided by those of the dense one (time as {"median", "min",
    "max"} over rounds); `limit`, the largest accepted ratio of time to FLOPs; `host_syncs`, how often the host waits
    for the device in a forward pass; and `over`, the median time / flops, absent if every step keeps another number of
    tokens.
    """
    ids, decision, way = ids_of(recipe), recipe["decision"], recipe["way"]
    ours, theirs = (training_step(model_of(recipe, kind), ids, way == "bf16") for kind in (decision, None))
    ours()  # the first step sets the threshold
    flops = count_flops(ours).total / count_flops(theirs).total
    if way == TRAINER:
        with tempfile.TemporaryDirectory() as folder:
            runs = [trainer_steps(model_of(recipe, kind), recipe, folder) for kind in (decision, None)]
            time = time_ratio(runs[0], runs[1], max(recipe["rounds"] // 2, 2))
    else:
        time = time_ratio(ours, theirs, recipe["rounds"])
    syncs = count_host_syncs(lambda: model_of(recipe, decision)(ids, labels=ids, use_cache=False)).total()
    return figures(decision, flops, time, recipe["limit"], syncs)


def figures(decision: str, flops: float, time: dict[str, float], limit: float, syncs: int) -> Figures:
    """Return the figures that are recorded of one timing of a Mixture-of-Depths training step.

    decision: how its routers choose tokens, such as "topk". flops: FLOPs of a step divided by the dense model's. time:
    seconds of a step divided by the dense model's, as {"median", "min", "max"} over rounds. limit: the largest accepted
    ratio of time to FLOPs. syncs: number of times that the host waits for the device in a forward pass. Keys of the
    result: `flops`, `time` and `limit` as given, `host_syncs` (`syncs`), and `over`, the median time divided by the
    FLOPs. `over` is absent for a decision that keeps another number of tokens in every step.
    """
    over = {} if decision in MOVING else {"over": time["median"] / flops}
    return {"flops": flops, "time": time, **over, "limit": limit, "host_syncs": syncs}


MOD_TRAINING = Study(
    name="mod_training",
    purpose="Mixture-of-Depths: does the time of a training step fall with its FLOPs?",
    about=(
        "**Random weights and tokens.** *Time* is the time of a training step (forward, backward, AdamW) relative to "
        "the dense model of the same size, interleaved; *FLOPs* are the FLOPs that the step executes, relative to the "
        f"dense step. Every other block is routed, with capacity {CAPACITY}. *Target* is the largest ratio of time to "
        "FLOPs that we accept. AdamW and the casts of the weights to bf16 cost the same in both models however much "
        "is skipped, and their share of the time is larger the fewer tokens a step has. `ema_threshold` keeps a "
        "different number of tokens in every step until its threshold has settled; its FLOPs are those of a single "
        "step, so its time cannot be divided by them."
    ),
    arms=arms,
    seeds={"laptop": (0,)},
    clock=measured,
    columns=(
        Column(key="flops", title="FLOPs"),
        Column(key="time", title="time (min to max)", spread=True),
        Column(key="over", title="time / FLOPs", format=".2f"),
        Column(key="limit", title="target", format=".2f"),
        Column(key="host_syncs", title="host syncs", format="d"),
    ),
)
