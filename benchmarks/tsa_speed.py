"""Token-Selective Attention beside the dense model of its size, in turns: sparse prefill and decoding steps.

    python benchmarks/tsa_speed.py [--sizes small large] [--prompts 8 64] [--rows 1 2 4 8 16 32 64] [--out results]

Random weights; every block but the first has a gate, whose threshold is set where the scores of random text ask for the
share of skipped tokens. Prefill: time and counted FLOPs of a prompt, by those of the dense model. Decoding: one token a
row and step. `--out` keeps tsa_speed.json and tsa_speed.md; what was measured before stays in them: other sizes, and
the part whose option is given without numbers (`--prompts --rows 1 8`: decoding alone). Threads: OMP_NUM_THREADS.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoding import Decoding, Size, calibrate, model_of, routers, text
from publish import closing, keep, middle, ratios_in_turns, surroundings
from skipstone import SkipstoneForCausalLM
from skipstone.measure.flops import count_flops
from skipstone.measure.speed import prefill, take_turns

SKIPPED, KV = (0.25, 0.5, 0.75), ("full", "kept")
DENSE = (0.0, "full")
PROMPTS, ROWS, CONTEXT, TURNS, CALIBRATION = (8, 64), (1, 2, 4, 8, 16, 32, 64), 512, 7, 8
SIZES = {
    "small": Size(width=256, blocks=8, vocabulary=256, steps=32, turns=11),
    "large": Size(width=512, blocks=8, vocabulary=256, steps=24, turns=7),
}
ABOUT = f"""fp32, every block but the first gated, gates hard. *Skipped* is the share of tokens and gated blocks that
was really skipped; *asked for* what the thresholds were set for. `kv: full` computes keys and values of skipped tokens.

Prefill: prompts of {CONTEXT} tokens, with a cache. *FLOPs* are counted while they execute, gates included, by those of
the dense model; *time* likewise, in the same turn. Asked is a time of at most 1.10 times the FLOPs.

Decoding: *speed* is the dense model's seconds a step by the gated model's, so tokens per second by the dense model's.
Asked is 1 or more."""


def gated(size: Size, skipped: float = 0.0, kv: str = "full") -> SkipstoneForCausalLM:
    """Dense where nothing is skipped."""
    gate = {"name": "token_selective", "layers": "1:", "capacity": 1 - skipped, "training": "hard", "kv": kv}
    return model_of(size, [gate] if skipped else [])


def prompts(size: Size, rows: Sequence[int]) -> list[dict[str, Any]]:
    """One entry for each number of rows, share and kind of keys."""
    dense, found = gated(size), []
    for count in rows:
        ids = text(size, count, CONTEXT, seed=3)
        whole = count_flops(_prompt(dense, ids)).total
        for skipped in SKIPPED:
            for kv in KV:
                model = gated(size, skipped, kv)
                calibrate(model, text(size, CALIBRATION, CONTEXT, seed=4))
                ours = _prompt(model, ids)
                found.append(
                    {
                        "rows": count,
                        "asked": skipped,
                        "kv": kv,
                        "skipped": 1 - share_kept(model, ids),
                        "flops": count_flops(ours).total / whole,
                        "time": middle(ratios_in_turns(ours, _prompt(dense, ids), TURNS)),
                    }
                )
                print(found[-1], flush=True)
    return found


def _prompt(model: SkipstoneForCausalLM, ids: Tensor) -> Callable[[], None]:
    def run() -> None:
        prefill(model, ids)

    return run


@torch.inference_mode()
def share_kept(model: SkipstoneForCausalLM, ids: Tensor) -> float:
    records = model(ids, use_cache=False, logits_to_keep=1, output_records=True).records
    return statistics.fmean(records[i][name].kept_BT.float().mean().item() for i, name, _ in routers(model))


def steps(size: Size, rows: Sequence[int]) -> list[dict[str, Any]]:
    """One entry for each number of rows, share and kind of keys; all of them and the dense model take turns."""
    kinds = [(skipped, kv) for kv in KV for skipped in SKIPPED]
    models = {DENSE: gated(size), **{kind: gated(size, *kind) for kind in kinds}}
    found = []
    for count in rows:
        decodings = {kind: Decoding(model, size, count) for kind, model in models.items()}
        rates = take_turns({kind: decoding.lap for kind, decoding in decodings.items()}, size.turns)
        seconds = {kind: [lap.seconds / size.steps for lap in rate.laps] for kind, rate in rates.items()}
        for kind in kinds:
            found.append(
                {
                    "rows": count,
                    "asked": kind[0],
                    "kv": kind[1],
                    "skipped": 1 - decodings[kind].computed() / count,
                    "dense_seconds": statistics.median(seconds[DENSE]),
                    "speed": middle([a / b for a, b in zip(seconds[DENSE], seconds[kind], strict=True)]),
                }
            )
            print(found[-1], flush=True)
    return found


def render(figures: dict[str, Any]) -> str:
    """Markdown from the record alone."""
    lines = [ABOUT]
    for name, found in figures["sizes"].items():
        lines += ["", f"## {name}: d {found['width']}, {found['blocks']} blocks"]
        for part, table in (("prompts", _prompts), ("steps", _steps)):
            if found.get(part):
                made = found["made"][part]
                lines += ["", *table(found[part]), "", closing(made["command"], made["environment"])]
    return "\n".join(lines) + "\n"


def _prompts(found: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| prefill, rows | kv | asked for | skipped | FLOPs | time (least to greatest) | time / FLOPs |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    return lines + [
        f"| {one['rows']} | {one['kv']} | {one['asked']:.0%} | {one['skipped']:.1%} | {one['flops']:.3f} "
        f"| {_shown(one['time'])} | {one['time']['median'] / one['flops']:.2f} |"
        for one in found
    ]


def _steps(found: list[dict[str, Any]]) -> list[str]:
    speeds = {(one["rows"], one["kv"], one["asked"]): one for one in found}
    heads = " | ".join(f"speed, {skipped:.0%} asked for (skipped)" for skipped in SKIPPED)
    lines = [f"| decoding, rows | kv | dense, ms a step | {heads} |", f"|---:|---|---:|{'---:|' * len(SKIPPED)}"]
    for rows, kv in dict.fromkeys((one["rows"], one["kv"]) for one in found):
        each = [speeds[rows, kv, skipped] for skipped in SKIPPED]
        cells = " | ".join(f"{_shown(one['speed'])}, {one['skipped']:.0%}" for one in each)
        lines.append(f"| {rows} | {kv} | {1e3 * each[0]['dense_seconds']:.2f} | {cells} |")
    return lines


def _shown(ratios: dict[str, float]) -> str:
    return "{median:.3f} ({min:.3f} to {max:.3f})".format(**ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--prompts", nargs="*", type=int, default=list(PROMPTS), help="rows of a prefill")
    parser.add_argument("--rows", nargs="*", type=int, default=list(ROWS), help="rows of a decoding step")
    parser.add_argument("--out", type=Path, help="keep tsa_speed.json and tsa_speed.md in this folder")
    given = parser.parse_args()
    kept = given.out / "tsa_speed.json" if given.out else None
    figures = json.loads(kept.read_text(encoding="utf-8")) if kept and kept.is_file() else {"sizes": {}}
    for name in given.sizes:
        size, found = SIZES[name], figures["sizes"].setdefault(name, {"made": {}})
        found |= {"width": size.width, "blocks": size.blocks}
        options = " ".join(["--prompts", *map(str, given.prompts), "--rows", *map(str, given.rows)])
        made = {"command": f"python benchmarks/tsa_speed.py --sizes {name} {options}", "environment": surroundings()}
        for part, measured, counts in (("prompts", prompts, given.prompts), ("steps", steps, given.rows)):
            if counts:
                found[part] = measured(size, counts)
                found["made"][part] = made
    keep(given.out, "tsa_speed", "Token-Selective Attention: time beside the dense model", figures, render(figures))


if __name__ == "__main__":
    main()
