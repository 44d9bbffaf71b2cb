"""A head that a step reads by candidates: the kernel equals its plain form, and only steps are affected."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import skipstone
from skipstone.adapt import export_quantised
from skipstone.adapt.export import export_dense
from skipstone.measure.flops import count_flops
from skipstone.model.head_preview import preview_of, with_head_candidates
from skipstone.model.pretrained import load_pretrained
from skipstone.model.quantise import dequantise, quantise
from skipstone.ops import head_preview, int8

V, D, K, M = 700, 128, 64, 90


@pytest.fixture(scope="module")
def plain_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "num_hidden_layers": 2, "vocab_size": V, "max_position_embeddings": 64}
    config = skipstone.SkipstoneConfig(**sizes, tie_word_embeddings=True, initializer_range=0.3)
    return skipstone.SkipstoneForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids_BT():
    return torch.randint(0, V, (4, 48), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["float", "int8"])
def model(request, plain_model, ids_BT):
    start = quantise(plain_model) if request.param == "int8" else plain_model
    return with_head_candidates(start, ids_BT, M, K)


def _step(model, ids_BT):
    """Return the logits of a step, the hidden state, and the whole head's logits."""
    with torch.no_grad():
        cache = model(ids_BT[:1, :-1], use_cache=True).past_key_values
        whole = model(ids_BT[:1]).logits[0, -1]
        hidden = model.to_head(model.model(ids_BT[:1]).last_hidden_state)[:, -1]
        return model(ids_BT[:1, -1:], past_key_values=cache).logits[0, -1], hidden, whole


def test_packed_numbers_are_unpacked():
    number_VK = torch.randint(-8, 8, (5, 128)).float()
    assert torch.equal(head_preview.unpack(head_preview.pack(number_VK)), number_VK)


@pytest.mark.parametrize("weights", ["float", "int8"])
@pytest.mark.parametrize("candidates", [1, M, V])
def test_the_kernel_computes_the_plain_logits(weights, candidates):
    torch.manual_seed(candidates)
    weight_VD, x = torch.randn(V, D), torch.randn(1, 1, D)
    preview = preview_of(weight_VD, torch.randn(400, D) + 0.5, K)
    given, scale = (weight_VD, None) if weights == "float" else int8.quantise(weight_VD, 64)
    assert head_preview.takes(x, given, scale)
    found = head_preview.logits(x, preview, given, scale, candidates)[0]
    expected = head_preview.plain(x[0], preview, given, scale, candidates)
    guess = head_preview.previewed(x[0], preview)
    near = (guess - guess.topk(candidates).values[:, -1:]).abs() < 2e-3  # rounding may exchange neighbours of the edge
    assert torch.allclose(found[~near], expected[~near], atol=2e-3)
    whole = int8.linear(x[0], given, scale) if scale is not None else x[0] @ given.t()
    assert int(torch.isclose(found, whole, atol=1e-4, rtol=0).sum()) >= candidates
    assert int(torch.isclose(found, guess, atol=2e-3).sum()) >= V - candidates


def test_equal_previews_are_taken_from_the_front():
    """Of a head whose rows are all equal, the first `candidates` are read."""
    weight_VD, x = torch.ones(V, D), torch.full((1, D), 0.01)
    zero = torch.zeros
    packed = head_preview.pack(zero(V, K))
    preview = head_preview.Preview(zero(K + 1, D), zero(K + 1), packed, torch.ones(V), zero(V))
    found = head_preview.logits(x, preview, weight_VD, None, 10)[0]
    assert torch.allclose(found[:10], torch.tensor(0.01 * D))
    assert torch.equal(found[10:], zero(V - 10))


def test_a_step_reads_candidates_and_a_prompt_the_whole_head(model, ids_BT):
    step, hidden, whole = _step(model, ids_BT)
    expected = model.head_preview.plain(hidden, model.lm_head)[0]
    assert torch.allclose(step, expected, atol=2e-2, rtol=1e-2)
    assert not torch.allclose(step, whole, atol=1e-3)
    assert int(step.argmax()) == int(whole.argmax())
    assert int(torch.isclose(step, whole, atol=1e-2).sum()) >= M


def test_every_row_a_candidate_is_the_whole_head(model, ids_BT):
    before = model.head_preview.candidates
    model.head_preview.candidates = V
    try:
        step, _, whole = _step(model, ids_BT)
    finally:
        model.head_preview.candidates = before
    assert torch.allclose(step, whole, atol=1e-2)


def test_the_preview_finds_more_than_chance(model, ids_BT):
    """Candidates are the likeliest tokens: of the best 20 nearly all, where a random choice has one in eight."""
    with torch.inference_mode():
        hidden = model.to_head(model.model(ids_BT).last_hidden_state).flatten(0, 1)
        whole = model.lm_head(hidden)
        guess = head_preview.previewed(hidden, model.head_preview.preview)
    best, kept = whole.topk(20).indices, guess.topk(M).indices
    found = (best[:, :, None] == kept[:, None, :]).any(2).float().mean()
    assert found > 0.5


def test_flops_that_ran_are_those_of_the_cost_model(model, ids_BT):
    with torch.inference_mode():
        cache = model(ids_BT[:1, :8], use_cache=True).past_key_values
        counted = count_flops(lambda: model(ids_BT[:1, 8:9], past_key_values=cache))
    cost = model.cost(tokens=1, past=8)
    assert counted.unknown == ()
    assert counted.by_kind["head"] == cost.forward.head == model.head_preview.flops()
    assert counted.total == cost.forward.total
    assert cost.dense.forward.head == 2 * V * D
    assert model.cost(tokens=8).forward.head == 8 * 2 * V * D


def test_saved_and_loaded_it_computes_the_same(model, ids_BT, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    loaded = skipstone.SkipstoneForCausalLM.from_pretrained(tmp_path / "saved").eval()
    # Not bit for bit: weights from a file lie at other addresses, and some processors then add up in another order
    # (1e-6 of these logits; 1e-4 with int8 weights, for which tokens are rounded).
    near = 1e-5 if model.config.weight_format == "float" else 1e-3
    torch.testing.assert_close(_step(model, ids_BT)[0], _step(loaded, ids_BT)[0], rtol=1e-5, atol=near)
    low = load_pretrained(tmp_path / "saved", "bfloat16")
    assert low.head_preview.scale.dtype == low.head_preview.turn.dtype == torch.float32
    assert torch.equal(low.head_preview.packed, model.head_preview.packed)
    assert model.to(torch.float64).head_preview.scale.dtype == torch.float32
    model.to(torch.float32)


def test_greedy_text_is_that_of_the_whole_head_here(model, ids_BT):
    found = model.generate(ids_BT[:1, :8], max_new_tokens=12, do_sample=False, pad_token_id=0)
    model.head_preview.candidates, before = V, model.head_preview.candidates
    whole = model.generate(ids_BT[:1, :8], max_new_tokens=12, do_sample=False, pad_token_id=0)
    model.head_preview.candidates = before
    assert torch.equal(found, whole)


def test_quantised_later_it_keeps_its_preview(plain_model, ids_BT):
    small = quantise(with_head_candidates(plain_model, ids_BT, M, K))
    assert torch.equal(dequantise(small).head_preview.packed, small.head_preview.packed)
    with pytest.raises(ValueError, match="has head_candidates already"):
        with_head_candidates(small, ids_BT, M, K)


def test_a_head_with_a_hook_is_called(model, ids_BT):
    seen = []
    hook = model.lm_head.register_forward_hook(lambda *args: seen.append(args))
    try:
        with pytest.warns(UserWarning, match="the whole head is read"):
            model(ids_BT[:1, :1])
    finally:
        hook.remove()
    assert len(seen) == 1


def test_it_is_not_trained(plain_model, ids_BT):
    model = with_head_candidates(plain_model, ids_BT, M, K).train()
    with pytest.raises(ValueError, match="cannot be trained"):
        model(ids_BT, labels=ids_BT)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_candidates": 0, "head_directions": 64}, "head_candidates must be from 1 to vocab_size"),
        ({"head_candidates": V + 1, "head_directions": 64}, "head_candidates must be from 1 to vocab_size"),
        ({"head_candidates": 5, "head_directions": 96}, "head_directions must be a multiple of 64 from 64 to 128"),
        ({"head_candidates": 5}, "head_directions must be a multiple of 64"),
        ({"head_directions": 64}, "head_candidates must be from 1"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        skipstone.SkipstoneConfig(vocab_size=V, hidden_size=D, **fields)


@pytest.mark.parametrize("bits", [None, 8])
def test_a_dense_export_has_the_whole_head(plain_model, ids_BT, bits, tmp_path):
    start = plain_model if bits is None else quantise(plain_model, bits)
    model = with_head_candidates(start, ids_BT, M, K)
    model.save_pretrained(tmp_path / "ours")
    export_dense(tmp_path / "ours", tmp_path / "dense")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    with torch.no_grad():
        far = 1e-4 if bits is None else 0.02  # int8 rounds tokens to int16
        torch.testing.assert_close(theirs(ids_BT).logits, model(ids_BT).logits, rtol=far, atol=far)


def test_candidates_out_of_range_are_refused_before_weights_are_rounded(plain_model, tmp_path, monkeypatch):
    plain_model.save_pretrained(tmp_path / "plain")
    monkeypatch.setattr(export_quantised, "quantise", lambda *_: pytest.fail("rounded"))
    for options, says in (((V + 1, K), "head_candidates must be from 1"), ((M, 100), "multiple of 64")):
        head = export_quantised.HeadCandidates(candidates=options[0], directions=options[1])
        with pytest.raises(ValueError, match=says):
            export_quantised.export_quantised(tmp_path / "plain", tmp_path / "out", head)
