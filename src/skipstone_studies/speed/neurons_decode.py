"""A study of decoding one row with a part of the neurons, whose weights are read in place or copied first.

Its speed is compared with that of the dense model, which multiplies all neurons.
"""

from __future__ import annotations

from unittest.mock import patch

import torch

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.core.strict import PlainDict
from skipstone.measure.speed import Lap, Task, decode_task, take_turns
from skipstone.ops import decode_stack, magnitude
from skipstone_studies.speed.interleaved import ratio
from skipstone_studies.study import Column, Figures, RecipeDict, Study

SHAPES: dict[str, dict[str, int]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "d2048": {  # 4 of the 24 blocks of a model with 1.2 billion parameters
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 8192,
    },
}
PARTS = ((0.82, 0.66), (0.66, 0.5), (0.5, 0.34))  # shares of the neurons, for up and for down
DTYPES = ("float32", "bfloat16")
PROMPT, STEPS, TURNS = 32, 32, 7


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the settings of every timing by its name: three pairs of shares for each model shape and weight dtype.

    Each is a dict that `measured` takes. A pair is the shares of neurons for which the up and the down projection are
    multiplied. scale: not used.
    """
    timing = {"prompt": PROMPT, "steps": STEPS, "turns": TURNS}
    return {
        name_of(shape, dtype, up, down): {"shape": sizes, "dtype": dtype, "up": up, "down": down, **timing}
        for shape, sizes in SHAPES.items()
        for dtype in DTYPES
        for up, down in PARTS
    }


def name_of(shape: str, dtype: str, up: float, down: float) -> str:
    """Return the name under which the table shows the timing of decoding with a part of the neurons.

    shape: name of the model's shape. dtype: dtype of the weights. up, down: shares of the neurons for which the up and
    the down projection are multiplied.
    """
    return f"{shape}, {dtype}, {up:.2f} and {down:.2f}"


def model_of(recipe: RecipeDict, groups: PlainDict | None) -> SkipstoneForCausalLM:
    """Build a model with random weights and a tied output head.

    recipe: its "shape" has fields of SkipstoneConfig, "dtype" is the name of the weights' dtype. groups: options of
    neuron groups, which switch neurons off; None means a dense model.
    """
    torch.manual_seed(0)
    config = SkipstoneConfig(**recipe["shape"], tie_word_embeddings=True, neuron_groups=groups)
    return SkipstoneForCausalLM(config).to(getattr(torch, recipe["dtype"])).eval()


def copied(task: Task) -> Task:
    """Return a function that runs `task` without loops compiled by numba, so that chosen weight rows are copied first.

    task: a function that times decoding once and returns a `Lap`; so does the result.
    """

    def lap() -> Lap:
        with patch.object(magnitude, "_kernels", lambda: None), patch.object(decode_stack, "MOST_TOKENS", 0):
            return task()

    return lap


def measured(recipe: RecipeDict) -> Figures:
    """Time decoding with a part of the neurons, in turns with the dense model.

    recipe: an entry of `arms`. Keys of the result: `flops`, the FLOPs of a step divided by those of the dense model;
    `place` and `copy`, tokens per second divided by those of the dense model, if the chosen neurons' weights are read
    in place and if they are copied first, as {"median", "min", "max"} over timings.
    """
    groups = {"decision": "magnitude", "group_size": 1, "capacity": recipe["up"], "down_capacity": recipe["down"]}
    dense, model = model_of(recipe, None), model_of(recipe, groups)
    prompt = torch.arange(recipe["prompt"])[None] * 37 % recipe["shape"]["vocab_size"]
    tasks = {name: decode_task(of, prompt, recipe["steps"]) for name, of in (("dense", dense), ("place", model))}
    rates = take_turns({**tasks, "copy": copied(tasks["place"])}, recipe["turns"])
    past = recipe["prompt"] + recipe["steps"] // 2
    flops = [of.cost(tokens=1, past=past).forward.total for of in (model, dense)]
    speeds = {way: ratio(rates[way].each, rates["dense"].each) for way in ("place", "copy")}
    return {"flops": flops[0] / flops[1], **speeds}


NEURONS_DECODE = Study(
    name="neurons_decode",
    purpose="Neurons by magnitude: time to decode one row with a part of the neurons",
    about=(
        "**Random weights**: a trained model chooses other neurons, but equally many. One row is decoded greedily, "
        f"{STEPS} tokens after a prompt of {PROMPT}, with single neurons chosen by magnitude. Of the two shares in an "
        "arm's name, the first is the share of neurons for which the second matrix (up) is multiplied, the second "
        "that of the third matrix (down). FLOPs and tokens/s are relative to the dense model in the same turns. *In "
        "place* reads the weights by `ops/magnitude_native.py` and includes the new layout of the third matrix that "
        "the first step makes; *copied* does without numba. From commit 23fafe3 on, the arms in fp32 and the dense "
        "model beside them run in the compiled step of all blocks instead; records of older commits do not show that."
    ),
    arms=arms,
    seeds={"laptop": (0,)},
    clock=measured,
    columns=(
        Column(key="flops", title="FLOPs", format=".1%"),
        Column(key="place", title="in place (min to max)", format=".2f", spread=True),
        Column(key="copy", title="copied (min to max)", format=".2f", spread=True),
    ),
)
