"""Part of the GPU study: prefill by models with the mechanisms that `skipstone adapt` adds, and by a dense model.

All weights are random, and in bf16.
"""

from __future__ import annotations

import torch

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.budget.calibration import meet
from skipstone.budget.handles import find_handles
from skipstone.core.strict import PlainDict
from skipstone.measure.speed import prefill
from skipstone_studies.speed.gpu.bench import Bench, in_turns

# As the recipes adapt-mod, adapt-tsa and adapt-neurons, with thresholds set to the share of a dense model's FLOPs.
ADAPTED: dict[str, PlainDict] = {
    "Mixture-of-Depths": {
        "mechanisms": [
            {
                "name": "mixture_of_depths",
                "layers": "1::2",
                "capacity": 0.5,
                "decision": "ema_threshold",
                "kv": "full",
                "skip": "low_rank",
                "skip_rank": 16,
            }
        ]
    },
    "Token-Selective Attention": {
        "mechanisms": [{"name": "token_selective", "layers": "1:", "execution": "hard", "depth_weight": 0.0}]
    },
}


def measure(bench: Bench) -> None:
    """Time the prefill (pass over a prompt) of models with each mechanism in turns with the dense model's.

    bench: gives the device and the sizes, and stores the figures of `prompts_of` for each mechanism by name:
    milliseconds, and how much faster the model is, by length of the prompt.
    """
    for name, options in ADAPTED.items():
        bench.measure(name, prompts_of, options)


def model_of(bench: Bench, options: PlainDict) -> SkipstoneForCausalLM:
    """Build a model in the shape of a Llama, with random weights in bf16.

    bench: gives the device and the sizes. options: fields of SkipstoneConfig that add mechanisms; {} means a dense
    model.
    """
    torch.manual_seed(0)
    config = SkipstoneConfig(**bench.sizes["model"], max_position_embeddings=max(bench.sizes["lengths"]), **options)
    with bench.device:
        model = SkipstoneForCausalLM(config)
    return model.to(torch.bfloat16).eval()  # type: ignore[no-any-return]


def prompts_of(bench: Bench, options: PlainDict) -> PlainDict:
    """Time the prefill of one row by an adapted and a dense model, in turns, for several lengths of prompt.

    bench: gives the device and the sizes, with "lengths" (of prompts) and "budget" (share of the dense FLOPs). options:
    fields of SkipstoneConfig that add the mechanisms of the adapted model, whose thresholds are set to meet the budget.
    Keys of the result for each length N: `dense_N_ms` and `adapted_N_ms` (milliseconds) and `speed_N` (dense_N_ms /
    adapted_N_ms; above 1 means that the adapted model is faster); on a GPU also `peak_gb` (peak memory in GB).
    """
    source, adapted = model_of(bench, {}), model_of(bench, options)
    vocabulary = bench.sizes["model"]["vocab_size"]
    length = min(bench.sizes["lengths"])
    rows = [{"input_ids": torch.randint(0, vocabulary, (2, length)).to(bench.device)} for _ in range(2)]
    dense = source.cost(tokens=length).forward.total / length
    with torch.no_grad():
        meet(adapted, find_handles(adapted), rows, bench.sizes["budget"] * dense)
    found: PlainDict = {}
    for length in bench.sizes["lengths"]:
        ids = torch.randint(0, vocabulary, (1, length)).to(bench.device)
        runs = {"dense": lambda i=ids: prefill(source, i), "adapted": lambda i=ids: prefill(adapted, i)}
        taken = in_turns(bench, runs, bench.sizes["rounds"])
        found |= {f"{name}_{length}_ms": each["ms"] for name, each in taken.items()}
        found[f"speed_{length}"] = taken["dense"]["ms"] / taken["adapted"]["ms"]
    return {**found, **bench.peak()}
