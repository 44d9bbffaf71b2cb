"""Part of the GPU study: decoding in bf16 of 1 to 64 rows by a Mixture-of-Depths and a dense model.

Steps with a cache of fixed size are timed as one CUDA graph, too.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import torch
from transformers import StaticCache

from skipstone.core.strict import PlainDict
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone_studies.speed.decode import ROUTED, Decoding, model_of, of_rows, text
from skipstone_studies.speed.gpu.bench import Bench, captured, in_turns
from skipstone_studies.speed.interleaved import ratio, seconds

STEPS = 256  # more than are run: warm-ups, the capture and the timed ones


def measure(bench: Bench) -> None:
    """Time decoding steps of a dense and a routed (Mixture-of-Depths) model for several numbers of rows.

    bench: gives the device and the sizes, and stores the results: for each number of rows the figures of `beside`
    (milliseconds, tokens per second and others), and for some of them those of `fixed` (milliseconds with a cache of
    fixed size).
    """
    pair = models(bench)
    for rows in bench.sizes["of_rows"]:
        bench.measure(of_rows(rows), beside, pair, rows)
    for rows in bench.sizes["fixed_rows"]:
        bench.measure(f"{of_rows(rows)}, cache of fixed size", fixed, pair, rows)


def models(bench: Bench) -> dict[str, SkipstoneForCausalLM]:
    """Return a dense and a Mixture-of-Depths model in bf16 on the device, by the names "dense" and "routed".

    bench: gives the device and the sizes. The models have random weights, and routers stay fp32.
    """
    with bench.device:
        made = {"dense": model_of(bench.sizes, []), "routed": model_of(bench.sizes, [ROUTED])}
    return {name: model.to(bench.device, torch.bfloat16).eval() for name, model in made.items()}  # type: ignore[arg-type]


def beside(bench: Bench, pair: Mapping[str, SkipstoneForCausalLM], rows: int) -> PlainDict:
    """Time decoding steps of a dense and a routed (Mixture-of-Depths) model in turns, with a cache that grows.

    bench: gives the sizes. pair: the models "dense" and "routed". rows: number of sequences decoded together. Keys of
    the result: `dense_ms` and `routed_ms` (milliseconds per step), `speed` (tokens per second of the routed model
    divided by those of the dense one), `share` (share of the rows that a routed block computes, mean over blocks and
    steps) and `tokens_per_second` (of the routed model).
    """
    decodings = {name: Decoding(model, bench.sizes, rows) for name, model in pair.items()}
    taken = seconds({name: decoding.lap for name, decoding in decodings.items()}, bench.sizes["turns"])
    step = {name: statistics.median(each) / bench.sizes["steps"] * 1e3 for name, each in taken.items()}
    return {
        "dense_ms": step["dense"],
        "routed_ms": step["routed"],
        "speed": ratio(taken["dense"], taken["routed"])["median"],
        "share": decodings["routed"].computed() / rows,
        "tokens_per_second": rows / step["routed"] * 1e3,
    }


@torch.no_grad()
def fixed(bench: Bench, pair: Mapping[str, SkipstoneForCausalLM], rows: int) -> PlainDict:
    """Time decoding steps with a cache of fixed size, kernel by kernel ("eager") and as one CUDA graph ("graph").

    With such a cache a step computes every block for every row, so it shows what launching costs and not what skipping
    saves. bench: gives the device and the sizes. pair: the models "dense" and "routed" (Mixture-of-Depths). rows:
    number of sequences decoded together. Keys of the result: milliseconds per step as `dense_eager_ms`,
    `dense_graph_ms`, `routed_eager_ms` and `routed_graph_ms`.
    """
    found: PlainDict = {}
    for name, model in pair.items():
        cache = StaticCache(config=model.config, max_cache_len=bench.sizes["prompt"] + STEPS)
        prompts = text(bench.sizes, rows, bench.sizes["prompt"], seed=2).to(bench.device)
        Decoding(model, bench.sizes, rows)  # sets the thresholds
        model(prompts, past_key_values=cache)
        token = prompts[:, -1:].clone()

        def step(model: SkipstoneForCausalLM = model, cache: StaticCache = cache, token: torch.Tensor = token) -> None:
            token.copy_(model(token, past_key_values=cache).logits[:, -1:].argmax(-1))

        kinds = {"eager": step, "graph": captured(bench, step)}
        taken = in_turns(bench, kinds, bench.sizes["turns"])
        found |= {f"{name}_{kind}_ms": each["ms"] for kind, each in taken.items()}
    return found
