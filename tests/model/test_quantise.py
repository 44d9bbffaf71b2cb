"""Int8 weights: rounded once, read as they are stored, saved and loaded, with everything else as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import skipstone
from models import tiny_model
from skipstone.adapt.export import export_dense
from skipstone.adapt.export_quantised import export_quantised
from skipstone.measure.flops import count_flops
from skipstone.model.pretrained import load_model
from skipstone.model.quantise import dequantise, quantise, stored_exactly, with_whole_groups
from skipstone.nn.block_table import sizes_of
from skipstone.nn.int8 import Int8Linear
from skipstone.nn.stored_weights import StoredLinear
from skipstone.ops import int8

ROUTED: dict[str, Any] = {
    "mechanisms": [{"name": "token_selective", "layers": "1:"}],
    "activation": {"name": "polyglu"},
    "attention_bias": True,
}


def model(**options: Any) -> skipstone.SkipstoneForCausalLM:
    return tiny_model(None, **{"initializer_range": 0.2, **options})


def ids(rows: int = 2, tokens: int = 9) -> torch.Tensor:
    return torch.randint(0, 61, (rows, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("outputs", [1, 7, 24])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 8, 9, 129])
@pytest.mark.parametrize(("inputs", "group"), [(37, None), (128, None), (192, 64)])
def test_few_and_many_tokens_equal_the_restored_weights(
    tokens: int, outputs: int, inputs: int, group: int | None
) -> None:
    weight, x = torch.randn(outputs, inputs), torch.randn(tokens, inputs)
    number, scale = int8.quantise(weight, group)
    assert scale.shape == ((outputs,) if group is None else (outputs, inputs // group))
    assert (int8.restore(number, scale) - weight).abs().max() <= scale.max() / 2 * 1.001
    want = x.double() @ int8.restore(number, scale, torch.float64).T
    with torch.no_grad():
        assert torch.allclose(int8.linear(x, number, scale).double(), want, rtol=1e-4, atol=1e-3)
        half = int8.linear(x.bfloat16(), number, scale)
    assert half.dtype == torch.bfloat16
    of_half = x.bfloat16().double() @ int8.restore(number, scale, torch.float64).T
    assert torch.allclose(half.double(), of_half, rtol=0.01, atol=0.15)


@pytest.mark.parametrize("inputs", [40, 128])
def test_any_range_of_rows_is_computed_alone(inputs: int) -> None:
    native = pytest.importorskip("skipstone.ops.int8_native")
    from skipstone.ops.int8_linear_native import linear

    number, scale = int8.quantise(torch.randn(13, inputs))
    x, rounded, unit = torch.randn(3, inputs), torch.empty(3, inputs, dtype=torch.int16), torch.empty(3)
    native.round_tokens.ctypes(x.data_ptr(), rounded.data_ptr(), unit.data_ptr(), 3, inputs)
    assert torch.allclose(rounded * unit[:, None], x, atol=2e-4)
    alone = linear(x, number, scale)
    shared = torch.full((3, 13), float("nan"))
    rows = native.grouped_rows if inputs == 128 else native.single_rows
    given = rounded if inputs == 128 else x
    places = (given.data_ptr(), unit.data_ptr(), shared.data_ptr())
    for first, last in ((0, 4), (4, 9), (9, 13)):
        rows.ctypes(number.data_ptr(), scale.data_ptr(), 0, 1, *places, 3, 13, inputs, first, last)
    assert torch.allclose(shared, alone, atol=1e-5)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tokens", [1, 3])
def test_what_is_not_finite_is_not_hidden_by_rounding(wrong: float, tokens: int) -> None:
    number, scale = int8.quantise(torch.randn(5, 128), 64)
    x = torch.randn(tokens, 128)
    x[-1, 77] = wrong
    with torch.no_grad():
        y = int8.linear(x, number, scale)
    assert not y[-1].isfinite().any()
    assert y[:-1].isfinite().all()
    assert torch.equal(int8.linear(x * 0 * 0, number, scale)[:-1], torch.zeros(tokens - 1, 5))


def test_integers_are_multiplied_in_pairs() -> None:
    """Products that are not recognised would be computed at a fraction of the speed."""
    native = pytest.importorskip("skipstone.ops.int8_native")
    binding = pytest.importorskip("llvmlite.binding")
    if not binding.get_host_cpu_features().get("avx2"):
        pytest.skip("the names of the instructions are x86's")
    fresh = pytest.importorskip("numba").njit(native.grouped_rows.function)  # a function from the cache has no text
    fresh.compile("(" + ", ".join(["int64"] * 12) + ")")
    text = "".join(fresh.inspect_asm().values())
    assert "vpdpwssd" in text or "vpmaddwd" in text


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize(("tokens", "inputs"), [(1, 100), (3, 100), (8, 128)])
def test_several_threads_share_the_rows(
    tokens: int, inputs: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large enough to be shared, with a number of rows that they cannot share evenly."""
    native = pytest.importorskip("skipstone.ops.int8_linear_native")
    number, scale = int8.quantise(torch.randn(1537, inputs))
    x = torch.randn(tokens, inputs)
    alone = native.linear(x, number, scale)
    asked, share = [], native.share
    monkeypatch.setattr(native, "threads", lambda: threads)
    monkeypatch.setattr(native, "share", lambda run, given, parts: asked.append(parts) or share(run, given, parts))
    assert torch.equal(native.linear(x, number, scale), alone)
    assert asked == [threads]


@pytest.mark.parametrize("tokens", range(1, 9))
@pytest.mark.parametrize("inputs", [64, 192])
def test_any_number_of_tokens_equals_them_one_by_one(tokens: int, inputs: int) -> None:
    """Weights are read once for 8, 4, 2 or 1 of them, and the sums of several tokens are folded into one another."""
    native = pytest.importorskip("skipstone.ops.int8_linear_native")
    number, scale = int8.quantise(torch.randn(5, inputs), 64)
    x = torch.randn(tokens, inputs)
    alone = torch.cat([native.linear(each[None], number, scale) for each in x])
    torch.testing.assert_close(native.linear(x, number, scale), alone, rtol=1e-5, atol=1e-5)


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


def test_a_file_with_a_scale_for_each_row_still_loads(tmp_path: Path) -> None:
    whole = model(hidden_size=128, intermediate_size=384)
    small = quantise(whole)
    assert small.model.layers[0].mlp.up_proj.weight_scale.shape == (384, 2)
    assert small.model.embed_tokens.weight_scale.shape == (61, 2)
    old = skipstone.SkipstoneForCausalLM(
        skipstone.SkipstoneConfig(**{**small.config.to_dict(), "weight_group": None})
    ).eval()
    tensors: dict[str, torch.Tensor] = dict(whole.state_dict())
    for name, module in old.named_modules():
        if hasattr(module, "weight_scale"):
            number, scale = int8.quantise(tensors[f"{name}.weight"])
            tensors |= {f"{name}.weight": number, f"{name}.weight_scale": scale}
    old.load_state_dict(tensors)
    old.save_pretrained(tmp_path / "old")
    loaded = load_model(tmp_path / "old")
    with torch.no_grad():
        assert torch.allclose(loaded(ids()).logits, dequantise(loaded)(ids()).logits, atol=5e-3)
        assert torch.allclose(loaded(ids(1, 3)).logits, dequantise(loaded)(ids(1, 3)).logits, atol=5e-3)
        assert torch.allclose(small(ids(1, 3)).logits, dequantise(small)(ids(1, 3)).logits, atol=5e-3)


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
    for wrong in ({"weight_format": "int8", "weight_group": 48}, {"weight_group": 64}):
        with pytest.raises(ValueError, match="weight_group must be 64 or 32"):
            skipstone.SkipstoneConfig(**wrong)


def test_the_vocabulary_is_resized_before_and_not_afterwards() -> None:
    whole = model()
    whole.resize_token_embeddings(64, mean_resizing=False)
    small = quantise(whole)
    assert small.lm_head.weight.shape[0] == small.config.vocab_size == 64
    assert small.resize_token_embeddings(64) is small.get_input_embeddings()
    with pytest.raises(ValueError, match="int8 weights cannot be resized; resize the original"):
        small.resize_token_embeddings(70)


def test_ids_outside_of_the_vocabulary_are_one_line() -> None:
    small = quantise(model())
    with pytest.raises(ValueError, match="input_ids must lie in 0 to 60"):
        small(torch.tensor([[1, 61]]))


def test_a_folder_and_back_to_dense(tmp_path: Path) -> None:
    whole = model()
    whole.save_pretrained(tmp_path / "whole")
    said = export_quantised(tmp_path / "whole", tmp_path / "small", cache_bits=16)
    assert said.endswith("; keys and values are cached in fp16")
    small = load_model(tmp_path / "small")
    assert small.config.cache_format == "float16"
    assert quantise(load_model(tmp_path / "whole")).config.cache_format == "float"
    export_dense(tmp_path / "small", tmp_path / "dense")
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        assert torch.allclose(dense(ids()).logits, small(ids(), use_cache=False).logits, atol=1e-4)
    with pytest.raises(FileExistsError):
        export_quantised(tmp_path / "whole", tmp_path / "small")
    with pytest.raises(ValueError, match="cache_bits must be 32 or 16, got 8"):
        export_quantised(tmp_path / "whole", tmp_path / "other", cache_bits=8)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_shares_no_memory_with_the_original(bits: int, dtype: torch.dtype) -> None:
    original = model(hidden_size=64, **ROUTED).to(dtype)
    rounded = quantise(original, bits)
    before, whole = original(ids()).logits, rounded(ids()).logits
    restored = dequantise(rounded)
    again = restored(ids()).logits
    for changed, others in ((original, ((rounded, whole), (restored, again))), (rounded, ((restored, again),))):
        with torch.no_grad():
            for parameter in (*changed.parameters(), *changed.buffers()):
                parameter.zero_()
        for other, logits in others:
            assert torch.equal(other(ids()).logits, logits)
    assert not torch.equal(original(ids()).logits, before)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_under_autocast_few_tokens_and_many_have_one_dtype(bits: int, dtype: torch.dtype) -> None:
    original = model(hidden_size=64, attention_bias=True).to(dtype)
    rounded, plain = quantise(original, bits), original.float()
    with torch.autocast("cpu", torch.bfloat16):
        for tokens in (1, 8, 9, 65):
            found = rounded(ids(1, tokens)).logits
            assert found.dtype == plain(ids(1, tokens)).logits.dtype == torch.bfloat16
            layer = next(each for each in rounded.modules() if isinstance(each, StoredLinear))
            assert layer(torch.randn(1, tokens, layer.in_features)).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [16, 8])
def test_stored_numbers_are_never_taken_for_weights(bits: int, tmp_path: Path) -> None:
    original = model(hidden_size=64)
    rounded = quantise(original, bits)
    original.save_pretrained(tmp_path / "float")
    rounded.save_pretrained(tmp_path / "rounded")
    load, kind = skipstone.SkipstoneForCausalLM.from_pretrained, rounded.config.weight_format
    for source, wrong in (("rounded", "float"), ("float", kind)):
        with pytest.raises(ValueError, match="weight_format must be that of the stored weights"):
            load(tmp_path / source, weight_format=wrong)
        with pytest.raises(ValueError, match="weight_format must be that"):
            skipstone.SkipstoneModel.from_pretrained(tmp_path / source, weight_format=wrong)
    assert torch.equal(load(tmp_path / "rounded").eval()(ids()).logits, rounded(ids()).logits)
    with pytest.raises(ValueError, match="weight_format must be that"):
        model(hidden_size=64).load_state_dict(rounded.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match=r"has dtype torch\.float32"):
        quantise(original, bits).load_state_dict(original.state_dict())


def test_weights_without_values_are_not_rounded() -> None:
    with pytest.raises(ValueError, match="weights without values"):
        quantise(model().to("meta"))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("options", [{}, {"mlp": "plain", "mlp_bias": True, "activation": "gelu"}], ids=str)
def test_neurons_are_filled_up_with_zeros_to_whole_groups(options: dict[str, Any], bits: int) -> None:
    given = model(hidden_size=64, intermediate_size=600, **options)
    small = quantise(given, bits)
    assert (given.config.intermediate_size, small.config.intermediate_size) == (600, 640)
    whole = model(hidden_size=64, intermediate_size=640, **options)
    whole.load_state_dict(dequantise(small).state_dict())
    with torch.no_grad():
        assert torch.allclose(small(ids()).logits, whole(ids()).logits, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(with_whole_groups(given)(ids()).logits, given(ids()).logits)
    assert sizes_of(small.model.layers) is not None or options


@pytest.mark.parametrize(
    "options", [{"intermediate_size": 128}, {"intermediate_size": 72}, {"activation": {"name": "polyglu"}}], ids=str
)
def test_whole_groups_and_neurons_with_parameters_stay(options: dict[str, Any]) -> None:
    given = model(**options)
    assert with_whole_groups(given) is given


def test_values_that_are_kept_are_told_beside_added_neurons() -> None:
    given = model(hidden_size=64, intermediate_size=600)
    exact = dequantise(quantise(given))  # every weight lies on a grid of int8, in groups of 64
    with torch.no_grad():
        narrow = model(hidden_size=64, intermediate_size=600)
        whole = exact.state_dict()
        narrow.load_state_dict({n: whole[n][tuple(map(slice, x.shape))] for n, x in narrow.state_dict().items()})
    assert stored_exactly(narrow, quantise(narrow))
    assert not stored_exactly(given, quantise(given))
