"""The estimate of a training's cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.train import estimate as estimating
from skipstone.train.estimate import FP32, estimate
from train.test_config import RECIPES
from train.tool import DENSE, POLYGLU, mod, recipe

MODEL = {**DENSE, "vocab_size": 300, "activation": POLYGLU}


def wanted(model: dict[str, Any], **train: Any) -> dict[str, Any]:
    return {
        "model": model,
        "data": {"corpus": "python-stdlib", "context": 64},
        "train": {"steps": 50, "batch_size": 8, "gradient_accumulation": 2, "warmup_steps": 0, **train},
    }


def test_flops_and_hours_are_those_of_the_cost_model() -> None:
    found = estimate(wanted(MODEL), gpu="A100", mfu=0.5)
    model = SkipstoneForCausalLM(SkipstoneConfig(**MODEL))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.flops == model.cost(tokens=64, batch=8, routing="oracle").training.total * 50
    assert found.seconds * 50 * 312e12 * 0.5 > found.flops
    assert found.hours == pytest.approx(50 * found.seconds / 3600)
    assert found.checkpoint == 3 * FP32 * found.parameters


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", [DENSE, {**DENSE, "activation": POLYGLU}], ids=["silu", "polyglu"])
def test_activations_are_what_a_real_pass_keeps(model: dict[str, Any], precision: str) -> None:
    """Extrapolated from 16 and 32 tokens; counted here in a real pass of 4 rows of 64."""
    found = estimate(wanted({**model, "vocab_size": 300}, precision=precision)).memory
    decoder = SkipstoneForCausalLM(SkipstoneConfig(**model, vocab_size=300)).train().model
    own = {t.untyped_storage().data_ptr() for t in (*decoder.parameters(), *decoder.buffers())}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        out = decoder(torch.zeros(4, 64, dtype=torch.long), use_cache=False)
    total = sum(storage.nbytes() for storage in kept.values())
    del out
    copies, activations = found["copies of the weights"], found["activations"]
    assert copies is not None
    assert activations is not None
    assert copies + activations == pytest.approx(total, rel=0.03)


def test_checkpointing_and_chunks_take_less_memory_and_more_flops() -> None:
    plain, saved = estimate(wanted(MODEL)), estimate(wanted(MODEL, activation_checkpointing=True, loss_chunk=16))
    assert saved.flops > plain.flops
    for name in ("activations", "logits"):
        assert (saved.memory[name] or 0) < (plain.memory[name] or 0)
    assert plain.memory["logits"] == 300 * 4 * 64 * 3 * FP32
    assert saved.memory["logits"] == 300 * 16 * FP32


def test_what_depends_on_the_tokens_is_said_to_be_unknown() -> None:
    found = estimate(wanted({**MODEL, "mechanisms": [mod("ema_threshold")]}))
    assert found.memory["activations"] is None
    assert any("not known" in line for line in found.lines())


def test_a_vocabulary_that_is_not_named_comes_from_the_data(tmp_path: Path) -> None:
    values = recipe(tmp_path, DENSE)
    values["data"]["tokenizer"] = "byte"
    assert estimate(values).parameters == estimate({**values, "model": {**DENSE, "vocab_size": 258}}).parameters


def test_every_line_says_what_it_is() -> None:
    text = "\n".join(estimate(wanted(MODEL)).lines())
    for word in ("parameters", "25,600 in 50 steps of 512", "FLOPs", "AdamW", "the GPU has 80 GB", "one H100", "40%"):
        assert word in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "H1000"}, "unknown gpu 'H1000'; did you mean 'H100'"),
        ({"mfu": 0.0}, r"mfu must be in \(0, 1\], got 0.0"),
        ({"mfu": 1.5}, r"mfu must be in \(0, 1\], got 1.5"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(wanted(MODEL), **options)


def test_the_published_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its recipe needs no data and no memory to be estimated; the blocks are counted elsewhere."""
    monkeypatch.setattr(estimating, "_kept", lambda config, recipe: (0.0, 0.0))
    path = next(path for path in RECIPES if path.stem == "polychromatic-0.6b")
    found = estimate(yaml.safe_load(path.read_text("utf-8")))
    assert found.parameters == 597_153_888
    assert found.tokens_per_step * found.steps == 524_288 * 19_531
    assert 4.9e19 < found.flops < 5.2e19
