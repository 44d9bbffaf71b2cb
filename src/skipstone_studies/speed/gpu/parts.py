"""The parts of the GPU study: what each measures, its sizes on a GPU and in a rehearsal on a CPU, its time limit."""

from __future__ import annotations

from dataclasses import dataclass

from skipstone.core.strict import PlainDict, PlainMapping
from skipstone_studies.speed.full_size import RECIPE
from skipstone_studies.study import RecipeDict

REHEARSAL_LIMIT = 240  # seconds of each part on a CPU that may be busy with other work
LAWS = ("executors", "static", "gradients", "generation", "packed", "padding", "causality", "rows", "chunks")
SMALL_MODEL: PlainDict = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
TINY_STEP: PlainDict = {"rows": 2, "context": 16, "width": 64, "blocks": 2, "vocabulary": 64, "rounds": 1}
STEP: PlainDict = {"rows": 8, "context": 2048, "blocks": 12, "vocabulary": 8192, "rounds": 5, "backend": "inductor"}
LLAMA_1B: PlainDict = {
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the GPU study, which runs in its own process.

    module: name of the module in `speed.gpu` that measures it. about: text for the study's page. limit: the largest
    number of seconds that it may take on a GPU. on_gpu: sizes of models and inputs for a GPU, by the names under which
    `module` reads them. rehearsed: tiny sizes by the same names, for a rehearsal on a CPU.
    """

    module: str
    about: str
    limit: int
    on_gpu: PlainMapping
    rehearsed: PlainMapping


PARTS: dict[str, Part] = {
    "kernels": Part(
        module="kernels",
        about=(
            "Each kernel that CUDA selects against its reference in fp32: results and every gradient. *Error* is the "
            "greatest difference, relative to the greatest number of its tensor (at least 1)."
        ),
        limit=50,
        on_gpu={
            "rows": 2,
            "tokens": 333,
            "neurons": 1096,
            "width": 128,
            "timed": {"rows": 8, "tokens": 2048, "neurons": 4096},
            "rounds": 10,
            "backend": "inductor",
            "time_triton": True,
        },
        rehearsed={
            "rows": 2,
            "tokens": 9,
            "neurons": 72,
            "width": 16,
            "timed": {},
            "rounds": 1,
            "backend": "aot_eager",
            "time_triton": False,
        },
    ),
    "laws": Part(
        module="laws",
        about="The quick cases of the laws in `tests/laws`, computed on the device, as far as the time reaches.",
        limit=60,
        on_gpu={"files": LAWS, "workers": 8, "cases": ""},
        rehearsed={"files": ("double",), "workers": 0, "cases": "early_exit"},
    ),
    "training, d 1024": Part(
        module="training",
        about=(
            "A training step (forward, backward, AdamW) in bf16 under autocast with fp32 weights: a Mixture-of-Depths "
            "model with every other block at capacity .125 beside the dense model of the same size, in turns. 12 "
            "blocks, 8 rows of 2,048 tokens. *Time* and *FLOPs* are those of the routed model relative to the dense "
            "one."
        ),
        limit=65,
        on_gpu={**STEP, "width": 1024},
        rehearsed={**TINY_STEP, "backend": "aot_eager"},
    ),
    "training, d 2048": Part(
        module="training",
        about="The same at width 2,048.",
        limit=85,
        on_gpu={**STEP, "width": 2048},
        rehearsed={**TINY_STEP, "width": 128, "backend": "aot_eager"},
    ),
    "PolyGLU beside SwiGLU": Part(
        module="polyglu",
        about=(
            "Forward and backward of one MLP of width 1,536 with 4,096 neurons on 16,384 tokens in bf16. *Saved* is "
            "the ratio of the bytes that are kept for the backward pass."
        ),
        limit=40,
        on_gpu={"rows": 8, "context": 2048, "width": 1536, "rounds": 10, "backend": "inductor"},
        rehearsed={"rows": 2, "context": 8, "width": 24, "rounds": 1, "backend": "aot_eager"},
    ),
    "decoding": Part(
        module="decoding",
        about=(
            "One token for each row in bf16, width 1,024, 10 blocks of which every other one keeps 12.5 % of the "
            "tokens. *Speed* is routed tokens/s divided by dense ones; *share* is the share of the rows that routed "
            "blocks compute. With a cache of fixed size every block is computed, so those lines compare launching "
            "kernels one by one with one CUDA graph."
        ),
        limit=50,
        on_gpu={
            "width": 1024,
            "blocks": 10,
            "vocabulary": 1024,
            "prompt": 48,
            "steps": 24,
            "turns": 3,
            "of_rows": (1, 2, 4, 8, 16, 32, 64),
            "fixed_rows": (1, 8, 64),
        },
        rehearsed={
            "width": 64,
            "blocks": 2,
            "vocabulary": 64,
            "prompt": 4,
            "steps": 2,
            "turns": 1,
            "of_rows": (1, 3),
            "fixed_rows": (2,),
        },
    ),
    "prompts of an adapted model": Part(
        module="prompts",
        about=(
            "Prompts of one row in bf16 through a model in the shape of a Llama with 1B parameters and random weights, "
            "with the mechanisms of the recipes for adapting, set to .7 of the dense FLOPs. *Speed* is relative to "
            "the dense source."
        ),
        limit=40,
        on_gpu={"model": LLAMA_1B, "lengths": (512, 2048, 8192), "budget": 0.7, "rounds": 5},
        rehearsed={"model": {**SMALL_MODEL, "vocab_size": 64}, "lengths": (16, 32), "budget": 0.8, "rounds": 1},
    ),
    "training, resuming and sharding": Part(
        module="verbs",
        about=(
            "Small models trained on the sources of Python's library by what `skipstone train` calls: plainly, sharded "
            "by FSDP2 as one process, stopped and resumed, in bf16; then evaluated, and one text continued. "
            "*Difference* is the greatest of any step's loss from the plain run, in nats."
        ),
        limit=70,
        on_gpu={
            "models": ("all", "dense", "top-k"),
            "steps": 12,
            "context": 256,
            "model": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
        },
        rehearsed={"models": ("all",), "steps": 4, "context": 32, "model": SMALL_MODEL},
    ),
    "the 597M recipe": Part(
        module="full_recipe",
        about=(
            "Whole steps of `polychromatic-0.6b` (PolyGLU, rows of 4,096 tokens, bf16, gradients clipped, AdamW). "
            "FLOPs are those of the cost model; *MFU* is relative to the maker's dense bf16 peak."
        ),
        limit=65,
        on_gpu={"recipe": RECIPE, "tokens": 4096, "of_rows": (1, 4), "rounds": 5, "backend": "inductor"},
        rehearsed={
            "recipe": {**RECIPE, "model": {"vocab_size": 64, **SMALL_MODEL, "activation": "polyglu"}},
            "tokens": 12,
            "of_rows": (1, 2),
            "rounds": 1,
            "backend": "aot_eager",
        },
    ),
}


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the recipe of each part of the GPU study, by name of the part.

    Each is a dict that `runner.measured` takes. scale: "paper" means sizes for a GPU; anything else, such as "laptop",
    means a rehearsal with tiny sizes on a CPU.
    """
    on_gpu = scale == "paper"
    return {
        name: {
            "part": name,
            "module": part.module,
            "device": "cuda" if on_gpu else "cpu",
            "limit": part.limit if on_gpu else REHEARSAL_LIMIT,
            **(part.on_gpu if on_gpu else part.rehearsed),
        }
        for name, part in PARTS.items()
    }
