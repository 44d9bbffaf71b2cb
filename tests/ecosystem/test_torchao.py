"""torchao through transformers: weights of linear layers in int8 or int4, routers in full precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ecosystem.tool import TOOLS_OWN_WARNINGS, load, logits
from pages import Page

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
