"""A study of training steps of the PolyGLU model with 597,153,888 parameters: memory, seconds, FLOPs.

Model, optimizer, its groups, clipping, autocast and chunked loss are those of recipes/polychromatic-0.6b.yaml, at the
learning rate after its warm-up. The first step allocates memory, so times are those of the last. Weights, gradients and
both moments are fp32.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from skipstone.core.strict import PlainDict
from skipstone.measure.speed import finish
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.train import setup
from skipstone.train.decay import decaying
from skipstone.train.recipe import Recipe, read_recipe
from skipstone_studies.speed.resident import resident_peak
from skipstone_studies.study import Column, Figures, RecipeDict, Study

POLYGLU = {"name": "polyglu", "context": "running_mean", "tau_start": 1.0, "tau_end": 0.1}
RECIPE: RecipeDict = {
    "model": {"preset": "polychromatic-0.6b", "activation": POLYGLU},
    "data": {"corpus": "shards:shards", "context": 4096},
    "train": {
        "steps": 19531,
        "batch_size": 1,
        "learning_rate": 1e-4,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "max_grad_norm": 1.0,
        "precision": "bf16",
        "loss_chunk": 1024,
    },
}
PARTS = ("forward", "backward", "optimizer")


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return {name: recipe} with the only recipe of the study.

    It has the sections model, data and train, and the keys `tokens` (of the one row of a step) and `steps` (their
    number). scale: not used.
    """
    return {"256 tokens": {**RECIPE, "tokens": 256, "steps": 2}}


def measured(recipe: RecipeDict) -> Figures:
    """Run the recipe's number of training steps, on a GPU if there is one, and return what they took.

    recipe: the sections model, data and train, `tokens` (of the one row of a step) and `steps` (their number). Keys of
    the result: `parameters` and `routing` (numbers of all parameters and of PolyGLU's routers), `uniform_loss` (loss of
    a uniform prediction in nats), `first` and `last` (`loss` and `gradient_norm` of these steps, and the `seconds` of
    the last one, {"forward", "backward", "optimizer"}), `peak_gb` (peak memory), `flops` (of a step, by the cost
    model), `flops_per_second` (of the last step's forward and backward pass) and `tokens_per_second` (of the whole last
    step). Seconds are wall time on a GPU and CPU time elsewhere, which other processes disturb less.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    read = read_recipe({name: recipe[name] for name in ("model", "data", "train")})
    config = setup.model_config(read.model, read.data.context, {})
    with torch.device(device):
        model = setup.build_model(config, read.train).train()
    given, optimizer = row(recipe["tokens"], config.vocab_size, device), optimizer_of(model, read)
    steps = [step(model, optimizer, given, read, device) for _ in range(recipe["steps"])]
    flops, taken = model.cost(tokens=recipe["tokens"], routing="oracle").training.total, steps[-1]["seconds"]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "routing": sum(p.numel() for m in model.routing_modules() for p in m.parameters()),
        "uniform_loss": math.log(config.vocab_size),
        "first": {"loss": steps[0]["loss"], "gradient_norm": steps[0]["gradient_norm"]},
        "last": steps[-1],
        "peak_gb": (torch.cuda.max_memory_allocated() if device == "cuda" else resident_peak()) / 1e9,
        "flops": flops,
        "flops_per_second": flops / (taken["forward"] + taken["backward"]),
        "tokens_per_second": recipe["tokens"] / sum(taken.values()),
    }


def row(tokens: int, vocabulary: int, device: str) -> dict[str, Tensor]:
    """Return a batch of one packed row: two documents of random tokens, the first a third of the row.

    The keys are input_ids, labels (-100 at the first token of a document), document_ids and position_ids, int64 [1,
    tokens] each. tokens: length of the row. vocabulary: ids are below it. device: where the tensors are created.
    """
    slot = torch.arange(tokens)
    document = (slot >= tokens // 3).long()
    ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill((slot == 0) | (slot == tokens // 3), -100)
    given = {"input_ids": ids, "labels": labels, "document_ids": document[None]}
    given["position_ids"] = (slot - document * (tokens // 3))[None]
    return {name: tensor.to(device) for name, tensor in given.items()}


def optimizer_of(model: SkipstoneForCausalLM, recipe: Recipe) -> torch.optim.Optimizer:
    """Build AdamW for a model with the learning rate, betas and weight decay of a recipe.

    recipe: the parsed recipe. Its weight decay applies to all parameters but the kinds (such as norms) that
    `train.no_decay` names.
    """
    train, named = recipe.train, dict(model.named_parameters())
    decays = set(decaying(model, named, train.no_decay))
    groups = [
        {"params": [p for n, p in named.items() if n in decays], "weight_decay": train.weight_decay},
        {"params": [p for n, p in named.items() if n not in decays], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=(train.beta1, train.beta2))


def step(
    model: SkipstoneForCausalLM, optimizer: torch.optim.Optimizer, given: dict[str, Tensor], recipe: Recipe, device: str
) -> PlainDict:
    """Run one training step in bf16 under autocast, and return its loss, gradient norm and seconds.

    given: the batch, the model's inputs by name. recipe: determines the gradient clipping and the chunks of the loss.
    device: "cuda" or "cpu". The result is {"loss": nats per token, "gradient_norm": before clipping, "seconds":
    {"forward", "backward", "optimizer"}}.
    """
    at = [_now(device)]
    with torch.autocast(device, torch.bfloat16):
        loss = model(**given, use_cache=False, loss_chunk=recipe.train.loss_chunk or 0).loss
    at.append(_now(device))
    loss.backward()
    at.append(_now(device))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.train.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    at.append(_now(device))
    taken = {name: b - a for name, a, b in zip(PARTS, at, at[1:], strict=False)}
    return {"loss": loss.item(), "gradient_norm": norm.item(), "seconds": taken}


def _now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    finish(torch.device(device))
    return time.perf_counter()


FULL_SIZE = Study(
    name="full_size",
    purpose="Training steps of the whole 597M-parameter PolyGLU model: memory, seconds, FLOPs",
    about=(
        "**Random weights, one row of random tokens that repeats**, so the loss must fall (uniform: 11.929). This "
        "shows that the model fits and how fast it trains, not what it learns. Two steps as in the recipe, in bf16 "
        "under autocast; CPU seconds are those of the last step. FLOPs come from the cost model, forward and "
        "backward; tokens/s include the optimizer."
    ),
    arms=arms,
    seeds={"laptop": (0,)},
    clock=measured,
    columns=(
        Column(key="parameters", title="parameters", format=",d"),
        Column(key="routing", title="of these, routing", format=",d"),
        Column(key="first.loss", title="loss, first step"),
        Column(key="last.loss", title="last step"),
        Column(key="first.gradient_norm", title="gradient norm, first step", format=".2f"),
        Column(key="last.gradient_norm", title="last step", format=".2f"),
        *(Column(key=f"last.seconds.{part}", title=f"{part}, CPU s", format=".1f") for part in PARTS),
        Column(key="peak_gb", title="peak memory, GB", format=".1f"),
        Column(key="flops", title="FLOPs per step", format=".3g"),
        Column(key="flops_per_second", title="FLOPs/s", format=".3g"),
        Column(key="tokens_per_second", title="tokens/s", format=".1f"),
    ),
)
