"""What conversion promises beside equal logits: beams, saved files, the way back, and a start that changes nothing."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pages import Page
from skipstone import SkipstoneConfig
from skipstone.adapt.export import export_dense
from skipstone.adapt.student import drop_blocks, route, with_defaults
from skipstone.core.routing_module import causal_obstacle
from skipstone.mechanisms import DEPTH
from skipstone.model.families import FAMILIES, family_config
from skipstone.model.pretrained import convert, load_model, load_pretrained
from skipstone_studies.speed import parity

ONE_EACH = [  # a family's richest case
    "Mistral, window", "Ministral", "Qwen2, window", "Qwen3, window", "SmolLM3, window, biases",
    "Granite, tied, biases", "OLMo 2, tied, biases", "OLMo 3, window, yarn",
    "Gemma 2", "Gemma 3, caps, biases, linear RoPE",
    "Phi-3, window, partial RoPE", "Phi-3, longrope", "GLM", "GLM-4", "Cohere, untied, QK-norm, biases, linear RoPE",
    "Cohere 2, biases", "Nemotron, partial RoPE", "StarCoder2, window", "GPT-NeoX", "GPT-2",
    "Llama, linear RoPE, biases",
]  # fmt: skip
LENGTH, FP32 = 30, 5e-6
NEUTRAL = 1e-3  # a gate that is open is not quite 1


HELD_ELSEWHERE = (
    "GLM",
    "Cohere 2, biases",
    "Ministral",
    "OLMo 3, window, yarn",
    "Qwen2, window",
    "Qwen3, window",
    "GPT-2",
    "Llama, linear RoPE, biases",
)


def slow_if_held(case: str) -> Any:
    """Families whose parts others have too, or that `test_parity.py` tries quickly, are slow here."""
    return pytest.param(case, marks=[pytest.mark.slow] if case in HELD_ELSEWHERE else [])


@pytest.fixture(params=map(slow_if_held, ONE_EACH), scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    parity.save_random(parity.CASES[request.param], folder / "source")
    convert(folder / "source", folder / "ours")
    return folder


def ids(rows: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randint(2, 97, (rows, length), generator=torch.Generator().manual_seed(3))


def test_every_family_is_here() -> None:
    assert {parity.CASES[case].model_type for case in ONE_EACH} == FAMILIES.keys()


def test_every_family_is_in_the_table_of_the_page() -> None:
    lines = [line for line in Page("docs/convert.md").text.splitlines() if line.startswith("|")]
    assert set(re.findall(r"`([a-z0-9_]+)`", "".join(line.split("|")[1] for line in lines))) >= FAMILIES.keys()


@torch.no_grad()
def test_logits_beams_of_padded_rows_and_the_way_back(checkpoint: Path) -> None:
    """Past the windows and past longrope's border, from a file of ours, with rows reordered as beams are."""
    ours, theirs = load_model(checkpoint / "ours"), parity.theirs(checkpoint / "source")
    expected = theirs(ids()).logits
    assert parity.relative_error(ours(ids()).logits, expected) < FP32
    mask_BT = (torch.arange(LENGTH) >= torch.tensor([[0], [7], [LENGTH - 1]])).long()
    options = {"attention_mask": mask_BT, "num_beams": 2, "do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    assert ours.generate(ids(), **options).tolist() == theirs.generate(ids(), **options).tolist()
    export_dense(checkpoint / "ours", checkpoint / "back")
    back = parity.theirs(checkpoint / "back")
    assert type(back) is type(theirs)
    assert back.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(x, theirs.state_dict()[name]) for name, x in back.state_dict().items())
    assert parity.relative_error(back(ids()).logits, expected) < 1e-6  # gelu_new comes back under another name


@pytest.mark.slow
@torch.no_grad()
def test_a_start_that_changes_nothing_and_decisions_that_do(checkpoint: Path) -> None:
    """Every mechanism on the family's blocks, as `adapt` starts it, and then with decisions under both executors."""
    source = load_model(checkpoint / "ours")
    expected = source(ids()).logits
    for name in DEPTH:
        entries = with_defaults([{"name": name, "layers": [1]}])
        config = SkipstoneConfig.from_dict({**source.config.to_dict(), "mechanisms": entries})
        model = route(source, config, 0).eval()
        for routing in ["oracle"] if causal_obstacle(model.routing_modules()) else ["oracle", "causal"]:
            assert parity.relative_error(model(ids(), routing=routing).logits, expected) < NEUTRAL
        kept = {1: torch.rand(3, LENGTH) < 0.5}
        gathered, masked = (model(ids(), routing=kept, executor=which).logits for which in ("gathered", "masked"))
        assert parity.relative_error(gathered, masked) < FP32
        assert parity.relative_error(gathered, expected) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("case", ONE_EACH)
def test_sharded_and_bfloat16_files(case: str, tmp_path: Path) -> None:
    parity.save_random(parity.CASES[case], tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16).save_pretrained(
        tmp_path / "sharded", max_shard_size="20KB"
    )
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert load_pretrained(tmp_path / "sharded").dtype == torch.bfloat16
    assert parity.logits_error(tmp_path / "sharded", ids(), torch.float32) < 1e-5
    convert(tmp_path / "sharded", tmp_path / "ours")
    export_dense(tmp_path / "ours", tmp_path / "back")
    a, b = (parity.theirs(tmp_path / name).state_dict() for name in ("sharded", "back"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_decoder_that_no_family_computes_is_refused() -> None:
    config = SkipstoneConfig(norm_placement="after", qk_norm=True, vocab_size=97)
    with pytest.raises(ValueError, match=r'no dense family computes this decoder .*"norm_placement": "after"'):
        family_config(config, "silu")


def test_a_model_goes_back_to_the_first_family_that_computes_it() -> None:
    assert family_config(SkipstoneConfig(), "silu").model_type == "llama"
    assert family_config(SkipstoneConfig(attention_window=5), "silu").model_type == "mistral"
    assert family_config(SkipstoneConfig(family="granite"), "silu").model_type == "granite"
    assert family_config(SkipstoneConfig(family="granite", qk_norm=True), "silu").model_type == "qwen3"
    assert family_config(SkipstoneConfig(qk_norm_over="each_head"), "silu").model_type == "llama"  # there is no norm


@torch.no_grad()
def test_blocks_that_are_left_keep_their_window_and_their_positions(tmp_path: Path) -> None:
    parity.save_random(parity.CASES["SmolLM3, window, biases"], tmp_path)
    source = load_pretrained(tmp_path)  # the block in the middle has a window and no positions
    for dropped in ([0], [1], [0, 2]):
        smaller = drop_blocks(source, dropped)
        kept = [i for i in range(3) if i not in dropped]
        for i, block in enumerate(smaller.model.layers):
            assert (block.self_attn.window, smaller.model.layers[i].turned_by) == (
                (6, "none") if kept[i] == 1 else (None, "row")
            )


OTHERS = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - FAMILIES.keys() - {"skipstone"})
QUANTISED = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
MISH = {"hidden_act": "mish", "hidden_activation": "mish", "activation_function": "mish"}
ODD = [  # of each family: settings that this decoder does not compute, and what the one line says
    *[pytest.param(case, QUANTISED, "quantised", marks=pytest.mark.slow) for case in ONE_EACH],
    *[pytest.param(case, MISH, "'mish'", marks=pytest.mark.slow) for case in ONE_EACH],
    *[
        (case, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic")
        for case in ("Llama, linear RoPE, biases", "Mistral, window", "Granite, tied, biases", "OLMo 2, tied, biases")
    ],
    *[
        (case, {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "'chunked_attention'")
        for case in ("Qwen2, window", "Qwen3, window", "Gemma 2", "Ministral", "OLMo 3, window, yarn")
    ],
    *[pytest.param(case, {"is_causal": False}, "is_causal=False", marks=pytest.mark.slow) for case in ONE_EACH],
    ("Llama", {"is_causal": False}, "is_causal=False"),
    *[(case, {"head_dim": 16}, "head_dim=16 is not supported (only 12") for case in ("GPT-NeoX", "Cohere 2, biases")],
    pytest.param("StarCoder2, window", {"head_dim": 16}, "head_dim=16", marks=pytest.mark.slow),
    ("Gemma 2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ("Gemma 3, caps, biases, linear RoPE", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
]


def refused(folder: Path, values: dict[str, Any]) -> str:
    """The one line with which `convert` refuses a folder with this config.json, writing nothing."""
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match=r"\S") as caught:
        convert(folder, folder / "out" / "model")
    assert not (folder / "out").exists() or not any((folder / "out").iterdir())
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.slow
def test_every_other_architecture_of_transformers_is_refused_by_name(tmp_path: Path) -> None:
    assert len(OTHERS) > 100
    for kind in OTHERS:
        message = refused(tmp_path, {"model_type": kind})
        assert f"architecture {kind!r}" in message
        assert f"supported: {', '.join(FAMILIES)}" in message


TURNED = [case for case in ONE_EACH if "GPT-2" not in case and "longrope" not in case]
# Quick: the classes of transformers that read the setting, and four that ignore it.
TURNED_QUICK = {
    case for case in TURNED if "partial" in case or case.startswith(("GLM", "GPT-NeoX", "Qwen3", "Gemma 3"))
}
TURNED_QUICK |= {"Llama, linear RoPE, biases", "StarCoder2, window"}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in TURNED_QUICK else pytest.mark.slow) for case in TURNED]
)
@torch.no_grad()
def test_part_of_a_head_turns_where_transformers_turns_a_part(case: str, tmp_path: Path) -> None:
    """Most of its classes ignore `partial_rotary_factor`."""
    config = copy.deepcopy(parity.CASES[case])
    for rope in (config.rope_parameters, *config.rope_parameters.values()):
        if isinstance(rope, dict) and "rope_theta" in rope:
            rope.clear()
            rope.update(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)
    parity.save_random(config, tmp_path)
    assert parity.logits_error(tmp_path, ids(), torch.float32) < FP32


@pytest.mark.parametrize("case", ["Llama, yarn", "OLMo 3, window, yarn", "Gemma 3"])
@torch.no_grad()
def test_yarn_is_truncated_where_transformers_truncates_it(case: str, tmp_path: Path) -> None:
    """Its code looks for `truncate` beside the RoPE parameters of each type of attention, and not in them."""
    config = copy.deepcopy(parity.CASES[case])
    yarn = {**parity.YARN, "truncate": False}
    config.rope_parameters = yarn if "Llama" in case else {kind: dict(yarn) for kind in config.rope_parameters}
    parity.save_random(config, tmp_path)
    assert parity.measure(tmp_path, length=20, tokens=4).fp32 < 1e-5


def test_a_rope_that_nothing_reads_does_not_stretch_learned_positions(tmp_path: Path) -> None:
    config = copy.deepcopy(parity.CASES["GPT-2"])
    config.rope_parameters = {**parity.YARN, "factor": 8.0}
    parity.save_random(config, tmp_path)
    assert parity.logits_error(tmp_path, ids(), torch.float32) < FP32


@pytest.mark.parametrize(("case", "changes", "said"), ODD)
def test_a_setting_that_is_not_computed_is_refused_by_name(
    case: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    assert said in refused(tmp_path, {**parity.CASES[case].to_dict(), **changes})


SLIDES = (["sliding_attention"] * 3, parity.TYPES)
REFUSED = [(case, types) for case in ("StarCoder2, window", "Phi-3, window, partial RoPE")
           for types in (parity.TYPES, ["full_attention"] * 3)]  # fmt: skip


WITH_TYPES = ("SmolLM3", "StarCoder2, window", "Phi-3, window, partial RoPE", "Qwen3, window", "Gemma 2")


@pytest.fixture(scope="module")
def with_types(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, tuple[str, dict[str, Any]]]:
    """Folders of checkpoints of families that read `layer_types`, each with its case and the values of its config."""
    folders = {}
    for case in WITH_TYPES:
        folder = tmp_path_factory.mktemp("types") / case
        parity.save_random(parity.CASES[case], folder)
        folders[folder] = case, json.loads((folder / "config.json").read_text())
    return folders


@pytest.mark.parametrize(
    ("types", "use"),
    [
        pytest.param(types, use, id=f"{types}-{use}", marks=() if use == (i % 2 == 0) else pytest.mark.slow)
        for i, types in enumerate((["sliding_attention"] * 3, parity.TYPES, ["full_attention"] * 3, None))
        for use in (True, False)
    ],
)
@torch.no_grad()
def test_types_of_attention_beside_a_window(types: list[str] | None, use: bool, with_types: Any) -> None:
    """Each family reads `layer_types` and `use_sliding_window` as transformers' class does, or refuses them."""
    ids_BT = torch.randint(2, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    for folder, (case, values) in with_types.items():
        changed = values | {"sliding_window": 6, "use_sliding_window": use, "layer_types": types}
        (folder / "config.json").write_text(json.dumps(changed))
        refused = (case, types) in REFUSED or (case == "Qwen3, window" and not use and types in SLIDES)
        if refused:
            with pytest.raises(ValueError, match="layer_types has"):
                load_pretrained(folder)
        else:
            found = load_pretrained(folder)(ids_BT).logits
            assert parity.relative_error(found, parity.theirs(folder)(ids_BT).logits) < 1e-5, case
