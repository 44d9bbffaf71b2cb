"""PolychromaticLM: released layouts agree with the paper's formulas, and are written back byte for byte."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from pretrained import plain
from published import dynamic_entropies
from skipstone import SkipstoneForCausalLM, presets
from skipstone.model.pretrained import load_model
from skipstone.model.released.convert import convert_from, convert_to, load_released
from skipstone.model.released.polychromatic import values_of

CAUTION = "context 'sequence' of polyglu is not causal"
pytestmark = pytest.mark.filterwarnings(f"ignore:{CAUTION}")
CONTEXT, VOCABULARY = 32, 41


@pytest.fixture
def weights() -> plain.Weights:
    return plain.polychromatic_weights(VOCABULARY, 32, 48, 3, heads=(4, 2), context=CONTEXT)


@pytest.fixture
def ids_BT() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, 20))


def save(weights: plain.Weights, path: Path, **beside: object) -> Path:
    """As the release does it: a checkpoint of the trainer, or the tensors alone."""
    if path.suffix == ".pt":
        torch.save({"model": weights, "optimizer": {"state": {}}, "scheduler": {}, "step": 19531, **beside}, path)
    else:
        save_file({name: value.clone() for name, value in weights.items()}, path)
    return path


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_logits_and_entropies(tmp_path: Path, weights: plain.Weights, ids_BT: Tensor, name: str, tau: float) -> None:
    convert_from(save(weights, tmp_path / name), tmp_path / "model", "polychromatic", tau=tau)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert isinstance(model, SkipstoneForCausalLM)
    with torch.no_grad():
        out = model(ids_BT, routing="oracle", noise=False, output_records=True)
    expected, entropies = plain.polychromatic(weights, ids_BT, tau)
    assert_close(out.logits, expected, rtol=0.0, atol=1e-5)
    found = dynamic_entropies(model, out.records)
    assert found == pytest.approx([float(entropy) for entropy in entropies], abs=1e-5)
    assert all(0.1 < entropy < math.log(4) for entropy in found)
    other = plain.polychromatic(weights, ids_BT, 1.1 - tau)[0]
    assert (other - expected).abs().max() > 1e-2


def test_tau_is_the_files_unless_told_otherwise(tmp_path: Path, weights: plain.Weights) -> None:
    file = save(weights, tmp_path / "a.pt", tau=0.25)
    for tau, expected in ((None, 0.25), (0.5, 0.5)):
        model = load_released(file, "polychromatic", tau=tau)
        assert [mechanism.tau.item() for mechanism in model.routing_modules()] == [expected] * 3
    model = load_released(save(weights, tmp_path / "a.safetensors"), "polychromatic")
    for progress in (0.0, 0.5, 1.0):  # further training keeps it
        for mechanism in model.routing_modules():
            mechanism.advance(progress, None)
            assert mechanism.tau.item() == pytest.approx(0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_the_way_back_gives_the_same_keys_and_bytes(
    tmp_path: Path, weights: plain.Weights, name: str, dtype: torch.dtype
) -> None:
    """In bf16, as it is released, the rotary tables are rounded too."""
    weights = {key: value.to(dtype) for key, value in weights.items()}
    weights["output_head.weight"] = weights["embeddings.weight"]
    file, again = save(weights, tmp_path / name, tau=0.1), tmp_path / f"again{Path(name).suffix}"
    convert_from(file, tmp_path / "model", "polychromatic")
    assert load_model(tmp_path / "model").dtype == dtype
    convert_to(tmp_path / "model", again, "polychromatic")
    if again.suffix == ".pt":
        content = torch.load(again, weights_only=True)
        assert (content.keys(), content["tau"]) == ({"model", "tau"}, 0.1)
        found = content["model"]
        assert list(found) == list(weights)
        assert found["output_head.weight"].data_ptr() == found["embeddings.weight"].data_ptr()
    else:
        found = load_file(again)
        assert again.read_bytes() == file.read_bytes()
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        assert found[key].dtype == dtype
        assert torch.equal(found[key].view(torch.uint8), value.view(torch.uint8))


def test_a_file_without_the_tied_head(tmp_path: Path, weights: plain.Weights) -> None:
    """As safetensors' own saver of models leaves it."""
    holder = nn.Module()
    for key, value in weights.items():
        parent = holder
        *path, leaf = key.split(".")
        for part in path:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.register_buffer(leaf, value)
    save_model(holder, str(tmp_path / "a.safetensors"))
    assert "output_head.weight" not in load_file(tmp_path / "a.safetensors")
    model = load_released(tmp_path / "a.safetensors", "polychromatic")
    assert torch.equal(model.lm_head.weight, weights["embeddings.weight"])


def test_the_preset_is_the_release() -> None:
    """597,153,888 parameters, 1,380,960 of them for routing, under 28 * 17 + 5 names."""
    shapes = plain.polychromatic_shapes(151_669, 1024, 4096, 28, (16, 8), 4096)
    released = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert len(released) == 28 * 17 + 5
    parameters = {k: v.numel() for k, v in released.items() if not k.startswith(("rope.", "output_head."))}
    routing = ("alpha", "beta", "gate_net")
    assert sum(parameters.values()) == 597_153_888
    assert sum(n for k, n in parameters.items() if any(word in k for word in routing)) == 1_380_960
    values, preset = values_of(released, 28), presets.get("polychromatic-0.6b")
    assert values.pop("activation") == {**preset.activation, "router_width": 32}
    assert {name: getattr(preset, name) for name in values} == values
    with torch.device("meta"):
        model = SkipstoneForCausalLM(preset)
    assert model.num_parameters() == 597_153_888
    assert sum(p.numel() for m in model.routing_modules() for p in m.parameters()) == 1_380_960


def test_it_says_that_it_sees_the_future(tmp_path: Path, weights: plain.Weights, ids_BT: Tensor) -> None:
    with pytest.warns(UserWarning, match=CAUTION) as caught:
        model = load_released(save(weights, tmp_path / "a.pt"), "polychromatic")
    assert len(caught) == 1
    for refused in (
        lambda: model.generate(ids_BT, max_new_tokens=2),
        lambda: model.generate(ids_BT, max_new_tokens=2, routing="oracle"),
        lambda: model(ids_BT),
    ):
        with pytest.raises(ValueError, match="context 'sequence' of polyglu sees the whole row and cannot generate"):
            refused()


def test_generation_as_published_when_asked_for(tmp_path: Path, weights: plain.Weights) -> None:
    """Every step runs the whole text again, so what came before is decided anew."""
    model = load_released(save(weights, tmp_path / "a.pt"), "polychromatic", tau=1.0)
    model.train()  # generation draws no noise even so
    expected = torch.randint(0, VOCABULARY, (2, 5))
    prompt_BT = expected
    for _ in range(8):
        newest = plain.polychromatic(weights, expected, 1.0)[0][:, -1:].argmax(-1)
        expected = torch.cat([expected, newest], 1)
    found = model.generate(prompt_BT, max_new_tokens=8, do_sample=False, routing="oracle", use_cache=False)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="needs the whole row in every call, not a cache"):
        model.eval()(prompt_BT, routing="oracle", past_key_values=fresh_cache(model))


def fresh_cache(model: SkipstoneForCausalLM) -> object:
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=model.config)
