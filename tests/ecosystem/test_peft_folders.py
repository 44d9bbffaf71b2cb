"""Folders of adapters that PEFT has saved: converted with their base, or one line that says why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from command import command
from ecosystem.tool import TOOLS_OWN_WARNINGS, load, stirred
from skipstone import SkipstoneConfig
from skipstone.data.tokenizers import byte_tokenizer
from skipstone.model.pretrained import convert, load_model, load_pretrained, load_tokenizer

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(TOOLS_OWN_WARNINGS)

SIZES: dict[str, Any] = {"vocab_size": 260, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
ROUTED = [{"name": "mixture_of_depths", "layers": [1], "capacity": 0.5, "decision": "ema_threshold"}]
KINDS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    "LoRA and routers": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["router"]),
    "DoRA": lambda: peft.LoraConfig(r=2, target_modules=["down_proj"], use_dora=True, init_lora_weights=False),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "VB-LoRA": lambda: peft.VBLoRAConfig(target_modules=["q_proj"], r=2, vector_length=8, num_vectors=8, topk=2),
    "AdaLoRA": lambda: peft.AdaLoraConfig(
        target_modules=["q_proj"], total_step=10, tinit=1, tfinal=3, init_r=2, target_r=1
    ),
    "VeRA": lambda: peft.VeraConfig(r=2, target_modules=["q_proj", "v_proj"], init_weights=False),
}
IDS = torch.arange(3, 15).view(1, -1)


def save_base(folder: Path) -> Path:
    stirred(SkipstoneConfig(**SIZES, mechanisms=ROUTED)).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    return folder / "base"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path)


def saved(base: Path, config: Any) -> tuple[Path, Any]:
    """The folder of an adapter of the base, with random weights, and the adapted model."""
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(base.parent / "adapter")
    return base.parent / "adapter", adapted


@pytest.mark.parametrize(
    "kind", [*list(KINDS)[:2], *(pytest.param(k, marks=pytest.mark.slow) for k in list(KINDS)[2:])]
)
@torch.no_grad()
def test_an_adapter_of_ours_becomes_a_model(kind: str, base: Path, tmp_path: Path) -> None:
    folder, adapted = saved(base, KINDS[kind]())
    if kind == "LoRA and routers":
        with pytest.warns(UserWarning, match="holds routers, but thresholds and other buffers stay those of its base"):
            convert(folder, tmp_path / "out")
    else:
        convert(folder, tmp_path / "out")
    model = load_model(tmp_path / "out").eval()
    torch.testing.assert_close(model(IDS).logits, adapted(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)
    assert all(parameter.requires_grad for parameter in load_pretrained(folder).parameters())
    assert len(load_tokenizer(tmp_path / "out")) == len(load_tokenizer(base))


@pytest.mark.parametrize("config", [LlamaConfig, pytest.param(Phi3Config, marks=pytest.mark.slow)])
@torch.no_grad()
def test_an_adapter_of_a_dense_family_is_merged_under_its_own_names(config: Any, tmp_path: Path) -> None:
    """Phi-3's fused projections are adapted whole, and divided afterwards."""
    small = config(**SIZES, intermediate_size=24, num_key_value_heads=1, pad_token_id=0, eos_token_id=1)
    AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path / "base")
    folder, adapted = saved(tmp_path / "base", KINDS["LoRA"]())
    torch.testing.assert_close(load_pretrained(folder).eval()(IDS).logits, adapted(input_ids=IDS).logits)


def edited(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path)

    return edit


PLACE = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no base": (edited(base_model_name_or_path=None), "must name the adapter's base, got None"),
    "base that is gone": (edited(base_model_name_or_path="/nowhere/x"), "the base of the adapter .*'/nowhere/x' does"),
    "a base that is an adapter": (
        lambda folder: edited(base_model_name_or_path=str(folder))(folder),
        "is an adapter itself",
    ),
    "another kind": (edited(peft_type="WHAT"), "peft_type 'WHAT' is unknown"),
    "virtual tokens": (edited(peft_type="PROMPT_TUNING"), "has no weights to merge"),
    "a revision": (edited(revision="v2"), "revision 'v2' of a base is not supported"),
    "another rank": (edited(r=3), "size mismatch for .*lora_A"),
    "no such layer": (edited(target_modules=["nothing"]), "(?i)target modules .*not found|No modules were targeted"),
    "a tensor is missing": (tensors(lambda found: found.pop(min(found))), "the checkpoint lacks .*lora_A"),
    "a tensor is left over": (tensors(lambda found: found.update({PLACE: torch.zeros(2, 16)})), "no place for .*9"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "the weights .* are missing"),
    "damaged weights": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 99),
        "adapter_model.safetensors' is damaged or no file of weights: .*header",
    ),
    "empty weights": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""),
        "adapter_model.safetensors' is damaged or no file of weights: it is empty",
    ),
    "a folder of weights": (
        lambda folder: (
            (folder / "adapter_model.safetensors").unlink(),
            (folder / "adapter_model.safetensors").mkdir(),
        ),
        "adapter_model.safetensors' is a folder; a file is expected",
    ),
    "a folder for the configuration": (
        lambda folder: ((folder / "adapter_config.json").unlink(), (folder / "adapter_config.json").mkdir()),
        "adapter_config.json' is a folder; a file is expected",
    ),
    "a list": (
        lambda folder: (folder / "adapter_config.json").write_text("[1]"),
        "cannot be read: it does not contain a JSON object",
    ),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(save_base(tmp_path_factory.mktemp("sound")), KINDS["LoRA"]())[0]


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_adapter_is_one_line_and_writes_nothing(what: str, adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    spoil, why = BROKEN[what]
    spoil(folder)
    with pytest.raises(ValueError, match=why) as told:
        convert(folder, tmp_path / "out")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()


def test_a_kind_that_cannot_be_merged_is_one_line(base: Path, tmp_path: Path) -> None:
    folder, _ = saved(base, peft.PolyConfig(target_modules=["q_proj"], r=2, n_tasks=2, n_skills=2))
    with pytest.raises(ValueError, match=r"adapter: peft_type POLY cannot be merged into a model's weights$"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


VERBS = [
    ["calibrate", "FOLDER", "--corpus", "tiny-shakespeare"],
    ["generate", "FOLDER", "--prompt", "x"],
    ["report", "FOLDER"],
    ["eval", "FOLDER", "--corpus", "tiny-shakespeare"],
    ["trace", "FOLDER", "--text", "TEXT", "--out", "OUT.csv"],
    ["view", "FOLDER", "--no-browser"],
    ["compare", "FOLDER", "FOLDER"],
    ["convert", "--to", "dense", "FOLDER", "OUT"],
]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: " ".join(verb[:2]))
def test_verbs_for_models_name_the_way_from_an_adapter_to_one(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "text").write_text("x")
    places = {"FOLDER": "adapter", "TEXT": "text", "OUT": "out", "OUT.csv": "out.csv"}
    words = (str(tmp_path / places[word]) if word in places else word for word in verb)
    assert command(*words) == 2
    said = capsys.readouterr().err
    assert "holds an adapter (adapter_config.json), not a model; `skipstone convert" in said
    assert len([line for line in said.splitlines() if not line.startswith("stage ")]) == 1


@pytest.mark.slow
@torch.no_grad()
def test_quantise_takes_an_adapter(base: Path, tmp_path: Path) -> None:
    folder, adapted = saved(base, KINDS["LoRA"]())
    assert command("quantise", str(folder), str(tmp_path / "small")) == 0
    found, right = load(tmp_path / "small")(IDS).logits, adapted(input_ids=IDS).logits
    assert (found - right).abs().max() < 0.15 * right.abs().max()
