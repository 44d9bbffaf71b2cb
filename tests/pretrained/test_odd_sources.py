"""Unusual checkpoints of real users are read correctly, or refused in one line that names folder and cause."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.generate import generate
from skipstone.model.pretrained import convert, load_model, load_pretrained

SIZES: dict[str, Any] = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA_LIKE: dict[str, Any] = {**SIZES, "num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 64}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**LLAMA_LIKE),
    "mistral": lambda: MistralConfig(**LLAMA_LIKE, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**LLAMA_LIKE),
    "qwen3": lambda: Qwen3Config(**LLAMA_LIKE, head_dim=8),
    "gpt2": lambda: GPT2Config(
        vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
}


@pytest.fixture(params=FAMILIES, scope="module")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    AutoModelForCausalLM.from_config(FAMILIES[request.param]()).save_pretrained(folder)
    return folder


@pytest.fixture
def source(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "source")


def edited(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def half(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def half_pickle(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def integers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "mlp" in name and name.endswith("weight"))
    save_file({**tensors, name: tensors[name].to(torch.int8)}, folder / "model.safetensors", {"format": "pt"})


def generation(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "generation_config.json").write_text(text)

    return write


def no_tensors(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weights": object}, folder / "pytorch_model.bin")


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "a list": (
        lambda folder: (folder / "config.json").write_text("[1]"),
        "config.json' cannot be read: it does not contain a JSON object",
    ),
    "git-lfs": (pointer, "is a pointer of git-lfs, not the file itself; run `git lfs pull`"),
    "adapter": (adapter, r"holds a model and an adapter \(adapter_config.json\); move"),
    "half": (half, "source"),
    "half pickle": (half_pickle, "source"),
    "no tensors": (no_tensors, "source"),
    "padding": (lambda folder: edited(folder, pad_token_id=61), "source"),
    "size in words": (lambda folder: edited(folder, hidden_size="wide", n_embd="wide"), "source"),
    "integers": (integers, "holds .* as I8: the weights are quantised; load the unquantised checkpoint"),
    "generation_config cut off": (generation("{"), "generation_config.json' cannot be read"),
    "generation_config of a list": (generation("[]"), "generation_config.json' cannot be read: it does not contain"),
    "an end in words": (generation('{"eos_token_id": "</s>"}'), "eos_token_id in .*must be a token id or a list"),
    "no map": (lambda folder: (folder / "config.json").write_text("[]") and None, "source"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_source_is_one_line_that_names_it(what: str, source: Path, tmp_path: Path) -> None:
    spoil, why = BROKEN[what]
    spoil(source)
    with pytest.raises((ValueError, FileNotFoundError), match=why) as told:
        convert(source, tmp_path / "out")
    assert "\n" not in str(told.value)
    assert str(source) in str(told.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "rope", [{"rope_type": "linear"}, {"rope_type": "yarn", "factor": "2.0"}, {"rope_type": "odd"}]
)
def test_rope_that_lacks_its_numbers_is_one_line(rope: dict[str, Any], tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(FAMILIES["qwen2"]()).save_pretrained(tmp_path)
    edited(tmp_path, rope_parameters=rope, rope_scaling=rope)
    with pytest.raises(ValueError, match=str(tmp_path)) as told:
        load_pretrained(tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("where", ["git-lfs", "adapter", "half", "no tensors", "an end in words"])
def test_a_broken_model_of_ours_is_one_line(where: str, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    SkipstoneForCausalLM(SkipstoneConfig(**SIZES)).save_pretrained(folder)
    BROKEN[where][0](folder)
    with pytest.raises(ValueError, match=BROKEN[where][1]) as told:
        load_model(folder)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("ours", [False, True], ids=["theirs", "converted"])
def test_constants_of_old_files_are_passed_by(source: Path, ours: bool, tmp_path: Path) -> None:
    folder = source
    if ours:
        convert(source, folder := tmp_path / "ours")
    right = load_pretrained(folder).state_dict()
    tensors = load_file(folder / "model.safetensors")
    for name in ("attn.masked_bias", "attn.bias", "self_attn.rotary_emb.inv_freq"):
        place = "model.layers.0" if ours or "model.norm.weight" in tensors else "h.0"
        tensors[f"{place}.{name}"] = torch.full((1, 1), -1e4)
    tensors["embeddings.position_ids"] = torch.arange(8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "files.json").unlink(missing_ok=True)  # the size of the file is another one now
    found = load_pretrained(folder).state_dict()
    assert found.keys() == right.keys()
    assert all(torch.equal(found[name], right[name]) for name in right)


def test_a_tensor_without_a_place_is_still_refused(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"model.extra.weight": torch.ones(2)}, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no place for .*extra\.weight"):
        load_pretrained(source)


def test_no_dropout_may_be_null(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(FAMILIES["llama"]()).save_pretrained(tmp_path)
    edited(tmp_path, attention_dropout=None)
    assert load_pretrained(tmp_path).config.attention_dropout == 0.0


def test_padding_of_the_first_llamas_is_none(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(FAMILIES["llama"]()).save_pretrained(tmp_path)
    edited(tmp_path, pad_token_id=-1, bos_token_id=-1, eos_token_id=5)
    model = load_pretrained(tmp_path)
    assert model.config.pad_token_id is model.config.bos_token_id is None
    model.generation_config.pad_token_id = -1
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[5] = torch.randn(16)  # every second row or so ends at once
    out = generate(model, torch.randint(6, 61, (8, 4)), max_new_tokens=4, eos_token_id=5, temperature=1.0, seed=0)
    assert 0 <= out.min() <= out.max() < 61


@pytest.mark.parametrize(("rope", "context"), [
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}, 256),
    ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}, 64),
    ({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, 64),
])  # fmt: skip
def test_context_of_stretched_rope(rope: dict[str, Any], context: int, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(Qwen2Config(**LLAMA_LIKE, rope_parameters=rope)).save_pretrained(tmp_path)
    model = load_pretrained(tmp_path)
    assert model.config.max_position_embeddings == context
    assert generate(model, torch.zeros(1, 60, dtype=torch.long), max_new_tokens=context - 60).shape[1] == context


def test_pushing_a_configuration_uploads_the_shim_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import hub

    class Api:
        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            return type("Url", (), {"repo_id": repo_id})()

    seen: list[set[str]] = []

    def upload(self: Any, working_dir: str, repo_id: str, files_timestamps: dict[str, float], **kwargs: Any) -> None:
        new = {f.name for f in Path(working_dir).iterdir() if f.name not in files_timestamps}
        seen.append(new)

    monkeypatch.setattr("transformers.configuration_utils.hf_api", Api)
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    SkipstoneConfig().save_pretrained(tmp_path / "new", push_to_hub=True, repo_id="owner/name")
    assert seen == [{"config.json", "modeling_skipstone.py"}]
