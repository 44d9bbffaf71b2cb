"""Part of the GPU study: training steps in bf16 of a Mixture-of-Depths and a dense model, run in three ways.

The ways are eager, compiled by blocks, and as one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.core.strict import PlainDict
from skipstone.train.estimate import GPUS
from skipstone_studies.speed.gpu.bench import Bench, captured, in_turns

ROUTED: PlainDict = {"name": "mixture_of_depths", "layers": "1::2", "capacity": 0.125, "decision": "topk"}
Step = Callable[[], object]


def measure(bench: Bench) -> None:
    """Time training steps (forward, backward, AdamW) of a dense and a routed model, run in three ways.

    bench: gives the device and the sizes, and stores the figures that `both` returns (milliseconds, ratios and others)
    for "eager", "compiled" and, except on a CPU, "CUDA graph".
    """
    for way in ("eager", "compiled", "CUDA graph"):
        if way == "CUDA graph" and bench.device.type == "cpu":
            continue  # there are none
        bench.measure(way, both, way)


def both(bench: Bench, way: str) -> PlainDict:
    """Time training steps of a dense and a routed (Mixture-of-Depths) model in turns.

    bench: gives the device and the sizes. way: how a step is run: "eager", "compiled" or "CUDA graph". Keys of the
    result: `dense_ms` and `routed_ms`, milliseconds per step; `time`, the routed milliseconds divided by the dense
    ones; `flops`, the same ratio of the FLOPs by the cost model; `tokens_per_second` of the routed model; `dense_mfu`
    and `routed_mfu`, FLOPs per second divided by the GPU's peak, if this peak is known; on a GPU `peak_gb`, peak memory
    in GB.
    """
    models = {"dense": model_of(bench, []), "routed": model_of(bench, [ROUTED])}
    steps = {name: step_of(bench, model, way) for name, model in models.items()}
    taken = in_turns(bench, steps, bench.sizes["rounds"])
    tokens = bench.sizes["rows"] * bench.sizes["context"]
    flops = {
        name: model.cost(tokens=bench.sizes["context"], routing="oracle").training.total * bench.sizes["rows"]
        for name, model in models.items()
    }
    dense, routed = taken["dense"]["ms"], taken["routed"]["ms"]
    return {
        "dense_ms": dense,
        "routed_ms": routed,
        "time": routed / dense,
        "flops": flops["routed"] / flops["dense"],
        "tokens_per_second": tokens / routed * 1e3,
        **share_of_peak("dense_mfu", flops["dense"], dense),
        **share_of_peak("routed_mfu", flops["routed"], routed),
        **bench.peak(),
    }


def model_of(bench: Bench, mechanisms: list[PlainDict]) -> SkipstoneForCausalLM:
    """Build a model with random weights on the device, with heads of 64 channels.

    bench: provides the device and the sizes. mechanisms: entries of the configuration's `mechanisms`; [] means a dense
    model.
    """
    torch.manual_seed(0)
    sizes = bench.sizes
    config = SkipstoneConfig(
        vocab_size=sizes["vocabulary"],
        hidden_size=sizes["width"],
        num_hidden_layers=sizes["blocks"],
        num_attention_heads=max(1, sizes["width"] // 64),
        max_position_embeddings=sizes["context"],
        mechanisms=mechanisms,
    )
    with bench.device:
        return SkipstoneForCausalLM(config).train()


def step_of(bench: Bench, model: SkipstoneForCausalLM, way: str) -> Step:
    """Return a function without arguments that runs one training step of a model, always on the same random tokens.

    bench: gives the device and the sizes. model: the model. way: how the step is run: "eager", "compiled" or "CUDA
    graph".
    """
    sizes = bench.sizes
    ids = torch.randint(0, sizes["vocabulary"], (sizes["rows"], sizes["context"])).to(bench.device)
    fused = bench.device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused, capturable=bench.on_gpu)
    if way == "compiled":
        compile_blocks(model, sizes["backend"])

    def step() -> None:
        with bench.bf16():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return captured(bench, step) if way == "CUDA graph" else step


def compile_blocks(model: SkipstoneForCausalLM, backend: str) -> None:
    """Compile each block of a model by torch.compile, and raise the limit of recompilations to at least 64.

    backend: the backend of torch.compile.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for block in model.model.layers:
        block.compile(backend=backend)


def share_of_peak(key: str, flops: float, milliseconds: float) -> PlainDict:
    """Return {key: FLOPs per second as a share of the GPU's peak in bf16}.

    flops: number of FLOPs that were computed. milliseconds: the time that they took. The result is empty without a GPU,
    and for one whose peak is not known.
    """
    name = torch.cuda.get_device_name().replace(" ", "").upper() if torch.cuda.is_available() else ""
    found = [gpu for known, gpu in GPUS.items() if known.partition("-")[0].upper() in name]
    return {key: flops / (milliseconds / 1e3) / found[-1].flops} if found else {}
