"""Distillation, block influence and budgets agree with their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from adapt.sources import VOCAB, mixture, source_model
from skipstone.adapt import start
from skipstone.adapt.distillation import logit_divergence, stream_error
from skipstone.adapt.flop_budget import solve
from skipstone.adapt.influence import block_influence, choose_layers, site_streams, table, token_influence
from skipstone.adapt.start import fit_skip, start_measured
from skipstone.adapt.student import drop_blocks, route, with_defaults
from skipstone.mechanisms.skip_path import LowRankSkip
from skipstone.model.config import SkipstoneConfig
from skipstone.train.setup import plain


def test_divergence_by_hand() -> None:
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    asked = torch.tensor([[True, False, True], [True, True, False]])
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    expected = 4 * (p * (p / q).log()).sum(-1)[asked].sum()
    assert logit_divergence(student, teacher, asked, 2.0).item() == pytest.approx(expected.item(), rel=1e-5)
    assert logit_divergence(teacher, teacher, asked, 2.0).item() == pytest.approx(0, abs=1e-6)


def test_a_warm_temperature_keeps_the_size_of_the_gradient() -> None:
    """For logits that hardly differ T^2 KL does not depend on T, in the limit of large T."""
    teacher = torch.randn(1, 1, 7)
    student = teacher + 0.3 * torch.randn(1, 1, 7)
    asked = torch.ones(1, 1, dtype=torch.bool)
    one, two = (logit_divergence(student, teacher, asked, t).item() for t in (10.0, 20.0))
    assert one == pytest.approx(two, rel=0.1)


def test_stream_error_is_relative() -> None:
    teacher = torch.randn(2, 3, 4)
    asked = torch.ones(2, 3, dtype=torch.bool)
    asked[0, 0] = False
    error = stream_error([teacher * 1.1], [teacher], asked).item()
    assert error == pytest.approx(0.01 * 5, rel=1e-4)
    assert stream_error([teacher * 1.1], [teacher * 1.0], asked) == stream_error(
        [teacher * 1.1 * 8], [teacher * 8], asked
    )


def rows(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(0, VOCAB, (1, 30), generator=generator)} for _ in range(count)]


def test_block_influence_by_hand() -> None:
    model = source_model()
    with torch.no_grad():
        first = model(rows(1)[0]["input_ids"], output_hidden_states=True).hidden_states
        scores = block_influence(model, rows(1))
    for i in range(2):  # what the model calls the last hidden state is normed
        turned = (1 - F.cosine_similarity(first[i], first[i + 1], dim=-1)).mean().item()
        assert scores[i] == pytest.approx(turned, abs=1e-5)
    assert len(scores) == 3


def test_a_block_that_adds_nothing_has_no_influence_and_is_chosen() -> None:
    model = source_model()
    with torch.no_grad():
        for name, parameter in model.model.layers[1].named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
    scores = block_influence(model, rows())
    assert scores[1] == 0
    assert choose_layers({"score": "block_influence", "count": 1}, scores, "layers") == [1]
    assert choose_layers({"score": "block_influence", "count": 1, "among": "2:"}, scores, "layers") == [2]
    assert table(scores, {"mixture_of_depths": [1]}).splitlines()[-1].split() == ["1", "0.0000", "mixture_of_depths"]
    smaller = drop_blocks(model, [1])
    with torch.no_grad():
        ids = rows(1)[0]["input_ids"]
        assert torch.equal(smaller(ids).logits, model(ids).logits)


def test_padding_counts_nowhere() -> None:
    model = source_model()
    ids = rows(1)[0]["input_ids"]
    padded = {"input_ids": F.pad(ids, (0, 5)), "attention_mask": F.pad(torch.ones_like(ids), (0, 5))}
    assert block_influence(model, [padded]) == pytest.approx(block_influence(model, [{"input_ids": ids}]), abs=2e-6)


@pytest.mark.parametrize(
    ("site", "norm"),
    [
        *((site, True) for site in ("block", "attention", "mlp")),
        ("block", False),
        *(pytest.param(site, False, marks=pytest.mark.slow) for site in ("attention", "mlp")),
    ],
)
def test_a_measured_start_ranks_tokens_and_guesses_updates(norm: bool, site: str) -> None:
    model = source_model().requires_grad_(False)
    entry = mixture(capacity=0.25, router_norm=norm, on=site, skip="low_rank", skip_rank=16)
    values = {**plain(model.config), "mechanisms": with_defaults([entry])}
    student = route(model, SkipstoneConfig.from_plain(values), 0)
    start_measured(student, model, rows(20))
    mechanism = next(iter(student.model.layers[1].mechanisms.values()))
    before, after = (torch.cat([b[1][site][side] for b in site_streams(model, rows(20))]) for side in (0, 1))
    score = mechanism.router(before[None])[0]
    guess = mechanism.skip.guess(before)
    target = token_influence(before + guess, after).clamp(min=1e-9).log()  # what the skip path leaves undone
    # what attention fetches from elsewhere, with random weights, is hardly to be seen in the token itself
    assert torch.corrcoef(torch.stack((score, target)))[0, 1] > (0.15 if site == "attention" else 0.4)
    update, small = after - before, target <= target.quantile(0.75)
    assert (update - guess)[small].square().sum() < (0.97 if site == "attention" else 0.8) * update[
        small
    ].square().sum()


def test_fitting_in_turns_leaves_less_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    undone = []
    for rounds in (1, 3):
        monkeypatch.setattr(start, "ROUNDS", rounds)
        model = source_model().requires_grad_(False)
        entry = mixture(capacity=0.5, skip="low_rank", skip_rank=8)
        config = SkipstoneConfig.from_plain({**plain(model.config), "mechanisms": with_defaults([entry])})
        student = route(model, config, 0)
        start.start_measured(student, model, rows(20))
        before, after = (torch.cat([b[1]["block"][side] for b in site_streams(model, rows(20))]) for side in (0, 1))
        skip = next(iter(student.model.layers[1].mechanisms.values())).skip
        undone.append(token_influence(before + skip.guess(before), after).sort().values[: len(before) // 2].mean())
    assert undone[1] < undone[0]


def test_streams_are_those_of_the_sites() -> None:
    model = source_model()
    row = rows(1)[0]
    with torch.no_grad():
        hidden = model(row["input_ids"], output_hidden_states=True).hidden_states
    found = next(site_streams(model, [row]))
    for i in range(2):
        sites = found[i]
        assert torch.equal(sites["block"][0], hidden[i][0])
        assert torch.equal(sites["mlp"][1], hidden[i + 1][0])
        assert torch.equal(sites["attention"][1], sites["mlp"][0])
        assert not torch.equal(*sites["attention"])


def test_a_skip_path_of_full_rank_is_least_squares() -> None:
    skip, map_DD = LowRankSkip(6, 6), torch.randn(6, 6)
    x = torch.randn(200, 6)
    with torch.no_grad():
        fit_skip(skip, x, x @ map_DD)
        assert torch.allclose(skip.guess(x), x @ map_DD, rtol=2e-2, atol=5e-2)  # a ridge of a per cent


def test_a_huge_token_does_not_decide_the_skip_path() -> None:
    """The first token of a row may be a hundred times as large as the others, and goes its own way."""
    skip, map_DD = LowRankSkip(6, 6), torch.randn(6, 6)
    x, huge = torch.randn(400, 6), 500 * torch.randn(4, 6)
    with torch.no_grad():
        fit_skip(skip, torch.cat((x, huge)), torch.cat((x @ map_DD, torch.zeros(4, 6))))
        assert (skip.guess(x) - x @ map_DD).norm() < 0.2 * (x @ map_DD).norm()


TSA, EXIT = {"name": "token_selective", "layers": ":"}, {"name": "early_exit", "layers": "1:"}


@pytest.mark.parametrize(
    "mechanisms",
    [
        [mixture(layers=":")],
        [mixture(on="attention"), mixture(on="mlp")],
        [mixture(kv="full")],
        [mixture(skip="low_rank", skip_rank=2)],
        [mixture(layers=":"), TSA],
        [TSA],
        [EXIT],
    ],
    ids=str,
)
def test_the_promise_is_the_budget(mechanisms: list[dict[str, Any]]) -> None:
    dense = source_model()
    flops, tokens = dense.cost(tokens=32).forward.total, 32
    values = {**plain(dense.config), "mechanisms": with_defaults(mechanisms)}
    capacity, passing = solve(SkipstoneConfig.from_plain(values), 0.85, flops, tokens)
    assert (capacity is None) != (passing is None)
    if capacity is not None:
        for entry in values["mechanisms"]:
            if entry["name"] == "mixture_of_depths":
                entry["capacity"] = capacity
        promised = route(dense, SkipstoneConfig.from_plain(values), 0).cost(tokens=tokens)
        assert promised.forward.total / flops == pytest.approx(0.85, abs=2e-4)
