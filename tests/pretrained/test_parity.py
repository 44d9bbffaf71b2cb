"""Every family: the same weights give the same logits and the same greedy text as in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from skipstone import SkipstoneForCausalLM
from skipstone.model.pretrained import load_pretrained
from skipstone_studies.speed import parity
from train.tool import quick

FP32, BF16 = 5e-6, 1e-1  # relative; the promise for fp32 is 1e-5. bf16 holds 8 bits: one rounding is 4e-3
QUICK = ("Llama, tied", "Qwen3, tied, biases", "GPT-2, untied, n_inner")  # `test_families.py` has every case


@pytest.fixture(params=quick(parity.CASES, *QUICK))
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    parity.save_random(parity.CASES[request.param], tmp_path)
    return tmp_path


@pytest.fixture
def ids_BT() -> torch.Tensor:
    return torch.randint(2, 97, (3, 30))


def test_logits_and_greedy_text(checkpoint: Path) -> None:
    found = parity.measure(checkpoint)
    assert found.fp32 < FP32
    assert found.bf16 < BF16
    assert found.generation


@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
def test_padded_batch_with_explicit_positions(checkpoint: Path, ids_BT: torch.Tensor, side: str) -> None:
    mask_BT = torch.arange(30) >= torch.tensor([[0], [7], [29]])
    mask_BT = (mask_BT if side == "left" else mask_BT.flip(1)).long()
    position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    call = {"attention_mask": mask_BT, "position_ids": position_BT}
    assert parity.logits_error(checkpoint, ids_BT, torch.float32, **call) < FP32


@pytest.mark.slow
def test_padded_greedy_text(checkpoint: Path, ids_BT: torch.Tensor) -> None:
    mask_BT = (torch.arange(30) >= torch.tensor([[0], [7], [29]])).long()
    ours, reference = load_pretrained(checkpoint, "float32"), parity.theirs(checkpoint)
    assert parity.greedy(ours, ids_BT, 12, attention_mask=mask_BT) == parity.greedy(
        reference, ids_BT, 12, attention_mask=mask_BT
    )


def test_tying_parameters_and_config_follow_the_checkpoint(checkpoint: Path) -> None:
    ours, reference = load_pretrained(checkpoint), parity.theirs(checkpoint)
    assert isinstance(ours, SkipstoneForCausalLM)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == reference.config.tie_word_embeddings
    assert ours.config.tie_word_embeddings == reference.config.tie_word_embeddings
    assert ours.num_parameters() == reference.num_parameters()
    assert not ours.training


@pytest.mark.parametrize("case", ["Llama", "GPT-2"])
def test_the_error_sees_a_changed_bias_or_norm(tmp_path: Path, ids_BT: torch.Tensor, case: str) -> None:
    for name in ("a", "b"):
        parity.save_random(parity.CASES[case], tmp_path / name)
    file = tmp_path / "b" / "model.safetensors"
    tensors = load_file(file)
    last = next(key for key in tensors if key.endswith(("model.norm.weight", "ln_f.bias")))
    tensors[last][3] += 0.01
    save_file(tensors, file, metadata={"format": "pt"})
    ours, reference = load_pretrained(tmp_path / "a"), parity.theirs(tmp_path / "b")
    with torch.no_grad():
        assert parity.relative_error(ours(ids_BT).logits, reference(ids_BT).logits) > 100 * FP32


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(None, torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16), (torch.bfloat16, torch.bfloat16)],
)
def test_dtype(tmp_path: Path, dtype: str | torch.dtype | None, expected: torch.dtype) -> None:
    parity.save_random(parity.CASES["Qwen3"], tmp_path)
    model = load_pretrained(tmp_path, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model.config.dtype == expected


def test_dropouts_of_gpt2_are_kept(tmp_path: Path, ids_BT: torch.Tensor) -> None:
    parity.save_random(parity.CASES["GPT-2"], tmp_path)
    model = load_pretrained(tmp_path)
    config = model.config
    assert (config.embedding_dropout, config.attention_dropout, config.residual_dropout) == (0.1, 0.1, 0.1)
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(ids_BT).logits, model(ids_BT).logits)


def test_a_real_model(data_dir: Path) -> None:
    source = data_dir / "stories260K"
    if not source.is_dir():
        pytest.skip("SKIPSTONE_DATA holds no stories260K")
    found = parity.measure(source, length=200, tokens=60)
    assert found.fp32 < FP32
    assert found.bf16 < BF16
    assert found.generation


def test_a_real_models_text(data_dir: Path) -> None:
    source = data_dir / "stories260K"
    if not source.is_dir():
        pytest.skip("SKIPSTONE_DATA holds no stories260K")
    tokenizer = AutoTokenizer.from_pretrained(source)
    prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids
    [ids] = parity.greedy(load_pretrained(source), prompt, 40)
    assert [ids] == parity.greedy(parity.theirs(source), prompt, 40)
    assert "there was a little girl named" in tokenizer.decode(ids)
