"""A study of whether a routed model runs the same operations, with the same shapes, for all inputs of one shape.

FLOPs, and the graphs of torch.compile, are compared as well.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.core.strict import PlainDict
from skipstone.measure.flops import count_flops
from skipstone_studies.study import Column, Figures, RecipeDict, Study

STATIC = ("topk", "threshold", "predictor", "random", "positional")
DYNAMIC = ("ema_threshold",)
INPUTS, ROWS, CONTEXT = 1000, 2, 128


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the settings of every measurement by its name: one for each decision of Mixture-of-Depths.

    Each is a dict that `measured` takes. scale: not used.
    """
    return {decision: {"decision": decision, "inputs": INPUTS} for decision in (*STATIC, *DYNAMIC)}


def measured(recipe: RecipeDict) -> Figures:
    """Measure whether a routed model has the same operations, FLOPs and compiled graphs for many inputs of one shape.

    recipe: has the keys "decision" (name of a decision of Mixture-of-Depths) and "inputs" (number of batches). Keys of
    the result: `lists`, the number of different sequences of operations and shapes; `flops`, the number of different
    FLOP counts, among a tenth of the batches; `graphs`, `recompilations` and `breaks`, the numbers of graphs that
    torch.compile makes, of batches after the first for which it compiles again, and of graph breaks.
    """
    draw, decision = torch.Generator().manual_seed(1), recipe["decision"]
    batches = [torch.randint(0, 64, (ROWS, CONTEXT), generator=draw) for _ in range(recipe["inputs"])]
    model = model_of(decision)
    passed(model, batches[0])()  # allocates the gradients
    lists = {signature(passed(model, ids)) for ids in batches}
    flops = {count_flops(passed(model, ids)).total for ids in batches[: max(len(batches) // 10, 1)]}
    return {"lists": len(lists), "flops": len(flops), **compiled(model, batches, decision in STATIC)}


def model_of(decision: str) -> SkipstoneForCausalLM:
    """Build a small model in training mode in which every second block is routed by Mixture-of-Depths.

    decision: how its routers choose tokens, such as "topk".
    """
    torch.manual_seed(0)
    mod = {"name": "mixture_of_depths", "layers": "1::2", "decision": decision}
    sizes: PlainDict = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    return SkipstoneForCausalLM(SkipstoneConfig(**sizes, mechanisms=[mod])).train()


class OperationTrace(TorchDispatchMode):
    """A context in which every torch operation that runs is hashed with its inputs' shapes, to compare two runs."""

    def __init__(self) -> None:
        super().__init__()
        self.digest = hashlib.sha256()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [tuple(x.shape) for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
        self.digest.update(f"{func} {shapes}".encode())
        return func(*args, **(kwargs or {}))


def passed(model: SkipstoneForCausalLM, ids: torch.Tensor) -> Callable[[], None]:
    """Return a function that runs a forward and a backward pass of `model` on the token ids `ids` [rows, tokens]."""

    def run() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=False)

    return run


def signature(run: Callable[[], None]) -> str:
    """Return one hash of all operations and shapes that `run` executes, which is equal for runs of the same ones."""
    with OperationTrace() as seen:
        run()
    return seen.digest.hexdigest()


def compiled(model: SkipstoneForCausalLM, batches: list[torch.Tensor], whole: bool) -> dict[str, int]:
    """Return how often torch.compile had to compile a model for forward and backward passes on batches of one shape.

    model: the model. batches: token ids, int64 [rows, tokens] each. whole: whether to require one graph without breaks
    (`fullgraph`). The result is {"graphs": number of graphs in all, "recompilations": number of batches after the first
    that caused one, "breaks": number of graph breaks}.
    """
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # silences graph breaks, which are counted here
    torch._dynamo.reset()
    counters.clear()
    forward = torch.compile(model, backend="aot_eager", fullgraph=whole)
    late, before = 0, 0
    for i, ids in enumerate(batches):
        forward(ids, labels=ids, use_cache=False).loss.backward()
        now = counters["stats"]["unique_graphs"]
        late += i > 0 and now > before
        before = now
    return {"graphs": before, "recompilations": late, "breaks": sum(counters["graph_break"].values())}


STATIC_GRAPH = Study(
    name="static_graph",
    purpose="Is the routed graph static? Operations, FLOPs and compilations over many inputs",
    about=(
        f"**Random weights and tokens.** {INPUTS:,} training passes (forward and backward) over different inputs of "
        f"{ROWS} rows of {CONTEXT} tokens, through a small decoder in which every other block is routed at capacity "
        "0.125. *Operations and shapes* and *FLOPs* give the number of distinct sequences and counts among the "
        "inputs; FLOPs are counted for a tenth of them. *Graphs* are those that `torch.compile` makes of the whole "
        "forward pass. `ema_threshold` decides in training as in generation: the number of tokens that it keeps "
        "depends on the input, so its shapes do too, and its capacity is met on average (`skipstone eval` reports *99 "
        "% of rows keep at most*)."
    ),
    arms=arms,
    seeds={"laptop": (0,)},
    clock=measured,
    columns=(
        Column(key="lists", title="operations and shapes", format=",d"),
        Column(key="flops", title="FLOPs", format=",d"),
        Column(key="graphs", title="graphs", format=",d"),
        Column(key="recompilations", title="recompilations after the first", format=",d"),
        Column(key="breaks", title="graph breaks", format=",d"),
    ),
)
