"""The benefit of blocks for tokens: what is measured on a model in which it is known, and on any dense model."""

from __future__ import annotations

import pytest
import torch

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.data.rows import Row
from skipstone_studies.benefit import (
    CAUSAL,
    ORACLE,
    RANDOM,
    Regression,
    maskable,
    measured_benefit,
    nats_with,
    oracle,
    top,
    trace,
)

SIZES = {"vocab_size": 12, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 16}


def model(**options: object) -> SkipstoneForCausalLM:
    torch.manual_seed(0)
    found = SkipstoneForCausalLM(SkipstoneConfig(**SIZES, num_hidden_layers=3, **options)).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(2.0)
    return found


def rows(count: int = 6, seed: int = 1) -> list[Row]:
    ids = torch.randint(0, 12, (count, 16), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, 0] = -100
    return [{"input_ids": ids[i], "labels": labels[i]} for i in range(count)]


def test_with_all_tokens_kept_the_model_is_the_dense_one() -> None:
    dense = model()
    plain, given = maskable(dense), rows()
    found = trace(plain, given, [(1,), (0, 1, 2)])
    ids = torch.stack([row["input_ids"] for row in given])
    out = dense(input_ids=ids, labels=torch.stack([row["labels"] for row in given]))
    torch.testing.assert_close(found.nats[found.predicted].mean(), out.loss, rtol=1e-5, atol=1e-6)
    everything = torch.ones_like(found.predicted)
    torch.testing.assert_close(nats_with(plain, given, (0, 1, 2), everything), found.nats, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(nats_with(plain, given, (0, 1, 2), ~everything), found.nats)
    torch.testing.assert_close(found.surprise.view(6, 16)[:, 1:], found.nats.view(6, 16)[:, :-1])
    assert (found.gradient[1,] >= 0).all()


def test_a_block_that_does_nothing_has_no_benefit() -> None:
    dense = model()
    with torch.no_grad():
        for parameter in dense.decoder.layers[1].parameters():
            parameter.zero_()
    plain, generator = maskable(dense), torch.Generator().manual_seed(0)
    assert measured_benefit(plain, rows(), (1,), 1, generator).abs().max() < 1e-6
    assert measured_benefit(plain, rows(), (0,), 1, generator).abs().max() > 1e-3


def test_tokens_chosen_by_benefit_beat_random_ones() -> None:
    found = oracle(model(), rows(8, 1), rows(8, 2), [(0,), (1, 2)], repeats=2)
    for unit in found["units"]:
        for share in ("0.125", "0.25", "0.5"):
            assert unit["kept"][share][ORACLE] < unit["kept"][share][RANDOM]
        assert unit["correlation"][ORACLE] == pytest.approx(1)
    assert oracle(model(), rows(8, 1), rows(8, 2), [(0,)]) == oracle(model(), rows(8, 1), rows(8, 2), [(0,)])


def test_the_regression_finds_what_the_stream_tells() -> None:
    generator = torch.Generator().manual_seed(0)
    stream, surprise = torch.randn(2000, 8, generator=generator), torch.rand(2000, generator=generator)
    benefit = stream[:, 0] - 0.5 * stream[:, 1].relu() + 0.1 * torch.randn(2000, generator=generator)
    fit = Regression(stream[:1500], surprise[:1500], benefit[:1500], generator)
    guess = fit(stream[1500:], surprise[1500:])
    assert float(torch.corrcoef(torch.stack([guess, benefit[1500:]]))[0, 1]) > 0.95
    noise = Regression(stream[:1500], surprise[:1500], torch.randn(1500, generator=generator), generator)
    assert abs(float(torch.corrcoef(torch.stack([noise(stream, surprise), benefit]))[0, 1])) < 0.5


def test_a_share_of_the_tokens() -> None:
    kept = top(torch.tensor([0.1, 3.0, -1.0, 2.0]), 0.5)
    assert kept.tolist() == [False, True, False, True]
    assert CAUSAL != RANDOM


def test_a_routed_model_is_refused() -> None:
    with pytest.raises(ValueError, match="measured on a dense model"):
        maskable(model(mechanisms=[{"name": "mixture_of_depths", "layers": [1]}]))
