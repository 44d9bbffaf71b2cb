"""Text from a run folder or a saved model has the engine's tokens, as whole characters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from generate.folders import MOD, TSA, reset_data, text_data, write_run
from skipstone.core import cache as core_cache
from skipstone.generate.engine import generate
from skipstone.generate.text_generation import stream_text
from skipstone.ops.reference import to_half
from skipstone.runs import Run

PROMPT = "für "


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    return write_run(root / "run", text_data(root / "text"), [MOD, TSA], "polyglu")


@pytest.mark.parametrize("folder", ["", "model"])
def test_the_text_is_the_engines_tokens_decoded(run: Path, folder: str) -> None:
    opened = Run(run)
    tokenizer = opened.load_tokenizer()
    assert tokenizer is not None
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    expected = generate(opened.load_model(), ids, max_new_tokens=12, eos_token_id=tokenizer.eos_token_id)
    pieces = list(stream_text(run / folder, PROMPT, max_new_tokens=12, greedy=True))
    text = tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert "".join(piece.text for piece in pieces) == text != ""
    assert all(0 < piece.compute <= 1 for piece in pieces)
    assert len({piece.compute for piece in pieces}) > 1
    assert all(piece.text for piece in pieces)


def test_keys_and_values_in_16_bits(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounded: list[torch.dtype] = []
    monkeypatch.setattr(core_cache, "to_half", lambda x: rounded.append(x.dtype) or to_half(x))
    text = [piece.text for piece in stream_text(run, PROMPT, max_new_tokens=4, greedy=True, cache_bits=16)]
    assert "".join(text)
    assert set(rounded) == {torch.float32}
    with pytest.raises(ValueError, match="cache_bits must be 32 or 16, got 4"):
        stream_text(run, PROMPT, cache_bits=4)


def test_sampling_with_a_seed_is_the_same_again(run: Path) -> None:
    first = list(stream_text(run, PROMPT, max_new_tokens=10, seed=4, temperature=1.5, top_k=20))
    assert first == list(stream_text(run, PROMPT, max_new_tokens=10, seed=4, temperature=1.5, top_k=20))
    assert first != list(stream_text(run, PROMPT, max_new_tokens=10, seed=5, temperature=1.5, top_k=20))


def test_without_a_length_the_context_is_filled(run: Path) -> None:
    model = Run(run).load_model()
    assert model.config.max_position_embeddings == 24
    ids = list(stream_text(run, "x", greedy=True))  # 23 new tokens fit; an early end would show as fewer
    raw = generate(model, torch.tensor([[ord("x")]]), max_new_tokens=23, eos_token_id=256)
    assert sum(len(p.text) for p in ids) == len(bytes(raw[0, 1:].clamp(max=255).tolist()).decode(errors="replace"))


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [
        ("", 4, "the prompt is empty"),
        (PROMPT, 20, "prompt of 5 tokens and 20 new tokens exceed the model's context of 24"),
        ("x" * 24, None, "prompt of 24 tokens and 1 new tokens exceed the model's context of 24"),
    ],
)
def test_wrong_input_is_one_clear_line(run: Path, prompt: str, new: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        stream_text(run, prompt, max_new_tokens=new)  # on the call, before anything is printed
    assert "\n" not in str(caught.value)


def test_a_run_without_text_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "s3", reset_data(rows=2), [])
    with pytest.raises(ValueError, match="has no tokenizer and so no text to continue: it was trained on"):
        stream_text(run, "x")


def test_an_unknown_character_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", text_data(tmp_path / "text", tokenizer="char"), [])
    with pytest.warns(UserWarning, match="characters that this model's tokenizer does not know"):
        assert list(stream_text(run, "x@y", max_new_tokens=2, greedy=True))
