"""A study of the speed of Token-Selective Attention in prefill and decoding, beside the dense model of its size."""

from __future__ import annotations

import statistics
from functools import partial

import torch
from torch import Tensor

from skipstone import SkipstoneForCausalLM
from skipstone.measure.flops import count_flops
from skipstone.measure.speed import prefill
from skipstone_studies.speed.decode import RANDOM_TEXT, ROWS, Decoding, calibrate, model_of, of_rows, routers, text
from skipstone_studies.speed.interleaved import ratio, seconds, time_ratio
from skipstone_studies.study import Column, Figures, RecipeDict, Study

SKIPPED, KV = (0.25, 0.5, 0.75), ("full", "kept")
PROMPTS, CONTEXT, PREFILL_TURNS, CALIBRATION = (8, 64), 512, 7, 8
SIZE = {"width": 256, "blocks": 8, "vocabulary": 256, "prompt": 64, "steps": 32, "turns": 11}


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the settings of every timing by its name: prefill and decoding, several rows and shares of skipped tokens.

    Each is a dict that `measured` takes. Its "part" is "prefill" or "decode", "skipped" the share of tokens that the
    gates skip, and "kv" is "full" if skipped tokens still provide keys and values, "kept" if they provide none. scale:
    not used.
    """
    found = {}
    for part, counts in (("prefill", PROMPTS), ("decode", ROWS)):
        for rows in counts:
            for kv in KV:
                for skipped in SKIPPED:
                    case = {"part": part, "rows": rows, "kv": kv, "skipped": skipped, "context": CONTEXT}
                    found[name_of(part, rows, kv, skipped)] = {**SIZE, **case}
    return found


def name_of(part: str, rows: int, kv: str, skipped: float) -> str:
    """Return the name under which the table shows a timing of Token-Selective Attention.

    part: the phase, "prefill" or "decode". rows: number of rows. kv: "full" if skipped tokens still provide keys and
    values, "kept" if they provide none. skipped: share of tokens that gated blocks skip.
    """
    return f"{part}, {of_rows(rows)}, kv {kv}, {skipped:.0%}"


def measured(recipe: RecipeDict) -> Figures:
    """Time a gated model in turns with the dense model, in prefill or in decoding.

    recipe: an entry of `arms`. Keys of the result: `skipped`, the share of pairs of a token and a gated block that were
    skipped. For prefill also `flops` and `time`, each divided by that of the dense model, and `over`, the median time
    divided by flops; for decoding `dense_seconds` (seconds per step of the dense model) and `speed` (tokens per second
    divided by those of the dense model). Time and speed are {"median", "min", "max"} over timings.
    """
    gate = {"name": "token_selective", "layers": "1:", "capacity": 1 - recipe["skipped"], "training": "hard"}
    dense, model = model_of(recipe, []), model_of(recipe, [{**gate, "kv": recipe["kv"]}])
    return (_prefill if recipe["part"] == "prefill" else _decode)(recipe, dense, model)


def _prefill(recipe: RecipeDict, dense: SkipstoneForCausalLM, model: SkipstoneForCausalLM) -> Figures:
    ids = text(recipe, recipe["rows"], recipe["context"], seed=3)
    calibrate(model, text(recipe, CALIBRATION, recipe["context"], seed=4))
    flops = [count_flops(partial(prefill, of, ids)).total for of in (model, dense)]  # type: ignore[arg-type]
    time = time_ratio(lambda: prefill(model, ids), lambda: prefill(dense, ids), min(PREFILL_TURNS, recipe["turns"]))
    return prefill_figures(1 - share_kept(model, ids), flops[0] / flops[1], time)


def prefill_figures(skipped: float, flops: float, time: dict[str, float]) -> Figures:
    """Return the figures of prefill: `skipped`, `flops`, `time`, and `over`, the median time divided by FLOPs.

    skipped: share of pairs of a token and a gated block that were skipped. flops: FLOPs of a prefill divided by the
    dense model's. time: seconds of a prefill divided by the dense model's, as {"median", "min", "max"} over timings.
    """
    return {"skipped": skipped, "flops": flops, "time": time, "over": time["median"] / flops}


@torch.inference_mode()
def share_kept(model: SkipstoneForCausalLM, ids: Tensor) -> float:
    """Return the share of the tokens `ids` that gated blocks compute, as a mean over the gated blocks of `model`.

    ids: token ids, int64 [rows, tokens].
    """
    records = model(ids, use_cache=False, logits_to_keep=1, output_records=True).records
    return statistics.fmean(records[i][name].kept_BT.float().mean().item() for i, name, _ in routers(model))


def _decode(recipe: RecipeDict, dense: SkipstoneForCausalLM, model: SkipstoneForCausalLM) -> Figures:
    decodings = {name: Decoding(of, recipe, recipe["rows"]) for name, of in (("dense", dense), ("gated", model))}
    taken = seconds({name: decoding.lap for name, decoding in decodings.items()}, recipe["turns"])
    return {
        "skipped": 1 - decodings["gated"].computed() / recipe["rows"],
        "dense_seconds": statistics.median(taken["dense"]) / recipe["steps"],
        "speed": ratio(taken["dense"], taken["gated"]),
    }


TSA_SPEED = Study(
    name="tsa_speed",
    purpose="Token-Selective Attention: time of prefill and of decoding relative to the dense model",
    about=RANDOM_TEXT
    + (
        f" fp32, {SIZE['blocks']} blocks of width {SIZE['width']}, hard gates on every block but the first. An arm's "
        "name gives the share that its thresholds were set to skip; *skipped* is the share of pairs of a token and a "
        "gated block that was really skipped. `kv full` computes keys and values of skipped tokens, `kv kept` does "
        f"not. Prefill: prompts of {CONTEXT} tokens, with a cache. *FLOPs* are counted while they execute, gates "
        "included, and both *FLOPs* and *time* are relative to the dense model, timed in the same turn. Target: time "
        "at most 1.10 times the FLOPs. Decoding: *speed* is tokens/s relative to the dense model. Target: at least 1."
    ),
    arms=arms,
    seeds={"laptop": (0,)},
    clock=measured,
    columns=(
        Column(key="skipped", title="skipped", format=".1%"),
        Column(key="flops", title="prefill: FLOPs"),
        Column(key="time", title="time (min to max)", spread=True),
        Column(key="over", title="time / FLOPs", format=".2f"),
        Column(key="dense_seconds", title="decode: dense, ms per step", format=".2f", unit=1e-3),
        Column(key="speed", title="speed (min to max)", spread=True),
    ),
)
