"""What the page is told is what the model did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from skipstone.data.tokenizers import byte_tokenizer
from skipstone.generate.engine import generate
from skipstone.measure.flops import count_flops
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig
from skipstone.nn.attention import CAPPING
from skipstone.ops.reference import rotate
from skipstone.view.live_model import LiveModel
from skipstone.view.live_session import Request, events, read_request

PROMPT = "a <b> é"


@pytest.fixture(scope="module")
def model(saved: Path) -> LiveModel:
    return LiveModel(saved, "small")


def told(model: LiveModel, **options: Any) -> list[dict[str, Any]]:
    usual = {"prompt": PROMPT, "models": [0], "new_tokens": 5, "temperature": 0.0, "twin": False}
    return list(events([model], Request(**{**usual, **options})))


def test_every_token_is_chosen_as_generate_chooses_it_and_read_once(model: LiveModel) -> None:
    found = told(model)
    assert [event["type"] for event in found] == ["start", *["pass"] * 5, "end"]
    ids = model.encode(PROMPT)
    continued = generate(model.model, torch.tensor([ids]), max_new_tokens=5)[0].tolist()
    passes = found[1:-1]
    assert [event["token"]["label"] for event in passes] == [model.tokenizer.decode([i]) for i in continued[len(ids) :]]
    assert "".join(token["text"] for token in found[0]["prompt"]) == PROMPT
    assert [event["first"] for event in passes] == [0, *range(len(ids), len(ids) + 4)]
    assert [len(event["read"]) for event in passes] == [len(ids), 1, 1, 1, 1]


def test_what_a_pass_tells_of_a_token_is_what_one_pass_over_all_of_them_says(model: LiveModel) -> None:
    found = told(model)
    read = [token for event in found[1:-1] for token in event["read"]]
    ids = model.encode(PROMPT)
    continued = generate(model.model, torch.tensor([ids]), max_new_tokens=5)
    with torch.no_grad():
        out = model.model(input_ids=continued[:, :-1], routing="causal", output_records=True)
    log_TV = out.logits[0].log_softmax(-1)
    for t, token in enumerate(read):
        assert token["loss"] == pytest.approx(-float(log_TV[t, continued[0, t + 1]]), rel=1e-3)
        assert token["entropy"] == pytest.approx(float(-(log_TV[t].exp() * log_TV[t]).sum()), rel=1e-3)
        record = out.records[1]["mixture_of_depths"]
        assert token["kept"][1] == bool(record.kept_BT[0, t])
        assert token["score"][1] == pytest.approx(float(record.score_BT[0, t]), rel=1e-3)
        assert len(token["kept"]) == len(model.describe()["slots"]) == 4
    assert {token["kept"][1] for token in read} == {True, False}


def test_the_flops_are_those_of_the_operations_that_generate_executes(model: LiveModel) -> None:
    input_ids = torch.tensor([model.encode(PROMPT)])
    counted = count_flops(lambda: generate(model.model, input_ids, max_new_tokens=5))
    assert {*counted.unknown} <= {"aten.isin.Tensor_Tensor"}, "which looks for the end of the text"
    assert told(model)[-2]["flops"] == pytest.approx(counted.total, rel=1e-9)
    twin = model.twin().model
    assert told(model)[-2]["dense_flops"] == count_flops(lambda: generate(twin, input_ids, max_new_tokens=5)).total


def test_executed_flops_follow_the_budget_and_dense_ones_do_not(model: LiveModel) -> None:
    low, high = (told(model, budgets=[share])[-2] for share in (0.4, 0.46))
    assert low["dense_flops"] == high["dense_flops"]
    assert low["flops"] < high["flops"]


def test_the_budget_of_the_model_as_trained_is_told(model: LiveModel) -> None:
    told = model.describe()
    assert told["trained_budget"] == 0.43, "the point whose thresholds are nearest to the model's own"
    assert told["budgets"] == [0.4, 0.46]
    assert told["has_thresholds"]


def test_models_take_turns_and_each_has_its_twin(model: LiveModel) -> None:
    request = Request(prompt="ab", models=[0, 1], new_tokens=2)
    found = list(events([model, model], request))
    assert [(event["model"], event["type"]) for event in found] == [
        (i, kind) for kind in ("start", "pass", "pass", "end") for i in (0, 1)
    ]
    assert all(event["dense_seconds"] > 0 for event in found if event["type"] == "pass")
    assert model.twin().model.config.mechanisms == []


def test_the_map_of_neurons_has_the_logits_of_every_token(model: LiveModel) -> None:
    map_ = model.neurons()
    assert [layer["layer"] for layer in map_["layers"]] == [0, 1, 2]
    assert {len(layer["preference"]) for layer in map_["layers"]} == {24}
    read = [token for event in told(model, new_tokens=12)[1:-1] for token in event["read"]]
    for token in read:
        assert [len(layer) for layer in token["mix"]] == [len(map_["names"])] * 3
        assert (None in token["mix"][1]) == (not token["kept"][1]), "block 1 asks its neurons for kept tokens alone"
    assert {token["kept"][1] for token in read[-11:]} == {True, False}


def test_drafts_do_not_change_the_text_and_are_counted(model: LiveModel) -> None:
    plain, drafted = (told(model, prompt="abab", new_tokens=16, draft=draft)[1:-1] for draft in (None, "skip"))
    assert [event["token"] for event in drafted] == [event["token"] for event in plain]
    assert [event["first"] for event in drafted] == [event["first"] for event in plain]
    guesses, accepted = (sum(event[name] for event in drafted) for name in ("guesses", "guessed"))
    assert 0 < accepted <= guesses
    assert drafted[-1]["dense_flops"] == plain[-1]["dense_flops"]
    assert [read["loss"] for read in drafted[0]["read"]] == [read["loss"] for read in plain[0]["read"]]
    for one, other in zip(drafted[1:], plain[1:], strict=True):
        assert one["read"][0]["kept"] == other["read"][0]["kept"]
        assert one["read"][0]["loss"] == pytest.approx(other["read"][0]["loss"], rel=1e-3)


def test_attention_of_a_token_is_that_of_the_pass_and_absent_where_it_skips(model: LiveModel) -> None:
    ids = model.encode("to be, or not to be: that is")
    with torch.no_grad():
        out = model.model(input_ids=torch.tensor([ids]), routing="causal", output_records=True)
    kept_T = out.records[1]["mixture_of_depths"].kept_BT[0].tolist()
    assert {*kept_T} == {True, False}
    usual = model.model.config._attn_implementation
    for t in (0, 5, kept_T.index(True), kept_T.index(False), len(ids) - 1):
        layers = model.attention(ids[: t + 1], None)
        assert [row is None for row in layers][:2] == [False, not kept_T[t]]
        for row in (row for row in layers if row is not None):
            assert len(row) == t + 1
            assert sum(row) == pytest.approx(1, abs=1e-3)
        if layers[1] is not None:
            skipped = [weight for weight, kept in zip(layers[1], kept_T, strict=False) if not kept]
            assert max(skipped, default=0) == 0, "block 1 has no keys of tokens that skip it"
    assert model.model.config._attn_implementation == usual
    query, key = first_block(model, ids)
    by_hand = (query[:, -1:] @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1).mean(0)[0]
    assert model.attention(ids, None)[0] == pytest.approx(by_hand.tolist(), abs=1e-4)


@pytest.mark.parametrize("count", [3, 4, 9, 28])
def test_attention_in_bands_and_with_capped_scores(saved: Path, tmp_path: Path, count: int) -> None:
    window, cap = 4, 0.5
    options = {"attention_window": window, "window_layers": [0, 1], "attention_soft_cap": cap}
    whole = LiveModel(saved, "whole").model
    torch.manual_seed(1)
    config = SkipstoneConfig(**{**whole.config.to_dict(), **options, "mechanisms": []})
    SkipstoneForCausalLM(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    model = LiveModel(tmp_path / "model", "windowed")
    ids = model.encode("to be, or not to be: that is")[:count]
    rows = model.attention(ids, None)
    query, key = first_block(model, ids)
    score_HT = (query[:, -1:] @ key.transpose(1, 2) / query.shape[-1] ** 0.5)[:, 0]
    score_HT = cap * (score_HT / cap).tanh()
    score_HT[:, : max(len(ids) - window, 0)] = -torch.inf
    assert rows[0] == pytest.approx(score_HT.softmax(-1).mean(0).tolist(), abs=1e-4)
    assert [len(row) for row in rows] == [len(ids)] * 3
    assert [sum(row) for row in rows] == pytest.approx([1, 1, 1], abs=1e-3)
    assert sum(weight > 0 for weight in rows[1]) == min(window, len(ids))
    assert sum(weight > 0 for weight in rows[2]) == len(ids), "the last block has no window"
    assert "skipstone_watched" not in CAPPING


def first_block(model: LiveModel, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [H, T, E] of the first block, which routes nothing."""
    found: dict[str, torch.Tensor] = {}
    block = model.blocks[0]
    hook = block.self_attn.register_forward_pre_hook(
        lambda module, args: found.update(x=args[0], cos=args[1].rotary[0], sin=args[1].rotary[1])
    )
    with torch.no_grad():
        model.model(input_ids=torch.tensor([ids]), routing="causal", use_cache=False)
        hook.remove()
        heads = [
            projected(found["x"]).unflatten(-1, (2, -1)).transpose(1, 2)
            for projected in (block.self_attn.q_proj, block.self_attn.k_proj)
        ]
        query, key = (rotate(one, found["cos"], found["sin"])[0] for one in heads)
    return query, key


def test_rejected_guesses_are_told_with_the_token_that_replaces_them(model: LiveModel) -> None:
    drafted = told(model, prompt="abab", new_tokens=24, draft="skip", temperature=2.0)[1:-1]
    assert drafted[0]["rejected"] == [], "nothing is proposed before the prompt is read"
    assert any(event["rejected"] for event in drafted)
    for event in drafted:
        assert not (event["rejected"] and event["guessed"])
        assert event["token"]["id"] not in [guess["id"] for guess in event["rejected"][:1]], "another one was chosen"
    guesses, accepted = (sum(event[name] for event in drafted) for name in ("guesses", "guessed"))
    assert 0 <= guesses - accepted - sum(len(event["rejected"]) for event in drafted) < 16, "beyond the end of the text"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompt": ""}, "prompt must have from 1 to 20,000 characters, got 0"),
        ({"prompt": "x" * 20_001}, "got 20,001"),
        ({"new_tokens": 0}, "new_tokens must be from 1 to 1,024, got 0"),
        ({"temperature": float("nan")}, "temperature must be from 0 to 10"),
        ({"seed": -1}, "seed must be from 0"),
        ({"models": [1]}, "models must be numbers from 0 to 0, each once"),
        ({"models": [0, 0]}, "each once"),
        ({"models": []}, "each once"),
        ({"budgets": [0.5, 0.5]}, "budgets must have an entry for each"),
        ({"draft": "skp"}, "did you mean 'skip'"),
        ({"promt": "x"}, "did you mean 'prompt'"),
        ({"new_tokens": "many"}, "new_tokens must be int"),
    ],
)
def test_a_request_that_cannot_be_is_refused_in_words(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_request({"prompt": "x", "models": [0], **options}, 1)


def test_what_the_model_cannot_do_is_told_before_it_starts(model: LiveModel) -> None:
    with pytest.raises(ValueError, match="leaves no room in the context of small, 96 tokens"):
        told(model, prompt="x" * 96)
    with pytest.raises(ValueError, match=r"budget 0\.9 is out of reach"):
        told(model, budgets=[0.9])
    assert len(told(model, prompt="x" * 94, new_tokens=50)) == 2 + 2, "new tokens end where the context ends"
