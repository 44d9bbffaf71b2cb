"""Every timing, at a size that takes a second: one arm of each kind gives the figures of its columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from skipstone_studies.catalogue import FILES, STUDIES
from skipstone_studies.page import lookup
from skipstone_studies.run import reproduce
from skipstone_studies.speed.interleaved import ratio, spread
from skipstone_studies.speed.rivals.batches_page import WAYS

TINY_MODEL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE = {**TINY_MODEL, "intermediate_size": 96, "num_key_value_heads": 1, "vocab_size": 64}
DECODING = {"width": 64, "blocks": 2, "vocabulary": 64, "prompt": 4, "steps": 2, "turns": 1}
BATCHES = {way: options for way, options in WAYS.items() if options["way"] != "llama.cpp"}  # which needs a GGUF file
SMALL: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {  # arms, and what is smaller
    "parity": (("Llama, tied",), {}),
    "throughput": (("width 32, fp32",), {"rows": 1, "rounds": 1}),
    "decoder": (("training step", "decoding one row", "skipstone --help"), {"width": 64, "layers": 1, "rounds": 1}),
    "mod_training": (
        ("d 128, 8 rows of 256, topk, fp32", "d 128, 8 rows of 256, ema_threshold, RoutingTrainer, fp32"),
        {"width": 64, "blocks": 2, "context": 16, "rows": 2, "rounds": 1, "trainer_steps": 1},
    ),
    "polyglu_cost": (
        ("training, width 256, bf16, tau 0.1, noise on", "decoding, width 256, hardened"),
        {"width": 64, "tokens": 64, "rounds": 1, "blocks": 1},
    ),
    "ffn_groups_cost": (
        ("training, width 256, 0.6 on, chunk 64", "decoding, width 256, 0.4 on, chunk 64"),
        {"width": 64, "row": 128, "rows": 1, "rounds": 1},
    ),
    "experts": (
        ("width 256, experts and no-ops", "width 256, mixtral, eager"),
        {"width": 32, "tokens": 16, "rounds": 1},
    ),
    "head_loss": (("chunks of 256, bf16",), {"vocabulary": 64, "tokens": 512, "width": 16, "rounds": 1}),
    "static_graph": (("topk",), {"inputs": 3}),
    "full_size": (("256 tokens",), {"tokens": 16, "model": {"vocab_size": 64, **TINY_MODEL, "activation": "polyglu"}}),
    "decode": (("2 rows",), DECODING),
    "tsa_speed": (
        ("prefill, 8 rows, kv kept, 50%", "decode, 2 rows, kv full, 50%"),
        {**DECODING, "rows": 2, "context": 16},
    ),
    "neurons_decode": (
        ("smollm2-135m, bfloat16, 0.66 and 0.50",),
        {"shape": SHAPE, "prompt": 4, "steps": 2, "turns": 1},
    ),
    "growth": (
        ("rows, dense", "processes, mixture_of_depths", "loading 1B", "imports"),
        {
            "values": [1, 2, 4],
            "repeats": 1,
            "context": 16,
            "checkpoint": SHAPE,
        },
    ),
    "gpu": (("training, d 1024",), {}),
    "decode_rivals": (
        (
            "ours, int8",
            "ours, 16 bits",
            "ours, the file's four bits",
            "transformers, bf16",
            "ours, int8, draft lookup",
            "transformers, prompt lookup",
        ),
        {"source": "stories260K", "prompt": 4, "new": 2, "turns": 1},
    ),
    "decode_rivals_gemma": (
        ("ours, int8, head by 16,384 candidates",),
        {"source": "stories260K", "prompt": 4, "new": 2, "turns": 1, "candidates": 64, "directions": 64},
    ),
    "decode_drafts": (
        ("int8, lookup", "4 bits, lookup"),
        {"source": "stories260K", "prompt": 4, "new": 2, "prompts": 1, "turns": 1},
    ),
    "decode_batches": (("rows-2", "prompt-128"), {"source": "stories260K", "laps": 1, "ways": BATCHES}),
}


def test_every_timing_is_tried() -> None:
    assert set(SMALL) == {name for name, file in FILES.items() if file.startswith("speed.")}


# They compile, train, or start a process.
SLOW = (
    "static_graph",
    "neurons_decode",
    "head_loss",
    "mod_training",
    "ffn_groups_cost",
    "decode_rivals",
    "decode_rivals_gemma",
    "decode_drafts",
    "decode_batches",
    "gpu",
    "growth",
)
CASES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SMALL]


@pytest.mark.filterwarnings("default::DeprecationWarning")  # of torch.compile's own
@pytest.mark.parametrize("name", CASES)
def test_every_column_has_a_figure(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = STUDIES[name]
    assert study.clock is not None
    arms, smaller = SMALL[name]
    recipes = study.recipes("laptop")
    shrunk = [{k: smaller.get(k, value) for k, value in {**recipes[arm], "seed": 0}.items()} for arm in arms]
    figures = [study.clock(recipe) for recipe in shrunk]
    for column in study.columns:
        key = f"{column.key}.median" if column.spread else column.key
        if "llama" in f"{column.key}, {column.title}":
            continue  # needs llama.cpp and a GGUF file
        assert any(lookup(found, key) is not None for found in figures), column.title


def test_ratios_are_taken_round_by_round() -> None:
    assert ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_a_timing_is_reproduced_like_any_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records with a digest, nothing measured twice, a page; no run folders."""
    import dataclasses

    monkeypatch.chdir(tmp_path)
    taken: list[Any] = []

    def clock(recipe: dict[str, Any]) -> dict[str, Any]:
        taken.append(recipe)
        return {"time": {"median": 1.5, "min": 1.0, "max": 2.0}, "seconds": recipe["rounds"]}

    study = dataclasses.replace(STUDIES["decoder"], clock=clock)
    monkeypatch.setitem(STUDIES, "decoder", study)
    page = reproduce("decoder").read_text(encoding="utf-8")
    assert "| training step | 1.50 (1.00 to 2.00) | 9.00 |" in page
    assert [recipe["seed"] for recipe in taken] == [0, 0, 0]
    reproduce("decoder")
    assert len(taken) == 3
    assert not Path("runs/decoder/laptop").exists()
