"""Released weights with faults are refused in one line, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from command import command
from pretrained import plain
from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.model.pretrained import load_model
from skipstone.model.released.convert import convert_from, convert_to, load_released

pytestmark = pytest.mark.filterwarnings("ignore:context 'sequence' of polyglu is not causal")


def tsa() -> plain.Weights:
    return plain.token_selective_weights(vocabulary=11, width=32, neurons=16, layers=3, context=8)


def polychromatic() -> plain.Weights:
    return plain.polychromatic_weights(11, 16, 24, 2, heads=(4, 2), context=8)


def refusal(file: Path, layout: str, kind: type[Exception] = ValueError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        convert_from(file, file.parent / "out", layout, **options)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert not (file.parent / "out").exists()
    return str(caught.value)


def renamed(old: str, new: str) -> Callable[[plain.Weights], None]:
    def change(weights: plain.Weights) -> None:
        weights[new] = weights.pop(old)

    return change


def replaced(**values: torch.Tensor) -> Callable[[plain.Weights], None]:
    return lambda weights: weights.update({k.replace("__", "."): v for k, v in values.items()})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("ln_f.bias"), "tsa.pt: lacks ln_f.bias"),
        (lambda w: [w.pop(k) for k in list(w) if k.startswith("routers.1.")], "lacks routers.1.mlp.0.weight and 3 "),
        (lambda w: w.update({"blocks.0.attn.qkv.bias": torch.zeros(96)}), "has blocks.0.attn.qkv.bias, which this "),
        (lambda w: w.update({"extra": torch.zeros(1)}), "has extra, which this layout does not have"),
        (renamed("blocks.1.ln1.weight", "blocks.1.ln3.weight"), "lacks blocks.1.ln1.weight"),
        (replaced(head__weight=torch.zeros(11, 32)), "head.weight differs from token_emb.weight"),
        (replaced(blocks__1__attn__qkv__weight=torch.zeros(64, 32)), "qkv.weight has shape [64, 32]"),
        (replaced(pos_emb__weight=torch.zeros(8)), "pos_emb.weight has shape [8], 2 axes are expected"),
        (replaced(ln_f__bias=torch.zeros(5)), "model.norm.bias has shape [5] in the checkpoint and [32] in the model"),
        (lambda w: [w.pop(k) for k in list(w) if "s.0." not in k and "." in k], "has only one block, which is never"),
    ],
)  # fmt: skip
def test_tsa(tmp_path: Path, change: Callable[[plain.Weights], object], said: str) -> None:
    weights = tsa()
    change(weights)
    torch.save(weights, tmp_path / "tsa.pt")
    assert said in refusal(tmp_path / "tsa.pt", "tsa", num_heads=4)


def test_the_number_of_heads(tmp_path: Path) -> None:
    torch.save(tsa(), tmp_path / "tsa.pt")
    assert "give num_heads (--num-heads)" in refusal(tmp_path / "tsa.pt", "tsa")
    for heads in (5, 0, -4):
        said = refusal(tmp_path / "tsa.pt", "tsa", num_heads=heads)
        assert f"num_heads must divide the width, which is 32; got {heads}" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("rope.sins"), "lacks rope.sins"),
        (renamed("model_core.1.polyglu.beta", "model_core.1.polyglu.gamma"), "lacks model_core.1.polyglu.beta"),
        (lambda w: w.update({"model_core.0.polyglu.tau": torch.ones(())}), "has model_core.0.polyglu.tau, which"),
        (replaced(output_head__weight=torch.zeros(11, 16)), "output_head.weight differs from embeddings.weight"),
        (replaced(rope__cosines=torch.ones(8, 2)), "rope.cosines is not the table of a head of size 4"),
        (replaced(model_core__0__gqa__W_k__weight=torch.zeros(6, 16)), "6 rows, which is not a multiple of the head"),
        (replaced(model_core__1__polyglu__alpha=torch.zeros(24, 5)), "has shape [24, 5] in the checkpoint and [24, 4]"),
    ],
)  # fmt: skip
def test_polychromatic(tmp_path: Path, change: Callable[[plain.Weights], object], said: str) -> None:
    weights = polychromatic()
    change(weights)
    torch.save({"model": weights, "tau": 0.1}, tmp_path / "a.pt")
    assert said in refusal(tmp_path / "a.pt", "polychromatic")


def test_an_unknown_name_is_shown_its_nearest(tmp_path: Path) -> None:
    weights = polychromatic() | {"model_core.1.polyglu.betta": torch.ones(4)}
    torch.save({"model": weights}, tmp_path / "a.pt")
    assert "the nearest name that it has is model_core.1.polyglu.beta)" in refusal(tmp_path / "a.pt", "polychromatic")


@dataclass
class Settings:
    """Something that only running the pickle could bring back."""

    rate: float = 0.1


def test_files_that_are_something_else(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    assert "does not exist" in refusal(file, "tsa", FileNotFoundError)
    assert "is a folder" in refusal(tmp_path, "tsa")
    for content in (b"", b"no weights", b"a stone, " * 50, b"PK\x03\x04 broken"):
        file.write_bytes(content)
        assert "a.pt: is no file of weights that can be read" in refusal(file, "tsa", num_heads=4)
    (tmp_path / "a.safetensors").write_bytes(b"no weights")
    assert "a.safetensors: is no file of weights" in refusal(tmp_path / "a.safetensors", "polychromatic")
    for value in ([1, 2], {"step": 3}, {"model": {}}, torch.ones(3)):
        torch.save(value, file)
        assert "contains no state dict" in refusal(file, "tsa", num_heads=4)
    torch.save({**tsa(), "step": 3}, file)
    assert "step is not a tensor, but int" in refusal(file, "tsa", num_heads=4)
    torch.save({"model": tsa(), "settings": Settings()}, file)
    said = refusal(file, "tsa", num_heads=4)
    assert "holds more than tensors and plain values" in said
    assert "test_released_refusals.Settings" in said


def test_the_wrong_layout_and_options(tmp_path: Path) -> None:
    torch.save(tsa(), tmp_path / "tsa.pt")
    save_file({k: v.clone() for k, v in polychromatic().items()}, tmp_path / "b.safetensors")
    assert "has no tensor model_core.0" in refusal(tmp_path / "tsa.pt", "polychromatic")
    assert "has no tensor blocks.0" in refusal(tmp_path / "b.safetensors", "tsa", num_heads=4)
    assert "did you mean 'tsa'" in refusal(tmp_path / "tsa.pt", "ts")
    assert "unknown option of layout 'tsa' 'tau'" in refusal(tmp_path / "tsa.pt", "tsa", tau=0.1)
    assert "tau must be above 0, got 0" in refusal(tmp_path / "b.safetensors", "polychromatic", tau=0.0)
    assert "unknown dtype 'float8'" in refusal(tmp_path / "b.safetensors", "polychromatic", dtype="float8")


SIZES = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "qk_norm": True}
LAYOUT = {"tie_word_embeddings": True, "activation": {"name": "polyglu", "context": "sequence"}}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"activation": "silu"}, "polyglu with context 'sequence' only"),
        ({"activation": {"name": "polyglu"}}, "polyglu with context 'sequence' only"),
        ({"qk_norm": False}, "qk_norm is False, this layout has True only"),
        ({"attention_window": 4}, "attention_window is 4, this layout has none"),
        ({"mechanisms": [{"name": "early_exit"}]}, "this layout has [] only"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "theta 10000 without scaling only"),
        ({"head_dim": 8}, "must be hidden_size (16) in this layout"),
    ],
)
def test_models_that_the_released_code_would_compute_otherwise(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    SkipstoneForCausalLM(SkipstoneConfig(**{**SIZES, **LAYOUT, **options})).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError) as caught:
        convert_to(tmp_path / "model", tmp_path / "out.pt", "polychromatic")
    assert said in str(caught.value)
    assert not (tmp_path / "out.pt").exists()


def test_writing(tmp_path: Path) -> None:
    SkipstoneForCausalLM(SkipstoneConfig(**SIZES, **LAYOUT)).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"unknown layout to write 'tsa' \(allowed: polychromatic\)"):
        convert_to(tmp_path / "model", tmp_path / "out.pt", "tsa")
    with pytest.raises(ValueError, match=r"must end in .pt or .safetensors"):
        convert_to(tmp_path / "model", tmp_path / "out.bin", "polychromatic")
    convert_to(tmp_path / "model", tmp_path / "new" / "out.pt", "polychromatic")
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        convert_to(tmp_path / "model", tmp_path / "new" / "out.pt", "polychromatic")
    model = load_model(tmp_path / "model")
    next(iter(model.routing_modules())).tau.fill_(0.5)
    model.save_pretrained(tmp_path / "uneven")
    with pytest.raises(ValueError, match=r"differ in tau \(0.5 to 1\)"):
        convert_to(tmp_path / "uneven", tmp_path / "out.pt", "polychromatic")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "new", "uneven"}


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save(tsa(), tmp_path / "tsa.pt")
    torch.save({"model": polychromatic(), "tau": 0.1}, tmp_path / "a.pt")
    assert command("convert", tmp_path / "tsa.pt", tmp_path / "one", "--from", "tsa", "--num-heads", 4) == 0
    assert load_model(tmp_path / "one").config.num_attention_heads == 4
    assert command("convert", "--from", "polychromatic", tmp_path / "a.pt", tmp_path / "two", "--tau", 0.5) == 0
    assert load_model(tmp_path / "two").config.activation["tau_end"] == 0.5
    assert command("convert", "--to", "polychromatic", tmp_path / "two", tmp_path / "b.safetensors") == 0
    assert load_released(tmp_path / "b.safetensors", "polychromatic").config.num_key_value_heads == 2
    shown = capfd.readouterr()
    assert shown.out.splitlines() == [f"written: {tmp_path / name}" for name in ("one", "two", "b.safetensors")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tsa.pt", "out"], "name their layout, --from tsa or --from polychromatic"),
        (["tsa.pt", "out", "--from", "tsa"], "give num_heads (--num-heads)"),
        (["tsa.pt", "out", "--num-heads", 4], "--num-heads has no effect without --from"),
        (["tsa.pt", "out", "--from", "tsa", "--to", "polychromatic"], "give one of the two"),
        (["tsa.pt", "out", "--from", "tsa", "--num-heads", 4, "--tau", 1], "unknown option of layout 'tsa' 'tau'"),
        (["tsa.pt", "tsa.pt", "--from", "tsa"], "exists already"),
        (["typo.pt", "out", "--from", "tsa"], "does not exist"),
    ],
)
def test_the_commands_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: list[object],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(tsa(), "tsa.pt")
    assert command("convert", *words) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert len([line for line in shown.err.splitlines() if not line.startswith("stage ")]) == 1
    assert said in shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["tsa.pt"]
