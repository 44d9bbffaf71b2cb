"""Models with four-bit weights: rounded, or taken over from a GGUF file, saved and loaded, with all else as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import skipstone
from models import tiny_model
from skipstone.adapt.export import export_dense
from skipstone.adapt.export_quantised import export_quantised
from skipstone.adapt.source import load_dense
from skipstone.measure.flops import count_flops
from skipstone.model.head_preview import with_head_candidates
from skipstone.model.pretrained import four_bit_rows, load_model, load_pretrained
from skipstone.model.quantise import dequantise, quantise
from skipstone.nn.int4 import Int4Linear
from skipstone.nn.int8 import Int8Linear

ROUTED: dict[str, Any] = {
    "mechanisms": [{"name": "token_selective", "layers": "1:"}],
    "activation": {"name": "polyglu"},
    "attention_bias": True,
}
BY_MAGNITUDE = {"neuron_groups": {"decision": "magnitude", "group_size": 1, "capacity": 0.5}}


def model(**options: Any) -> skipstone.SkipstoneForCausalLM:
    return tiny_model(None, **{"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.2, **options})


def ids(rows: int = 2, tokens: int = 9) -> torch.Tensor:
    return torch.randint(0, 61, (rows, tokens), generator=torch.Generator().manual_seed(0))


def long() -> torch.Tensor:
    """More tokens than are multiplied at a time."""
    return ids(2, 140 // 2)


def bytes_of(given: skipstone.SkipstoneForCausalLM) -> int:
    return sum(x.numel() * x.element_size() for x in given.model.layers.state_dict().values())


@pytest.mark.parametrize("tied", [True, False])
def test_a_routed_model_is_what_its_restored_weights_are(tied: bool, tmp_path: Path) -> None:
    given = model(tie_word_embeddings=tied, **ROUTED)
    small = quantise(given, 4)
    whole = dequantise(small)
    assert small.config.weight_int8 is None
    assert isinstance(small.lm_head, Int8Linear)
    assert (small.lm_head.weight is small.model.embed_tokens.weight) == tied
    routers = [name for name, _ in whole.named_parameters() if "mechanisms" in name or "activation" in name]
    assert routers
    assert all(torch.equal(small.get_parameter(name), given.get_parameter(name)) for name in routers)
    with torch.no_grad():
        got = small(ids()).logits
        assert torch.allclose(got, whole(ids()).logits, atol=5e-3)  # tokens are rounded to int16
        assert torch.allclose(small(long()).logits, whole(long()).logits, atol=5e-3)
        assert torch.allclose(small(ids(1, 3)).logits, whole(ids(1, 3)).logits, atol=5e-3)
        new = small.generate(ids(), max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(new, whole.generate(ids(), max_new_tokens=5, do_sample=False, pad_token_id=0))
        row = small.generate(ids(1), max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(row, whole.generate(ids(1), max_new_tokens=5, do_sample=False, pad_token_id=0))
    small.save_pretrained(tmp_path / "small")
    again = skipstone.SkipstoneForCausalLM.from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "small")(ids()).logits, got)
        assert torch.equal(again(ids()).logits, got)
    matrices = [m for m in small.modules() if isinstance(m, Int4Linear)]
    assert len(matrices) == 14
    assert sum(m.weight.numel() for m in matrices) == sum(m.in_features * m.out_features for m in matrices) * 5 // 8


def test_padding_changes_nothing() -> None:
    small = quantise(model(), 4)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        padded = small(ids(2, 5), attention_mask=mask).logits[0, 2:]
        assert torch.allclose(padded, small(ids(2, 5)[:1, 2:]).logits[0], atol=2e-3)


def test_bf16_leaves_the_weights_alone(tmp_path: Path) -> None:
    small = quantise(model(**ROUTED).to(torch.bfloat16), 4)
    small.save_pretrained(tmp_path / "small")
    for each in (small, load_model(tmp_path / "small"), quantise(model(**ROUTED), 4).to(torch.bfloat16)):
        layer = each.model.layers[0].mlp.up_proj
        assert isinstance(layer, Int4Linear)
        assert (each.dtype, layer.weight.dtype, layer.compute_dtype) == (torch.bfloat16, torch.uint8, torch.bfloat16)
        assert each(ids()).logits.dtype == each(ids(1, 2)).logits.dtype == torch.bfloat16
    wanted = model(**ROUTED).to(torch.bfloat16).cost(tokens=4)
    assert small.cost(tokens=4).kv_bytes_per_token == wanted.kv_bytes_per_token


@pytest.mark.parametrize("tokens", [1, 12])
def test_flops_are_those_of_the_model_and_counted_the_same(tokens: int) -> None:
    whole, row = model(), ids(1, tokens)
    small = quantise(whole, 4)
    with torch.no_grad():
        counted = count_flops(lambda: small(row))
    assert not counted.unknown
    assert counted.total == small.cost(tokens=tokens).forward.total == whole.cost(tokens=tokens).forward.total


def test_matrices_that_cannot_have_four_bits_are_int8(tmp_path: Path) -> None:
    """Widths that blocks of 64 do not divide by themselves; weights that fp16 cannot hold by name."""
    given = model(intermediate_size=96)
    with torch.no_grad():
        given.model.layers[0].mlp.up_proj.weight[3, 5] = 7e4
        given.model.layers[1].self_attn.q_proj.weight.mul_(1e-6)
    small = quantise(given, 4)
    assert small.config.weight_int8 == ["layers.0.mlp.up_proj", "layers.1.self_attn.q_proj"]
    kinds = {name: type(module) for name, module in small.model.layers[0].mlp.named_children() if "proj" in name}
    assert kinds == {"gate_proj": Int4Linear, "up_proj": Int8Linear, "down_proj": Int8Linear}
    small.save_pretrained(tmp_path / "small")
    with torch.no_grad():
        again = load_model(tmp_path / "small")(ids()).logits
        assert torch.allclose(again, dequantise(small)(ids()).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("bits", "type_"), [(4, "U8"), (8, "I8")])
def test_stored_weights_of_another_type_and_scales_that_are_not_finite(tmp_path: Path, bits: int, type_: str) -> None:
    quantise(model(), bits).save_pretrained(tmp_path)
    (tmp_path / "files.json").unlink(missing_ok=True)  # another tool has written the weights
    kept, name = load_file(tmp_path / "model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    save_file({**kept, name: kept[name].float()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} has type F32 in the checkpoint and {type_} in the model"):
        load_model(tmp_path)
    if bits == 4:
        kept[name][0, :2] = torch.tensor([0, 0x7C], dtype=torch.uint8)  # inf in fp16
    else:
        kept[f"{name}_scale"][0, 0] = float("nan")
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} has a scale that is not finite"):
        load_model(tmp_path)


def test_every_weight_is_counted() -> None:
    given = model(intermediate_size=96, attention_bias=True, tie_word_embeddings=True)
    small = quantise(given, 4)
    scales = sum(x.numel() for name, x in small.named_parameters() if name.endswith("weight_scale"))
    assert small.num_parameters() - scales == given.num_parameters()
    assert small.cost(tokens=1).parameters.total - scales == given.cost(tokens=1).parameters.total
    assert small.num_parameters(only_trainable=True) < given.num_parameters()


def test_blocks_that_moved_are_saved_as_they_are(tmp_path: Path) -> None:
    """The names of int8 matrices follow their blocks."""
    given = model(num_hidden_layers=3)
    given.model.layers[2].mlp.up_proj.weight.data.mul_(1e-6)
    small = quantise(given, 4)
    assert small.config.weight_int8 == ["layers.2.mlp.up_proj"]
    del small.model.layers[0]
    small.config.num_hidden_layers = 2
    for i, block in enumerate(small.model.layers):
        block.self_attn.layer_idx = i
    small.save_pretrained(tmp_path / "small")
    again = load_model(tmp_path / "small")
    assert again.config.weight_int8 == ["layers.1.mlp.up_proj"]
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, small(ids()).logits)


def test_neurons_that_are_chosen_are_read_from_int8() -> None:
    small = quantise(model(**BY_MAGNITUDE), 4)
    assert small.config.weight_int8 == [f"layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("up", "down")]
    with torch.no_grad():
        assert torch.allclose(small(ids()).logits, dequantise(small)(ids()).logits, atol=5e-3)
        far_BT = (small(long()).logits - dequantise(small)(long()).logits).abs().amax(-1)
        assert (far_BT < 5e-3).float().mean() > 0.95  # a rounded token may choose another neuron
    assert isinstance(small.model.layers[0].mlp.gate_proj, Int4Linear)


def test_a_head_by_candidates_on_top(tmp_path: Path) -> None:
    small = quantise(model(), 4)
    previewed = with_head_candidates(small, ids(8, 40), candidates=48, directions=64)
    previewed.save_pretrained(tmp_path / "small")
    again = load_model(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(again(ids(1, 1)).logits.argmax(-1), small(ids(1, 1)).logits.argmax(-1))


def test_what_is_refused() -> None:
    small = quantise(model(), 4)
    small.train()
    with pytest.raises(ValueError, match="int4 weights cannot be trained"):
        small(ids(), labels=ids())
    for bits in (4, 8):
        with pytest.raises(ValueError, match="the model has int4 weights already"):
            quantise(small, bits)
    with pytest.raises(ValueError, match="bits must be 16, 8 or 4, got 3"):
        quantise(model(), 3)
    with pytest.raises(ValueError, match="int4 weights cannot be resized"):
        small.resize_token_embeddings(70)
    wrong = model()
    wrong.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite cannot be rounded to int4"):
        quantise(wrong, 4)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"weight_format": "int4", "mlp": "experts", "experts": {"count": 4}}, "needs mlp 'gated' or 'plain'"),
        ({"weight_format": "int4", "weight_group": 16}, "weight_group must be 64 or 32"),
        ({"weight_format": "int8", "weight_int8": ["layers.0.mlp.up_proj"]}, "weight_int8 needs weight_format 'int4'"),
        ({"weight_format": "int4", "weight_int8": "up"}, "weight_int8"),
    ],
)
def test_wrong_configurations(options: dict[str, Any], line: str) -> None:
    with pytest.raises((ValueError, TypeError), match=line):
        skipstone.SkipstoneConfig(**options)


@pytest.mark.parametrize("name", ["layers.0.mlp.up", "lm_head", "layers.9.mlp.up_proj", "norm"])
def test_a_name_that_is_no_matrix(name: str) -> None:
    with pytest.raises(ValueError, match=f"weight_int8 names '{name}', which is no matrix"):
        model(weight_format="int4", weight_int8=[name])


def test_adapting_it_is_refused(tmp_path: Path) -> None:
    quantise(model(), 4).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="it has int4 weights, which cannot be trained"):
        load_dense(str(tmp_path / "small"))


def test_a_folder_and_back_to_dense(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "whole")
    export_quantised(tmp_path / "whole", tmp_path / "small", bits=4)
    small = load_model(tmp_path / "small")
    assert small.config.weight_format == "int4"
    export_dense(tmp_path / "small", tmp_path / "dense")
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        assert torch.allclose(dense(long()).logits, small(long()).logits, atol=5e-3)


def test_the_command_says_which_bits_there_are(tmp_path: Path) -> None:
    from skipstone_cli.main import app

    found = CliRunner().invoke(app, ["quantise", str(tmp_path), str(tmp_path / "out"), "--bits", "5"])
    assert found.exit_code == 1
    assert "--bits must be 16, 8 or 4, got 5" in str(found.output) + str(found.exception)


WIDTH = 256
KINDS = {
    "attn_q": "Q4_1",
    "attn_k": "Q4_0",
    "attn_v": "Q4_0",
    "attn_output": "Q4_1",
    "ffn_gate": "Q4_1",
    "ffn_up": "Q8_0",
}


def gguf_file(path: Path, kinds: dict[str, str]) -> Any:
    """Write a Llama of one block, its matrices in these formats; others are fp32. Returns what reads it."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    writer, made = gguf.GGUFWriter(str(path), "llama"), torch.Generator().manual_seed(0)
    for name, number in (("context_length", 64), ("embedding_length", WIDTH), ("block_count", 1), ("vocab_size", 61)):
        getattr(writer, f"add_{name}")(number)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    shapes = {"attn_q": (256, 256), "attn_k": (128, 256), "attn_v": (128, 256), "attn_output": (256, 256)}
    shapes |= {"ffn_gate": (128, 256), "ffn_up": (128, 256), "ffn_down": (256, 128)}
    writer.add_tensor("token_embd.weight", torch.randn(61, WIDTH, generator=made).numpy())
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", torch.ones(WIDTH).numpy())
    for name, shape in shapes.items():
        weight = (torch.randn(shape, generator=made) * 0.05).numpy()
        if name not in kinds:
            writer.add_tensor(f"blk.0.{name}.weight", weight)
            continue
        if kinds[name] == "Q4_K":  # which the package does not write
            blocks = torch.randint(0, 256, (shape[0], shape[1] // 256 * 144), generator=made).to(torch.uint8)
            blocks[:, :4] = torch.tensor([[0.001, 0.002]]).half().view(torch.uint8)
            given, kind = blocks.numpy(), gguf.GGMLQuantizationType.Q4_K
        else:
            kind = gguf.GGMLQuantizationType[kinds[name]]
            given = gguf.quantize(weight, kind)
        writer.add_tensor(f"blk.0.{name}.weight", given, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf


def test_blocks_of_a_gguf_file_are_kept_exactly(tmp_path: Path) -> None:
    """Also those of queries and keys, whose rows transformers' reader puts in another order."""
    path = tmp_path / "a.gguf"
    gguf_file(path, KINDS)
    given, rows = load_pretrained(path), four_bit_rows(path)
    assert rows is not None
    small = quantise(given, 4, rows)
    assert small.config.weight_int8 == ["layers.0.mlp.up_proj", "layers.0.mlp.down_proj"]
    whole = dequantise(small)
    four = [name for name, module in small.named_modules() if isinstance(module, Int4Linear)]
    assert len(four) == 5
    for name in four:
        assert torch.equal(whole.get_parameter(f"{name}.weight"), given.get_parameter(f"{name}.weight"))
    export_quantised(path, tmp_path / "out", bits=4)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "out")(ids()).logits, small(ids()).logits)


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_of_eight_and_five_bits_are_kept_exactly(bits: int, tmp_path: Path) -> None:
    """They become int8 in groups of 32, beside four-bit blocks and alone."""
    path = tmp_path / "a.gguf"
    kinds = {name: "Q8_0" if name.startswith("attn") else "Q5_0" for name in (*KINDS, "ffn_down")}
    gguf_file(path, {**kinds, "attn_q": "Q4_0"})
    given = load_pretrained(path)
    small = quantise(given, bits, four_bit_rows(path) if bits == 4 else None)
    assert small.config.weight_group == 32
    whole = dequantise(small)
    for block, kept in zip(whole.model.layers, given.model.layers, strict=True):
        assert all(torch.equal(x, kept.get_parameter(name)) for name, x in block.named_parameters())
    small.save_pretrained(tmp_path / "small")
    with torch.no_grad():
        logits = load_model(tmp_path / "small")(ids(1, 3)).logits
        assert torch.equal(logits, small(ids(1, 3)).logits)
        torch.testing.assert_close(logits, whole(ids(1, 3)).logits, rtol=1e-3, atol=1e-3)


def test_scales_of_q4_k_are_rounded_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    gguf_file(path, {"attn_q": "Q4_K", "ffn_gate": "Q4_K"})
    given, rows = load_pretrained(path), four_bit_rows(path)
    small = quantise(given, 4, rows)
    whole = dequantise(small)
    assert len(small.config.weight_int8 or ()) == 5
    for name in ("self_attn.q_proj", "mlp.gate_proj"):
        got, want = (m.get_parameter(f"model.layers.0.{name}.weight") for m in (whole, given))
        groups = [x.unflatten(1, (-1, 32)) for x in (got, want)]
        # 2^-12 of the scale, up to 15 times, and of the offset
        bound = 2.0**-12 * 2.2 * torch.stack(groups).abs().amax((0, 3)) + 1e-3 * 2.0**-12 * 63 * 15
        assert ((groups[0] - groups[1]).abs().amax(2) <= bound).all()


def test_a_file_without_four_bit_blocks_is_rounded_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    gguf_file(path, {"ffn_up": "Q8_0"})
    rows = four_bit_rows(path)
    assert rows is not None
    assert not rows.any
    small = quantise(load_pretrained(path), 4, rows)
    assert small.config.weight_int8 is None
    assert len([m for m in small.modules() if isinstance(m, Int4Linear)]) == 7
    assert four_bit_rows(tmp_path) is None


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    gguf_file(tmp_path / "a.gguf", KINDS)
    whole = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ValueError, match=r"a\.gguf") as caught:
        export_quantised(tmp_path / "a.gguf", tmp_path / "out", bits=4)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_weight_of_another_size_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    quantise(model(), 4).save_pretrained(tmp_path / "small")
    file = tmp_path / "small" / "model.safetensors"
    tensors, name = load_file(file), "model.layers.1.mlp.down_proj.weight"
    for wrong, line in (
        (tensors[name][:, :-5], f"{name} has shape"),
        (None, f"lacks {name}"),
    ):
        changed = {key: x for key, x in tensors.items() if key != name} | ({} if wrong is None else {name: wrong})
        save_file({key: x.contiguous() for key, x in changed.items()}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=line):
            load_model(tmp_path / "small")
