"""Token-Selective Attention: a state dict in the released layout agrees with the paper's formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from pretrained import plain
from published import token_layers
from skipstone import SkipstoneForCausalLM, presets
from skipstone.model.pretrained import load_model
from skipstone.model.released.convert import convert_from, load_released
from skipstone.model.released.files import Weights
from skipstone.model.released.tsa import TSA

HEADS, CONTEXT = 4, 24
CLOSE = {"rtol": 0.0, "atol": 2e-5}  # fp32, the tolerance of the laws: processors add in different orders


@pytest.fixture
def weights() -> plain.Weights:
    return plain.token_selective_weights(vocabulary=31, width=32, neurons=48, layers=4, context=CONTEXT)


@pytest.fixture
def ids_BT() -> Tensor:
    return torch.randint(0, 31, (3, CONTEXT))


@pytest.fixture
def target_BT() -> Tensor:
    return torch.randint(0, 31, (3, CONTEXT))


@pytest.fixture
def folder(tmp_path: Path, weights: plain.Weights) -> Path:
    torch.save(weights, tmp_path / "tsa.pt")
    convert_from(tmp_path / "tsa.pt", tmp_path / "model", "tsa", num_heads=HEADS)
    return tmp_path / "model"


def test_soft_logits_gates_and_metrics(folder: Path, weights: plain.Weights, ids_BT: Tensor) -> None:
    model, expected = AutoModelForCausalLM.from_pretrained(folder), plain.token_selective(weights, ids_BT, HEADS)
    assert isinstance(model, SkipstoneForCausalLM)
    for routing in ("oracle", "causal"):
        with torch.no_grad():
            out = model(ids_BT, routing=routing, output_records=True)
        assert_close(out.logits, expected.logits, **CLOSE)
        assert [list(decided) for decided in out.records] == [[], *[["token_selective"]] * 3]
        for decided, p in zip(out.records[1:], expected.p, strict=True):
            assert_close(torch.sigmoid(-decided["token_selective"].score_BT), p, **CLOSE)
            assert_close(decided["token_selective"].weight_BT, 1 - p, **CLOSE)
        found = token_layers(out.records)
        assert found.alpha == pytest.approx(float(expected.alpha), abs=1e-6)
        assert found.saved == pytest.approx(float(expected.saved), abs=1e-6)


@pytest.mark.parametrize("labelled", [CONTEXT, 9])
def test_losses_and_gradients(
    folder: Path, weights: plain.Weights, ids_BT: Tensor, target_BT: Tensor, labelled: int
) -> None:
    """As in the language tasks, and as in copy and sort: labels on the end of a row, the depth loss on all of it."""
    target_BT[:, : CONTEXT - labelled] = -100
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items() if name != "head.weight"}
    expected = plain.token_selective(leaves, ids_BT, HEADS)
    expected.loss(target_BT).backward()
    model = load_model(folder)
    out = model(ids_BT, shift_labels=target_BT)
    out.loss.backward()
    assert_close(out.auxiliary_loss, plain.LAMBDA * expected.alpha, rtol=0.0, atol=1e-8)
    assert_close(out.loss, expected.loss(target_BT), **CLOSE)
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    gradients["head.weight"] = gradients["token_emb.weight"]
    renamed = TSA.read(Weights(gradients), {"num_heads": HEADS}).tensors
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert ours.keys() == renamed.keys()
    for name, gradient in renamed.items():
        assert gradient.abs().max() > 0
        assert_close(ours[name], gradient, **CLOSE)


def test_the_depth_loss_of_micro_batches_adds_up(folder: Path, ids_BT: Tensor, target_BT: Tensor) -> None:
    """Over all tokens, though only some have labels: as many in each row here."""
    target_BT[:, :15] = -100
    model, items = load_model(folder), 3 * (CONTEXT - 15)
    with torch.no_grad():
        whole = model(ids_BT, shift_labels=target_BT)
        rows = [model(ids_BT[i, None], shift_labels=target_BT[i, None], num_items_in_batch=items) for i in range(3)]
    assert_close(sum(row.auxiliary_loss for row in rows), whole.auxiliary_loss)
    assert_close(sum(row.loss for row in rows), whole.loss)


@pytest.mark.parametrize("executor", ["gathered", "masked"])
def test_hard_threshold_execution(
    tmp_path: Path, weights: plain.Weights, ids_BT: Tensor, executor: str, folder: Path
) -> None:
    """The paper's sparse mode: gain 1 at p < .5, attention over the keys and values of all tokens."""
    model = load_model(folder)
    config = model.config
    assert config.mechanisms[0]["hard_gain"] == "one"
    config.mechanisms[0] = config.mechanisms[0].changed(execution="hard")
    model.save_pretrained(tmp_path / "hard")
    expected = plain.token_selective(weights, ids_BT, HEADS, hard=True)
    with torch.no_grad():
        out = load_model(tmp_path / "hard")(ids_BT, executor=executor, output_records=True)
    assert_close(out.logits, expected.logits, **CLOSE)
    for decided, p in zip(out.records[1:], expected.p, strict=True):
        assert torch.equal(decided["token_selective"].kept_BT, p < 0.5)
        assert 0.1 < (p < 0.5).float().mean() < 0.9
    soft = plain.token_selective(weights, ids_BT, HEADS)
    assert (soft.logits - expected.logits).abs().max() > 0.1
    alpha = sum(float((p < 0.5).double().mean()) for p in expected.p) / 3
    assert token_layers(out.records).alpha == pytest.approx(alpha, abs=1e-6)


def test_generation_from_a_cache_is_the_same(folder: Path, weights: plain.Weights) -> None:
    model, ids_BT = load_model(folder), torch.randint(0, 31, (1, 5))
    expected = ids_BT
    for _ in range(8):
        newest = plain.token_selective(weights, expected, HEADS).logits[:, -1:].argmax(-1)
        expected = torch.cat([expected, newest], 1)
    assert torch.equal(model.generate(ids_BT, max_new_tokens=8, do_sample=False), expected)


def test_a_checkpoint_of_its_trainer(tmp_path: Path, weights: plain.Weights) -> None:
    torch.save({"model_state_dict": weights, "step": 500}, tmp_path / "best_checkpoint.pt")
    model = load_released(tmp_path / "best_checkpoint.pt", "tsa", num_heads=HEADS)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, weights["token_emb.weight"])


def test_the_converted_model_is_the_preset_but_for_its_sizes(folder: Path) -> None:
    config = load_model(folder).config
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes += ("max_position_embeddings",)
    preset = presets.get("tsa-shakespeare", **{name: getattr(config, name) for name in sizes})
    technical = {"_name_or_path", "dtype", "architectures", "auto_map", "transformers_version"}
    ours, theirs = config.to_dict(), preset.to_dict()
    [gate] = ours["mechanisms"]
    assert gate.pop("router_width") == 16
    assert {k: v for k, v in ours.items() if k not in technical} == {
        k: v for k, v in theirs.items() if k not in technical
    }


def test_the_preset_starts_as_the_released_code_does() -> None:
    """Embeddings N(0, .02), projections into the stream 1/sqrt(2 L) of it, the rest as PyTorch builds it."""
    tensors = SkipstoneForCausalLM(presets.get("tsa-shakespeare")).state_dict()
    width, neurons = 256, 1024
    for name in ("model.embed_tokens.weight", "model.positions.weight"):
        assert tensors[name].std() == pytest.approx(0.02, rel=0.05)
    block = "model.layers.3."
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        assert tensors[block + name].std() == pytest.approx(0.02 / 12**0.5, rel=0.05)
    router = "mechanisms.token_selective.router."
    uniform = {"self_attn.q_proj.weight": width, "self_attn.v_proj.weight": width, "mlp.up_proj.weight": width}
    uniform |= {"mlp.up_proj.bias": width, "mlp.down_proj.bias": neurons, router + "hidden_weight": width}
    for name, inputs in uniform.items():
        bound = inputs**-0.5
        assert bound * 0.98 < tensors[block + name].abs().max() <= bound
        assert tensors[block + name].std() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert tensors[block + router + "score_bias"] == -1
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
