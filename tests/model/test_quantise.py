"""Int8 weights: rounded once, read as they are stored, saved and loaded, with everything else as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import skipstone
from skipstone.adapt.export import export_dense
from skipstone.adapt.export_int8 import export_int8
from skipstone.measure.flops import count_flops
from skipstone.model.pretrained import load_model
from skipstone.model.quantise import dequantise, quantise
from skipstone.nn.int8 import Int8Linear
from skipstone.ops import int8

ROUTED: dict[str, Any] = {
    "mechanisms": [{"name": "token_selective", "layers": "1:"}],
    "activation": {"name": "polyglu"},
    "attention_bias": True,
}


def model(**options: Any) -> skipstone.SkipstoneForCausalLM:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 61}
    return skipstone.SkipstoneForCausalLM(
        skipstone.SkipstoneConfig(**{"initializer_range": 0.2, **sizes, **options})
    ).eval()


def ids(rows: int = 2, tokens: int = 9) -> torch.Tensor:
    return torch.randint(0, 61, (rows, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("outputs", [1, 7, 24])
@pytest.mark.parametrize("tokens", [1, 2, 4, 7, 8, 9])
def test_few_and_many_tokens_equal_the_restored_weights(tokens: int, outputs: int) -> None:
    weight, x = torch.randn(outputs, 37), torch.randn(tokens, 37)
    number, scale = int8.quantise(weight)
    assert (int8.restore(number, scale) - weight).abs().max() <= scale.max() / 2 * 1.001
    want = x.double() @ (number.double() * scale.double()[:, None]).T
    with torch.no_grad():
        assert torch.allclose(int8.linear(x, number, scale).double(), want, rtol=1e-5, atol=1e-5)
        half = int8.linear(x.bfloat16(), number, scale)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.double(), want, rtol=0.05, atol=0.3)


def test_any_range_of_rows_is_computed_alone() -> None:
    native = pytest.importorskip("skipstone.ops.int8_native")
    number, scale = int8.quantise(torch.randn(13, 40))
    x = torch.randn(3, 40)
    alone = native.linear(x, number, scale)
    addresses = (number.data_ptr(), scale.data_ptr(), x.data_ptr())
    shared = torch.full((3, 13), float("nan"))
    for first, last in ((0, 4), (4, 9), (9, 13)):
        native._some_rows((*addresses, shared.data_ptr()), (3, 13, 40), first, last)
    assert torch.allclose(shared, alone, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_several_threads_share_the_rows(tokens: int) -> None:
    """Large enough to be shared, with a number of rows that two threads cannot share evenly."""
    native = pytest.importorskip("skipstone.ops.int8_native")
    if not native._threads_are_safe():
        pytest.skip("numba has no OpenMP here")
    number, scale = int8.quantise(torch.randn(1537, 100))
    x = torch.randn(tokens, 100)
    want = x.double() @ (number.double() * scale.double()[:, None]).T
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            found = int8.linear(x, number, scale)
    finally:
        torch.set_num_threads(1)
    assert native._parts.signatures, "one thread has computed all of it"
    assert torch.allclose(found.double(), want, rtol=1e-5, atol=1e-4)


def test_rows_of_zeros_stay_zeros_and_infinity_is_refused() -> None:
    number, scale = int8.quantise(torch.zeros(2, 4))
    assert torch.equal(int8.restore(number, scale), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="not finite"):
        int8.quantise(torch.full((1, 2), float("inf")))


@pytest.mark.parametrize("tied", [True, False])
def test_a_routed_model_is_what_its_restored_weights_are(tied: bool, tmp_path: Path) -> None:
    small = quantise(model(tie_word_embeddings=tied, **ROUTED))
    whole = dequantise(small)
    assert small.lm_head.weight.dtype == torch.int8
    assert (small.lm_head.weight is small.model.embed_tokens.weight) == tied
    routers = [name for name, _ in whole.named_parameters() if "mechanisms" in name or "activation" in name]
    assert routers
    assert all(torch.equal(small.get_parameter(name), whole.get_parameter(name)) for name in routers)
    with torch.no_grad():
        want, got = whole(ids()).logits, small(ids()).logits
        assert torch.allclose(got, want, atol=1e-4)
        new = small.generate(ids(), max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(new, whole.generate(ids(), max_new_tokens=5, do_sample=False, pad_token_id=0))
    small.save_pretrained(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "small")(ids()).logits, got)
    if not tied:
        sizes = [sum(x.numel() * x.element_size() for x in m.state_dict().values()) for m in (small, whole)]
        assert sizes[0] < 0.5 * sizes[1]


def test_bf16_keeps_the_scales_in_fp32_and_its_own_dtype(tmp_path: Path) -> None:
    small = quantise(model(**ROUTED).to(torch.bfloat16))
    small.save_pretrained(tmp_path / "small")
    for each in (small, load_model(tmp_path / "small"), quantise(model(**ROUTED)).to(torch.bfloat16)):
        layer = each.model.layers[0].mlp.up_proj
        assert isinstance(layer, Int8Linear)
        assert (each.dtype, layer.weight.dtype, layer.weight_scale.dtype) == (torch.bfloat16, torch.int8, torch.float32)
        assert each(ids()).logits.dtype == torch.bfloat16
    assert (
        each.cost(tokens=4).kv_bytes_per_token == model(**ROUTED).to(torch.bfloat16).cost(tokens=4).kv_bytes_per_token
    )


def test_the_embedding_keeps_its_factor() -> None:
    small = quantise(model(embedding_scale=3.0))
    with torch.no_grad():
        assert torch.allclose(small(ids()).logits, dequantise(small)(ids()).logits, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 12])
def test_flops_are_those_of_the_model_and_counted_the_same(tokens: int) -> None:
    whole, row = model(), ids(1, tokens)
    small = quantise(whole)
    with torch.no_grad():
        counted = count_flops(lambda: small(row))
    assert not counted.unknown
    assert counted.total == small.cost(tokens=tokens).forward.total == whole.cost(tokens=tokens).forward.total


def test_it_is_not_trained_and_not_quantised_twice() -> None:
    small = quantise(model())
    small.train()
    with pytest.raises(ValueError, match="int8 weights cannot be trained"):
        small(ids(), labels=ids())
    with pytest.raises(ValueError, match="int8 weights already"):
        quantise(small)
    with pytest.raises(ValueError, match="needs mlp 'gated' or 'plain'"):
        skipstone.SkipstoneConfig(weight_format="int8", mlp="experts", experts={"count": 4})
    with pytest.raises(ValueError, match="weight_format"):
        skipstone.SkipstoneConfig(weight_format="int7")


def test_ids_outside_of_the_vocabulary_are_one_line() -> None:
    small = quantise(model())
    with pytest.raises(ValueError, match="input_ids must lie in 0 to 60"):
        small(torch.tensor([[1, 61]]))


def test_a_folder_and_back_to_dense(tmp_path: Path) -> None:
    whole = model()
    whole.save_pretrained(tmp_path / "whole")
    export_int8(tmp_path / "whole", tmp_path / "small")
    small = load_model(tmp_path / "small")
    export_dense(tmp_path / "small", tmp_path / "dense")
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        assert torch.allclose(dense(ids()).logits, small(ids()).logits, atol=1e-4)
    with pytest.raises(FileExistsError):
        export_int8(tmp_path / "whole", tmp_path / "small")
