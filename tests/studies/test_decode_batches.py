"""The study of batches, contexts and prompts: its engines keep rows apart, its page shows what records say."""

from __future__ import annotations

import ctypes
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone_studies.catalogue import STUDIES
from skipstone_studies.page import lookup
from skipstone_studies.speed import decode_batches
from skipstone_studies.speed.rivals import batches_page
from skipstone_studies.speed.rivals.contexts import LlamaContexts, TorchContexts

IDS = torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(1))
VOCABULARY = 50


def test_a_model_repeats_its_steps() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model = SkipstoneForCausalLM(SkipstoneConfig(**sizes, num_attention_heads=2)).eval()
    rows = TorchContexts(model)
    with torch.inference_mode():
        whole = model(IDS, use_cache=False).logits.argmax(-1)
    assert torch.equal(rows.read(IDS[:, :6]), whole[:, 5:6])
    for _ in range(2):
        assert torch.equal(rows.steps(IDS[:, 6:]), whole[:, 6:])
        rows.back(3)


class Fake:
    """What `LlamaContexts` calls of llama.cpp's bindings: the likeliest token is a sum over all that its row has read.

    Memory holds {row: [token at each position]}. Calls that would overwrite or leave out a position fail.
    """

    LLAMA_FLASH_ATTN_TYPE_ENABLED, LLAMA_FLASH_ATTN_TYPE_DISABLED = 1, 0

    def __init__(self) -> None:
        self.held: dict[int, list[int]] = {}
        self.options: Any = SimpleNamespace()
        self.logits: dict[int, int] = {}
        self.freed: list[str] = []

    def __getattr__(self, name: str) -> Any:
        """Of calls without an effect that is looked at: what frees is noted, everything else gives 1."""
        return lambda *_: self.freed.append(name) if "free" in name else 1

    def llama_context_default_params(self) -> Any:
        return self.options

    def llama_n_batch(self, context: Any) -> int:
        return 4

    def llama_vocab_n_tokens(self, vocabulary: Any) -> int:
        return VOCABULARY

    def llama_batch_init(self, tokens: int, *_: int) -> Any:
        return SimpleNamespace(
            token=[0] * tokens,
            pos=[0] * tokens,
            n_seq_id=[0] * tokens,
            logits=[0] * tokens,
            seq_id=[[0] for _ in range(tokens)],
        )

    def llama_memory_clear(self, *_: Any) -> None:
        self.held = {}

    def llama_memory_seq_rm(self, memory: Any, row: int, start: int, end: int) -> None:
        del self.held[row][start:]

    def llama_decode(self, context: Any, batch: Any) -> int:
        self.logits = {}
        for i in range(batch.n_tokens):
            row = self.held.setdefault(batch.seq_id[i][0], [])
            assert (batch.pos[i], batch.n_seq_id[i]) == (len(row), 1)
            row.append(batch.token[i])
            if batch.logits[i]:
                self.logits[i] = sum(row) % VOCABULARY
        return 0

    def llama_get_logits_ith(self, context: Any, i: int) -> Any:
        return (ctypes.c_float * VOCABULARY)(*(float(token == self.logits[i]) for token in range(VOCABULARY)))


def test_each_row_is_a_sequence_of_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(logging.getLogger("llama-cpp-python"), "level", logging.NOTSET)
    rows = LlamaContexts(Path("any.gguf"), rows=3, tokens=9, threads=1, flash=False)
    assert (fake.options.n_ctx, fake.options.n_seq_max, fake.options.flash_attn_type) == (3 * 256, 3, 0)
    sums = IDS.cumsum(1) % VOCABULARY
    for _ in range(2):
        assert torch.equal(rows.read(IDS[:, :6]), sums[:, 5:6]), "a prompt longer than a batch is read in parts"
        for _ in range(2):
            assert torch.equal(rows.steps(IDS[:, 6:]), sums[:, 6:])
            rows.back(3)
    rows.close()
    assert fake.freed == ["llama_batch_free", "llama_free", "llama_model_free"]


def test_what_cannot_be_measured_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    missing = decode_batches._missing(batches_page.WAYS)
    assert set(missing) == {"llama_q8_0", "llama_file"}
    page = batches_page.details({"rows-2": {0: figures("rows-2", missing)}})
    assert "| 2 | 32 | 20.0 (10.0 to 40.0) |" in page
    assert page.count("| – |") == 1, "the last of two dashes ends the row"
    assert "llama.cpp, Q8_0: not measured, they need llama.cpp" in page
    assert "numba 1.0." in page


def figures(arm: str, left_out: dict[str, str]) -> dict[str, Any]:
    """Figures as `measured` returns them, of ways that take longer from one to the next; laps are half and twice."""
    recipe, ways = decode_batches.arms("laptop")[arm], {}
    for at, way in enumerate(way for way in batches_page.WAYS if way not in left_out):
        spread = {"median": (at + 2) / 100, "min": (at + 2) / 200, "max": (at + 2) / 50}
        ways[way] = {"seconds": spread, "cpu": spread, "speed": spread, "beside": spread}
        ways[way] |= {"same": 0.5} if recipe["kind"] == "step" else {}
    versions = {"numba": "1.0", "llama_cpp": "" if left_out else "2.0", "llama_cpp_for": "AVX2"}
    size = {"rows": recipe["rows"], "tokens": recipe["context"]}
    return {**size, "ways": ways, "left_out": left_out, "versions": versions}


def test_steps_and_prompts_have_tables_of_their_own() -> None:
    assert set(batches_page.TITLES) == set(batches_page.WAYS)
    page = batches_page.details({arm: {0: figures(arm, {})} for arm in ("rows-4-context-1000", "prompt-512")})
    assert "| 4 | 1,000 | 20.0 (10.0 to 40.0) | 30.0 (15.0 to 60.0) |" in page
    assert "| 512 | 25,600 (12,800 to 51,200) |" in page
    assert "CPU time is 100% to 100% of the wall clock's" in page
    assert "ours, fp32 50.0%, 16 bits 50.0%" in page
    assert "transformers, fp32 50.0%" not in page
    assert page.endswith("llama-cpp-python 2.0 (compiled for AVX2).")


def test_an_arm_for_every_setting() -> None:
    names = list(decode_batches.arms("laptop"))
    assert names[:5] == ["rows-1", "rows-2", "rows-4", "rows-8", "rows-16"]
    assert names[5:] == [
        "context-1000",
        "context-2000",
        "context-4000",
        "rows-4-context-1000",
        "prompt-128",
        "prompt-512",
        "prompt-1500",
    ]


@pytest.mark.slow
def test_scale_quick_measures_every_way_of_ours(data_dir: Path) -> None:
    study = STUDIES["decode_batches"]
    assert study.clock is not None
    for arm, recipe in study.recipes("quick").items():
        found = study.clock({**recipe, "seed": 0})
        assert set(found["ways"]) == set(recipe["ways"])
        assert found["left_out"] == {}
        for way, taken in found["ways"].items():
            assert ("same" in taken) is (not arm.startswith("prompt"))
            assert taken.get("same", 1.0) > {"ours": 0.99, "int4": 0.2}.get(way, 0.6), way
            assert lookup(taken, "seconds.median") > 0  # type: ignore[operator]
