"""Models with weights in bf16 or fp16: nothing is lost where the source has that dtype, and all else is as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import skipstone
from model.test_four_bits import BY_MAGNITUDE, ROUTED, bytes_of, ids, model
from skipstone.adapt.export import export_dense
from skipstone.adapt.source import load_dense
from skipstone.measure.flops import count_flops
from skipstone.model.head_preview import with_head_candidates
from skipstone.model.pretrained import load_model
from skipstone.model.quantise import dequantise, quantise, stored_exactly
from skipstone.nn.float16 import Float16Linear
from skipstone_cli.main import app

Model = skipstone.SkipstoneForCausalLM


def rounded(given: Model, dtype: torch.dtype) -> Model:
    """Return the model with all parameters in fp32, at values that the dtype has."""
    with torch.no_grad():
        for x in given.parameters():
            x.copy_(x.to(dtype))
    return given


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_a_checkpoint_of_that_dtype_loses_nothing(name: str, tied: bool, tmp_path: Path) -> None:
    given = rounded(model(tie_word_embeddings=tied, **ROUTED), getattr(torch, name))
    small = quantise(given, 16)
    assert small.config.weight_format == name
    assert stored_exactly(given, small)
    assert (small.lm_head.weight is small.model.embed_tokens.weight) == tied
    assert small.dtype == torch.float32
    with torch.no_grad():
        want = given(ids()).logits
        assert torch.equal(small(ids()).logits, want)
        torch.testing.assert_close(small(ids(1, 3)).logits, given(ids(1, 3)).logits)
        for rows in (1, 2):
            new, old = (
                m.generate(ids(rows), max_new_tokens=6, do_sample=False, pad_token_id=0) for m in (small, given)
            )
            assert torch.equal(new, old)
    small.save_pretrained(tmp_path / "small")
    again = Model.from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "small")(ids()).logits, want)
        assert torch.equal(again(ids()).logits, want)
    whole = dequantise(small)
    assert all(torch.equal(x, given.get_parameter(n)) for n, x in whole.named_parameters())
    matrices = [m for m in small.modules() if isinstance(m, Float16Linear)]
    assert len(matrices) == 15
    assert small.num_parameters() == given.num_parameters()
    assert bytes_of(small) < 0.6 * bytes_of(given)


def test_other_weights_are_rounded_to_fp16() -> None:
    given = model()
    small = quantise(given, 16)
    assert small.config.weight_format == "float16"
    assert not stored_exactly(given, small)
    with torch.no_grad():
        torch.testing.assert_close(small(ids()).logits, given(ids()).logits, rtol=1e-2, atol=2e-2)
        given.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    assert quantise(given, 16).config.weight_format == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_dtype_of_the_model_reaches_the_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    small = quantise(rounded(model(**ROUTED), torch.bfloat16), 16)
    small.save_pretrained(tmp_path / "small")
    want = small.model.layers[0].mlp.up_proj.weight.clone()
    for each in (small.to(dtype), load_model(tmp_path / "small", str(dtype).removeprefix("torch."))):
        layer = each.model.layers[0].mlp.up_proj
        assert torch.equal(layer.weight, want)
        assert (each.dtype, layer.compute_dtype) == (dtype, dtype)
        assert each(ids()).logits.dtype == each(ids(1, 2)).logits.dtype == dtype


@pytest.mark.parametrize("tokens", [1, 12])
def test_flops_are_those_of_the_model(tokens: int) -> None:
    whole, row = model(), ids(1, tokens)
    small = quantise(whole, 16)
    with torch.no_grad():
        counted = count_flops(lambda: small(row))
    assert not counted.unknown
    assert counted.total == small.cost(tokens=tokens).forward.total == whole.cost(tokens=tokens).forward.total


def test_neurons_that_are_chosen_are_read_in_fp32() -> None:
    given = rounded(model(**BY_MAGNITUDE), torch.bfloat16)
    small = quantise(given, 16)
    mlp = small.model.layers[0].mlp
    assert isinstance(mlp.gate_proj, Float16Linear)
    assert isinstance(mlp.up_proj, torch.nn.Linear)
    assert isinstance(mlp.down_proj, torch.nn.Linear)
    with torch.no_grad():
        torch.testing.assert_close(small(ids()).logits, given(ids()).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_by_candidates_on_top(dtype: torch.dtype, tmp_path: Path) -> None:
    small = quantise(rounded(model(), dtype), 16)
    previewed = with_head_candidates(small, ids(8, 40), candidates=48, directions=64)
    previewed.save_pretrained(tmp_path / "small")
    again = load_model(tmp_path / "small")
    with torch.no_grad():
        got, want = (m(ids(1, 1)).logits[0, -1] for m in (again, small))
    best = want.topk(8).indices
    assert torch.equal(got[best], want[best])


def test_what_is_refused(tmp_path: Path) -> None:
    small = quantise(model(), 16)
    with pytest.raises(ValueError, match="the model has float16 weights already"):
        quantise(small, 16)
    with pytest.raises(ValueError, match="float16 weights cannot be resized"):
        small.resize_token_embeddings(70)
    with pytest.raises(ValueError, match="weight_group must be 64 or 32"):
        skipstone.SkipstoneConfig(weight_format="bfloat16", weight_group=64)
    with pytest.raises(ValueError, match="needs mlp 'gated' or 'plain'"):
        skipstone.SkipstoneConfig(weight_format="bfloat16", mlp="experts", experts={"count": 4})
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="it has float16 weights, which cannot be trained"):
        load_dense(str(tmp_path / "small"))
    small.train()
    with pytest.raises(ValueError, match="16-bit weights cannot be trained"):
        small(ids(), labels=ids())


def test_stored_weights_of_another_type_and_numbers_that_are_not_finite(tmp_path: Path) -> None:
    quantise(model(), 16).save_pretrained(tmp_path)
    (tmp_path / "files.json").unlink(missing_ok=True)  # another tool has written the weights
    kept, name = load_file(tmp_path / "model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    save_file({**kept, name: kept[name].view(torch.float16)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} has type F16 in the checkpoint and I16 in the model"):
        load_model(tmp_path)
    kept[name][0, 0] = 0x7C00  # inf
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} has a number that is not finite"):
        load_model(tmp_path)


def test_the_command_says_whether_anything_was_rounded(tmp_path: Path) -> None:
    rounded(model(), torch.bfloat16).save_pretrained(tmp_path / "exact")
    model().save_pretrained(tmp_path / "whole")
    said = {
        "exact": "bfloat16: all weights have the values of the original",
        "whole": "float16: weights are rounded to 11 significant bits",
    }
    for name, line in said.items():
        out = tmp_path / f"{name}16"
        found = CliRunner().invoke(app, ["quantise", str(tmp_path / name), str(out), "--bits", "16"])
        assert found.exit_code == 0, found.output
        assert line in found.output
    export_dense(tmp_path / "exact16", tmp_path / "dense")
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        torch.testing.assert_close(dense(ids()).logits, load_model(tmp_path / "exact")(ids()).logits)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_weights_of_another_dtype_are_not_loaded_in_place(bits: int) -> None:
    """A cast to integers would lose them: torch does so without a word."""
    whole = model()
    small = quantise(whole, bits)
    name = "model.layers.0.mlp.up_proj.weight"
    want = small.get_parameter(name).clone()
    with pytest.raises(RuntimeError, match=f"{name} has dtype torch.float32, and the model's is torch.u?int"):
        small.load_state_dict(whole.state_dict(), strict=False)
    assert torch.equal(small.get_parameter(name), want)
    again = quantise(whole, bits)
    again.load_state_dict(small.state_dict())


@pytest.mark.parametrize("bits", [8.0, "8", True, None, 5])
def test_bits_that_are_none(bits: object) -> None:
    with pytest.raises(ValueError, match="bits must be 16, 8 or 4, got"):
        quantise(model(), bits)  # type: ignore[arg-type]


def test_what_is_no_model_of_ours() -> None:
    for given in ("x", model().model, None):
        kind = type(given).__name__
        for call in (quantise, dequantise, lambda given: with_head_candidates(given, ids(), 8, 64)):
            with pytest.raises(ValueError, match=f"model must be a SkipstoneForCausalLM, got {kind}"):
                call(given)
