"""Drafts by a draft head: the same text as without one in every form of model, and files that are refused."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import skipstone
from generate.chances import plausible
from models import tiny_model
from skipstone.adapt.draft_head import new_head, train_draft_head
from skipstone.core.checksums import Damaged
from skipstone.generate import generate, head_draft, stream
from skipstone.generate.head_draft import WINDOW, HeadDraft
from skipstone.generate.speculation import Length
from skipstone.model.draft_head import DraftHead, ReadyHead
from skipstone.model.draft_head_file import ABOUT, FILE, load_draft_head, save_draft_head
from skipstone.model.quantise import quantise

ROUTED: list[dict[str, Any]] = [
    {"name": "mixture_of_depths", "layers": "1::2", "capacity": 0.5, "decision": "threshold"},
    {"name": "token_selective", "layers": "2:"},
]
FORMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "routed": {"mechanisms": ROUTED},
    "tied": {"tie_word_embeddings": True, "embedding_scale": 3.0},
    "other parts": {"norm": "layernorm", "positions": "learned", "mlp": "plain", "attention_bias": True},
    "candidates": {"hidden_size": 64, "head_candidates": 23, "head_directions": 64},
}


def model(seed: int = 0, **options: Any) -> skipstone.SkipstoneForCausalLM:
    return tiny_model(seed, **{"num_hidden_layers": 3, "vocab_size": 23, "initializer_range": 0.3, **options})


def ids(rows: int = 1, tokens: int = 7, seed: int = 1) -> Tensor:
    return torch.randint(0, 23, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def head_of(target: skipstone.SkipstoneForCausalLM, shortlist: int = 12) -> DraftHead:
    """An untrained head of some of the tokens, whose guesses stand now and then."""
    torch.manual_seed(1)
    head = new_head(target, shortlist)
    head.shortlist_R.copy_(torch.arange(0, 2 * shortlist, 2)[:shortlist].clamp(max=22))
    return head.eval()


@pytest.mark.parametrize(
    ("form", "int8"),
    [
        pytest.param(form, int8, marks=() if i % 2 == int8 else pytest.mark.slow)
        for i, form in enumerate(FORMS)
        for int8 in (False, True)
    ],
)
def test_greedy_text_is_the_same(form: str, int8: bool) -> None:
    target = quantise(model(**FORMS[form])) if int8 else model(**FORMS[form])
    head, plain = head_of(target), generate(target, ids(), max_new_tokens=30)
    for length in (1, 4, None):
        assert torch.equal(generate(target, ids(), max_new_tokens=30, draft=head, draft_length=length), plain)


def test_a_head_that_rests_begins_anew_and_the_text_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    target, rests = model(), cycle([3, 0, 0, 0])
    head, plain = head_of(target), generate(target, ids(2), max_new_tokens=30)
    monkeypatch.setattr(Length, "rest", lambda self: next(rests))
    monkeypatch.setattr(Length, "next", lambda self, most, kind=0: min(2, most))
    steps = list(stream(target, ids(2), max_new_tokens=30, draft=head))
    assert torch.equal(torch.stack([step.token_B for step in steps], 1), plain[:, 7:])


@pytest.mark.parametrize("prompt", [2, WINDOW - 1, WINDOW + 9])
def test_rows_with_padding_and_ends_are_the_same(prompt: int) -> None:
    target, given = model(mechanisms=ROUTED), ids(3, prompt)
    mask = torch.ones_like(given)
    mask[0, : prompt - 1] = 0
    mask[1, : prompt // 2] = 0
    end = int(generate(target, given, mask, max_new_tokens=8)[0, -3])
    options: dict[str, Any] = {"max_new_tokens": 24, "eos_token_id": end, "pad_token_id": 0}
    plain = generate(target, given, mask, **options)
    assert torch.equal(generate(target, given, mask, **options, draft=head_of(target), draft_length=3), plain)


def one_by_one(target: skipstone.SkipstoneForCausalLM, head: DraftHead, text_1T: Tensor, count: int) -> Tensor:
    """The proposals after a text by the head without a cache, over all tokens of the text: the specification."""
    ready, found = ReadyHead(head, target), text_1T
    hidden = target.model(text_1T[:, :-1], use_cache=False).last_hidden_state
    for _ in range(count):
        hidden = torch.cat((hidden, ready(hidden, target.model.embed_tokens(found[:, 1:]), None, None)[:, -1:]), 1)
        found = torch.cat((found, ready.token(hidden[:, -1:])), 1)
    return found[:, -count:]


def test_proposals_are_those_without_a_cache() -> None:
    """After each of several passes, of which some tokens stood; true states take the place of guessed ones."""
    target = model()
    head, whole = head_of(target), ids(1, WINDOW)
    draft = head_draft.head_draft(target, head)
    hidden = target.model(whole, use_cache=False).last_hidden_state
    draft.see(hidden[:, :10], None)
    for at, new in ((10, 3), (13, 1), (14, 2)):
        text = whole[:, : at + 1]
        with torch.no_grad():
            assert torch.equal(draft.propose(text, None, None, 3), one_by_one(target, head, text, 3))  # type: ignore[arg-type]
        draft.see(hidden[:, at : at + new], None)


def test_after_a_while_without_guesses_the_head_begins_anew() -> None:
    target = model()
    draft = head_draft.head_draft(target, head_of(target))
    whole = ids(1, 100)
    hidden = target.model(whole, use_cache=False).last_hidden_state
    draft.see(hidden[:, :9], None)
    draft.propose(whole[:, :10], None, None, 2)  # type: ignore[arg-type]
    assert draft.cache.get_seq_length() == 9
    for at in range(9, 9 + WINDOW + 1):
        draft.see(hidden[:, at : at + 1], None)
    draft.propose(whole[:, : 9 + WINDOW + 2], None, None, 2)  # type: ignore[arg-type]
    assert draft.cache.get_seq_length() == WINDOW


@pytest.mark.slow
def test_sampled_text_keeps_its_distribution() -> None:
    """Third tokens of 1,500 rows without a draft and of 300 with one, by a chi-square test of equal distributions."""
    target, rows = model(vocab_size=6, initializer_range=0.1), 1500
    given = torch.tensor([[1, 2, 3]]).expand(rows, -1)
    plain = generate(target, given, max_new_tokens=3, temperature=1.0, seed=0)[:, -1]
    head = head_of(target, 3)
    head.shortlist_R.copy_(torch.tensor([0, 2, 5]))
    options: dict[str, Any] = {"max_new_tokens": 3, "temperature": 1.0, "draft": head, "draft_length": 2}
    drafted = [generate(target, given[:1], seed=i, **options)[0, -1] for i in range(300)]
    expected = torch.bincount(plain, minlength=6).double() / rows
    assert plausible(torch.bincount(torch.stack(drafted), minlength=6), expected * 300)


def test_training_teaches_a_head_that_is_read_from_its_folder(tmp_path: Path) -> None:
    target = model(num_hidden_layers=1)
    rows = generate(target, ids(64, 4), max_new_tokens=20, temperature=1.0, seed=1)
    begun, trained = (train_draft_head(target, rows, steps=steps, shortlist=23) for steps in (1, 60))
    assert trained.right[0] > max(0.12, 1.5 * begun.right[0])
    assert trained.rows == 60
    target.save_pretrained(tmp_path)
    loaded = skipstone.SkipstoneForCausalLM.from_pretrained(tmp_path).eval()
    save_draft_head(trained.head, tmp_path, {"steps": trained.steps})
    plain = generate(loaded, ids(), max_new_tokens=40)
    steps = list(stream(loaded, ids(), max_new_tokens=40, draft="head", draft_length=3))
    assert [int(step.token_B) for step in steps] == plain[0, 7:].tolist()
    assert any(bool(step.guessed_B) for step in steps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be from 1 to 1,000,000, got 0"),
        ({"steps": 10**30}, "steps must be from 1 to 1,000,000"),
        ({"minutes": 0.0}, "minutes must be above 0, got 0"),
        ({"steps": 1, "shortlist": 0}, "shortlist must be at least 1, got 0"),
        ({"steps": 1, "ids_NT": torch.zeros(1, 9, dtype=torch.long)}, "at least 2 rows of 5 tokens, got 1 rows of 9"),
    ],
)
def test_mistakes_in_training_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_draft_head(model(), **{"ids_NT": ids(4, 9), **options})


def saved(folder: Path, **options: Any) -> skipstone.SkipstoneForCausalLM:
    model(**options).save_pretrained(folder)
    return skipstone.SkipstoneForCausalLM.from_pretrained(folder).eval()  # type: ignore[no-any-return]


def test_heads_that_are_absent_damaged_or_of_another_model_are_refused(tmp_path: Path) -> None:
    target = saved(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no draft_head.safetensors, .*`skipstone draft-head` trains one"):
        generate(target, ids(), max_new_tokens=2, draft="head")
    save_draft_head(head_of(target), tmp_path, {})
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        save_draft_head(head_of(target), tmp_path, {})
    generate(target, ids(), max_new_tokens=2, draft="head")
    others = {
        "its width is 32, the model's 64": {"hidden_size": 64},
        "their embeddings differ": {"seed": 5},
    }
    others["the model has 9 tokens"] = {"vocab_size": 9}
    for message, options in others.items():
        with pytest.raises(ValueError, match=f"belongs to another model: .*{message}"):
            load_draft_head(model(**options), tmp_path)
        with pytest.raises(ValueError, match=f"^the draft head belongs to another model: .*{message}"):
            generate(model(**options), ids(1, 3) % 9, max_new_tokens=2, draft=head_of(target))
    load_draft_head(quantise(target), tmp_path)
    load_draft_head(target.to(torch.bfloat16), tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(Damaged, match="states another SHA-256"):
        load_draft_head(target, tmp_path)
    (tmp_path / ABOUT).write_text((tmp_path / ABOUT).read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(Damaged, match="damaged or was edited"):
        load_draft_head(target, tmp_path)
    (tmp_path / ABOUT).unlink()
    save_draft_head(head_of(target), tmp_path, {})  # weights without a description are what a killed process left


def test_the_cost_that_is_assumed_is_the_share_of_the_weights() -> None:
    target = model(num_hidden_layers=6)
    draft = head_draft.head_draft(target, head_of(target))
    assert isinstance(draft, HeadDraft)
    assert 0.1 < draft.cost < 0.4


def test_a_head_is_its_models_where_an_embedding_is_zero() -> None:
    """Tokens that never occur, such as padding, may have an embedding of zeros."""
    model = skipstone.SkipstoneForCausalLM(
        skipstone.SkipstoneConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    ).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0
    head = train_draft_head(model, torch.randint(1, 32, (16, 12)), steps=2).head
    head.require(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 1
    with pytest.raises(ValueError, match="their embeddings differ"):
        head.require(model)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_head_is_trained_for_a_quantised_model_from_a_folder(bits: int, tmp_path: Path) -> None:
    quantise(model(hidden_size=64), bits).save_pretrained(tmp_path)
    target = skipstone.SkipstoneForCausalLM.from_pretrained(tmp_path).eval()
    head = train_draft_head(target, ids(8, 12), steps=3, shortlist=12).head
    plain = generate(target, ids(), max_new_tokens=9)
    assert torch.equal(generate(target, ids(), max_new_tokens=9, draft=head), plain)


def test_a_model_that_was_not_loaded_has_no_head_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = model()
    save_draft_head(head_of(target), tmp_path, {})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="was not loaded from a folder that has one"):
        generate(target, ids(), max_new_tokens=2, draft="head")
