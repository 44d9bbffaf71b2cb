"""Neurons left out inside the compiled step: what is read, how it lies, when it is not tried, and what is noticed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from models import tiny_model
from skipstone import SkipstoneForCausalLM
from skipstone.model.quantise import dequantise, quantise
from skipstone.nn import neuron_shares
from skipstone.ops import decode_stack

pytest.importorskip("numba")

ZEROS = {"activation": "relu", "neuron_groups": {"decision": "zeros"}}
MAGNITUDE = {"neuron_groups": {"decision": "magnitude", "group_size": 1, "capacity": 0.5, "down_capacity": 0.25}}
STEPS = 12


def model(rounded: bool = False, **options: Any) -> SkipstoneForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "initializer_range": 0.1}
    built = tiny_model(**{**sizes, **(options or ZEROS)})
    return quantise(built) if rounded else built


@torch.no_grad()
def logits(given: SkipstoneForCausalLM, change: Any = lambda step: None, steps: int = STEPS) -> torch.Tensor:
    ids = torch.randint(0, 61, (1, 4 + steps), generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=given.config)
    found = [given(ids[:, :4], past_key_values=cache, use_cache=True).logits]
    for step in range(steps):
        change(step)
        found.append(given(ids[:, 4 + step : 5 + step], past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, 1)


def general(given: SkipstoneForCausalLM, monkeypatch: pytest.MonkeyPatch, **more: Any) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(decode_stack, "MOST_TOKENS", 0)
        return logits(given, **more)


def downs(given: SkipstoneForCausalLM) -> list[torch.Tensor]:
    return [block.mlp.down_proj.weight for block in given.model.layers]


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(("tokens", "first", "last"), [(1, 0, 192), (5, 0, 192), (1, 16, 112), (4, 96, 192)])
def test_reading_some_neurons_equals_reading_all_to_the_last_bit(
    rounded: bool, tokens: int, first: int, last: int
) -> None:
    """Of the last matrix, whose sums over neurons are chains in their order; and both equal the plain product."""
    from skipstone.ops.int8 import quantise as rounded_matrix
    from skipstone.ops.int8 import restore
    from skipstone.ops.int8_native import round_tokens
    from skipstone.ops.neuron_rows_native import summed, summed_int8

    generator, neurons, width = torch.Generator().manual_seed(0), 256, 192
    weight_DF = torch.randn(width, neurons, generator=generator)
    h_KF = torch.randn(tokens, neurons, generator=generator)
    off_F = torch.rand(neurons, generator=generator) < 0.7
    off_F[64:128] = True  # a whole group of int8 scales
    h_KF[:, off_F] = 0
    number, scale = rounded_matrix(weight_DF, 64)
    weight_DF = restore(number, scale) if rounded else weight_DF
    lying = [x.t().contiguous() for x in ((number, scale) if rounded else (weight_DF,))]
    whole_KF, unit_K = np.empty((tokens, neurons), np.int16), np.empty(tokens, np.float32)
    places = (h_KF.data_ptr(), whole_KF.ctypes.data, unit_K.ctypes.data)
    round_tokens.ctypes(*places, tokens, neurons)
    matrix = (lying[0].data_ptr(), lying[1].data_ptr() if rounded else 0, neurons // 64 if rounded else 1)
    found = []
    for rows in ((~off_F).nonzero()[:, 0], torch.arange(neurons)):
        y_KD = torch.full((tokens, width), torch.nan)
        listed = (rows.data_ptr(), len(rows), y_KD.data_ptr())
        sums = summed_int8 if rounded else summed
        sums.ctypes(*matrix, *places, tokens, neurons, width, *listed, first, last)
        found.append(y_KD[:, first:last])
        assert y_KD[:, :first].isnan().all()
        assert y_KD[:, last:].isnan().all()
    assert found[0].equal(found[1])
    exact = (h_KF.double() @ weight_DF.double().t())[:, first:last]
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-4, atol=2e-3 if rounded else 1e-4)


@pytest.mark.parametrize("rounded", [False, True])
def test_the_last_matrix_lies_neuron_by_neuron_and_is_the_same(rounded: bool, tmp_path: Path) -> None:
    given = model(rounded)
    before = {name: x.clone() for name, x in given.state_dict().items()}
    text = logits(given)
    assert all(x.t().is_contiguous() and not x.is_contiguous() for x in downs(given))
    assert all(torch.equal(x, before[name]) for name, x in given.state_dict().items())
    close = {"rtol": 1e-4, "atol": 2e-3 if rounded else 1e-4}  # the prompt's products may be summed in another order
    torch.testing.assert_close(logits(copy.deepcopy(given)), text, **close)
    given.save_pretrained(tmp_path)
    read = SkipstoneForCausalLM.from_pretrained(tmp_path).eval()
    assert all(torch.equal(x, before[name]) for name, x in read.state_dict().items())
    torch.testing.assert_close(logits(read), text, **close)
    if rounded:
        assert all(x.isfinite().all() for x in dequantise(given).state_dict().values())


@pytest.mark.parametrize("rounded", [False, True])
def test_two_rows_read_the_matrix_as_it_lies(rounded: bool) -> None:
    given, other = model(rounded), model(rounded)
    logits(given)
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(given(ids).logits, other(ids).logits, rtol=1e-4, atol=2e-3 if rounded else 1e-4)
        torch.testing.assert_close(
            given(ids[:, :2]).logits, other(ids[:, :2]).logits, rtol=1e-4, atol=2e-3 if rounded else 1e-4
        )


@pytest.mark.parametrize("rounded", [False, True])
def test_skipping_stops_where_too_many_neurons_are_on(rounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second block, nearly all neurons of which are never at zero; the first goes on."""
    monkeypatch.setattr(neuron_shares, "STEPS", 4)
    mix = {"name": "fixed_mix", "groups": [{"relu": 128}, {"silu": 127, "relu": 1}]}
    given = model(activation=mix, neuron_groups={"decision": "zeros"})
    given = quantise(given) if rounded else given
    want, lay = general(given, monkeypatch), []
    got = logits(given, change=lambda step: lay.append([x.t().is_contiguous() for x in downs(given)]))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-3 if rounded else 1e-4)
    assert lay[4] == [True, True]
    assert lay[-1] == [True, False]
    assert [block.mlp.skips for block in given.model.layers] == [True, False]
    assert all(block.mlp.skips for block in given.train().model.layers)


def test_a_share_is_that_of_the_tokens_that_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuron_shares, "STEPS", 8)
    given = model()
    shares = neuron_shares.NeuronShares(given.model.layers)
    for step in range(8):  # the first block gets every second token, all neurons of which are on; the second 80 %
        shares.add([[1, step % 2, 128 * (step % 2)], [1, 1, 102]])
    assert [block.mlp.skips for block in given.model.layers] == [False, True]


@pytest.mark.parametrize("rounded", [False, True])
def test_another_number_of_neurons_is_seen(rounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(step: int) -> None:
        if step == 3:
            given.model.layers[1].mlp.router.schedule.pin(0.75)
        elif step == 6:
            given.model.layers[0].mlp.router.set_identity()
        elif step == 9:
            given.model.layers[1].mlp.router.typical_F = torch.linspace(0, 1, 128)

    given = start = model(rounded, **MAGNITUDE)
    given = copy.deepcopy(start)
    unchanged = logits(given)
    given = copy.deepcopy(start)
    got = logits(given, change=changed)
    given = copy.deepcopy(start)
    want = general(given, monkeypatch, change=changed)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-3 if rounded else 1e-4)
    for step in (4 + 3, 4 + 6, 4 + 9):
        assert not torch.allclose(got[:, step], unchanged[:, step], rtol=1e-3, atol=1e-3)
