"""torchao through transformers: weights of linear layers in int8 or int4, routers in full precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ecosystem.tool import TOOLS_OWN_WARNINGS, load, logits
from pages import Page
from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.adapt.prune import prune

pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings(TOOLS_OWN_WARNINGS)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_models_save_load_and_generate(page: Page, names: dict[str, Any], bits: int) -> None:
    code = page.block("TorchAoConfig")
    if bits == 4:
        code = code.replace("Int8WeightOnlyConfig()", "IntxWeightOnlyConfig(torch.int4, PerAxis(0))")
        code = "import torch\nfrom torchao.quantization import IntxWeightOnlyConfig, PerAxis\n" + code
    exec(code, names)
    small, full = names["small"], load("my-model")
    plain = {name for name, p in small.named_parameters() if type(p) is torch.nn.Parameter}
    linear = {f"{name}.weight" for name, m in full.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {name for name, _ in small.named_parameters()} - plain == linear - {"lm_head.weight"}
    again = load("my-model-int8")
    assert torch.equal(logits(again), logits(small))
    off = (logits(small) - logits(full)).abs().mean() / logits(full).abs().mean()
    assert 0 < off < (0.2 if bits == 8 else 2)
    ids = torch.arange(6)[None]
    greedy = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(again.generate(ids, **greedy), small.generate(ids, **greedy))
    assert Path("my-model-int8/model.safetensors").stat().st_size < Path("my-model/model.safetensors").stat().st_size


@pytest.mark.parametrize(
    "more", [{}, {"activation": "polyglu"}, {"mechanisms": [{"name": "mixture_of_depths"}]}], ids=str
)
def test_neuron_groups_of_quantised_weights(tmp_path: Path, more: dict[str, Any]) -> None:
    """Parts of quantised weights are computed with: as the masked pass does, and after they were cut out, too."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    groups = {"group_size": 16, "capacity": 0.5, "chunk_size": 4}
    small = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = SkipstoneForCausalLM(SkipstoneConfig(**small, intermediate_size=96, neuron_groups=groups, **more)).eval()
    used = [torch.tensor([True, False] * 3), torch.tensor([True] * 6)]
    for name, whole in (("whole", model), ("pruned", prune(model, used))):
        whole.save_pretrained(tmp_path / name)
        config = TorchAoConfig(Int8WeightOnlyConfig())
        made = SkipstoneForCausalLM.from_pretrained(tmp_path / name, quantization_config=config).eval()
        made.save_pretrained(tmp_path / f"{name}-int8")
        again = SkipstoneForCausalLM.from_pretrained(tmp_path / f"{name}-int8").eval()
        ids = torch.arange(24).view(2, 12)
        with torch.no_grad():
            gathered, masked = (again(ids, executor=executor).logits for executor in ("gathered", "masked"))
        torch.testing.assert_close(gathered, masked, rtol=1e-4, atol=1e-5)
        assert torch.equal(logits(again), logits(made))
        greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(again.generate(ids, **greedy), made.generate(ids, **greedy))


@torch.no_grad()
def test_neurons_by_magnitude_of_quantised_weights(tmp_path: Path) -> None:
    """Their parts are not taken, for restoring them would take longer: decoding is what the whole pass is."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import DynamicCache, TorchAoConfig

    groups = {"decision": "magnitude", "group_size": 1, "capacity": 0.75, "down_capacity": 0.5}
    small = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    SkipstoneForCausalLM(SkipstoneConfig(**small, intermediate_size=96, neuron_groups=groups)).save_pretrained(tmp_path)
    made = SkipstoneForCausalLM.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    ).eval()
    ids, cache = torch.arange(12)[None], DynamicCache(config=made.config)
    steps = [made(ids[:, t : t + 1], past_key_values=cache).logits for t in range(12)]
    torch.testing.assert_close(torch.cat(steps, 1), made(ids).logits, rtol=1e-4, atol=1e-5)
    assert made.cost(tokens=1, past=8).forward.mlp == made.cost(tokens=1, past=8).dense.forward.mlp  # type: ignore[union-attr]
