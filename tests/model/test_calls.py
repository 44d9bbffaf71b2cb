"""Tokens of a Hugging Face call: positions, documents, padding, and errors for wrong shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.core.tokens import PassMode, Tokens
from skipstone.model.tokens import Call, tokens_of


def call(seen: int = 0, T: int = 4, **given: Any) -> Tokens:
    values = {k: torch.tensor(v) for k, v in given.items()}
    return tokens_of(Call(shape=torch.Size((2, T)), device=torch.device("cpu"), seen=seen, **values), PassMode())


def test_nothing_given() -> None:
    tokens = call(seen=3)
    assert tokens.slot_BT.tolist() == tokens.position_BT.tolist() == [[3, 4, 5, 6]]
    assert tokens.real_BT is None
    assert tokens.document_BT is None


def test_a_mask_without_padding_is_no_mask() -> None:
    assert call(attention_mask=[[1] * 4] * 2).real_BT is None
    assert call(seen=2, attention_mask=[[1] * 6] * 2).real_BT is None


def test_positions_count_real_tokens() -> None:
    tokens = call(attention_mask=[[0, 0, 1, 1], [1, 1, 1, 0]])
    assert tokens.real_BT.tolist() == [[False, False, True, True], [True, True, True, False]]
    assert tokens.position_BT[0, 2:].tolist() == [0, 1]
    assert tokens.position_BT[1, :3].tolist() == [0, 1, 2]
    assert tokens.slot_BT.tolist() == [[0, 1, 2, 3]]


def test_decoding_after_left_padding() -> None:
    tokens = call(seen=3, T=1, attention_mask=[[0, 0, 1, 1], [1, 1, 1, 1]])
    assert tokens.real_BT is None
    assert tokens.position_BT.tolist() == [[1], [3]]
    assert tokens.slot_BT.tolist() == [[3]]


def test_documents_restart_positions() -> None:
    tokens = call(document_ids=[[7, 7, 3, 3], [1, 1, 1, 1]])
    assert tokens.position_BT.tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]
    padded = call(T=4, document_ids=[[7, 7, 7, 3], [1, 2, 2, 2]], attention_mask=[[0, 1, 1, 1], [1, 1, 1, 0]])
    assert padded.position_BT[0, 1:].tolist() == [0, 1, 0]
    assert padded.position_BT[1, :3].tolist() == [0, 0, 1]


def test_positions_that_restart_are_documents() -> None:
    tokens = call(position_ids=[[0, 1, 0, 1], [0, 1, 2, 3]])
    assert tokens.document_BT.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    assert call(position_ids=[[5, 6, 7, 8]] * 2).document_BT is None
    assert call(position_ids=[[0, 1, 0, 1]] * 2, attention_mask=[[1] * 4] * 2).document_BT is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_mask": [[1] * 3] * 2}, r"attention_mask must have shape \[2, 6\] .* got \[2, 3\]"),
        ({"attention_mask": [[1] * 6]}, r"attention_mask must have shape \[2, 6\] .* got \[1, 6\]"),
        ({"attention_mask": [[[[1] * 4] * 4]] * 2}, r"got \[2, 1, 4, 4\]|masks with more axes are not supported"),
        ({"position_ids": [[0] * 3] * 2}, r"position_ids must have shape \[2, 4\], got \[2, 3\]"),
        ({"position_ids": [0] * 4}, r"position_ids must have shape \[2, 4\], got \[4\]"),
        ({"document_ids": [[0] * 3] * 2}, r"document_ids must have shape \[2, 4\], got \[2, 3\]"),
        (
            {"document_ids": [[0] * 4] * 2},
            "document_ids need position_ids beside them once a cache holds earlier tokens",
        ),
    ],
    ids=str,
)
def test_wrong_shapes(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call(seen=2, **given)
    assert "\n" not in str(error.value)


def test_learned_positions_end() -> None:
    config = SkipstoneConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, positions="learned"
    )
    config.max_position_embeddings = 8
    model = SkipstoneForCausalLM(config).eval()
    model(torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="the input is longer than the model's context of 8 learned positions"):
        model(torch.zeros(1, 9, dtype=torch.long))


@pytest.mark.parametrize("scaled", [False, True])
def test_initialisation(scaled: bool) -> None:
    """N(0, .02), projections into the residual stream 1/sqrt(2 * layers) of it where asked (GPT-2); routers not."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 500, "hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4}
    model = SkipstoneForCausalLM(
        SkipstoneConfig(**sizes, scaled_output_init=scaled, mechanisms=[{"name": "token_selective"}])
    )
    block = model.model.layers[1]
    assert block.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for out in (block.self_attn.o_proj, block.mlp.down_proj):
        assert out.weight.std().item() == pytest.approx(0.02 / (4 if scaled else 1), rel=0.05)
    router = block.mechanisms["token_selective"].router
    assert router.hidden_weight.abs().max().item() == pytest.approx(128**-0.5, rel=0.02)
    assert router.score_bias.item() == -1


@torch.no_grad()
def test_evaluation_draws_no_noise_unless_asked_to() -> None:
    """In evaluation a pass with sight of the row is the same every time; in training it is not."""
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = SkipstoneForCausalLM(SkipstoneConfig(**sizes, activation="polyglu")).eval()
    ids = torch.arange(8)[None]

    def differ(**options: Any) -> bool:
        one, other = (model(ids, routing="oracle", **options).logits for _ in range(2))
        return not torch.equal(one, other)

    assert not differ()
    assert differ(noise=True)
    model.train()
    assert differ()
    assert not differ(noise=False)


@pytest.mark.parametrize(
    ("decision", "training"),
    [
        pytest.param(decision, training, marks=() if training == (i % 2 == 0) else pytest.mark.slow)
        for i, decision in enumerate(("threshold", "topk", "ema_threshold", "predictor"))
        for training in (False, True)
    ],
)
def test_a_model_without_values_has_the_shapes_of_one_with(decision: str, training: bool) -> None:
    mechanisms = [{"name": "mixture_of_depths", "capacity": 0.5, "decision": decision}, {"name": "early_exit"}]
    options: dict[str, Any] = {"mechanisms": mechanisms, "activation": {"name": "polyglu"}}
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = SkipstoneForCausalLM(SkipstoneConfig(**sizes, **options)).to("meta").train(training)
    ids = torch.zeros(2, 9, dtype=torch.long, device="meta")
    routing = "oracle" if training or decision == "topk" else "causal"
    out = model(ids, attention_mask=torch.ones_like(ids), labels=ids, routing=routing)
    assert out.logits.shape == (2, 9, 40)
    out.loss.backward()
