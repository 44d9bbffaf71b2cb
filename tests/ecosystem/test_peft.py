"""PEFT: adapters on the projections, routers beside them, saved, loaded and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from ecosystem.tool import TOOLS_OWN_WARNINGS, load, logits
from pages import Page
from skipstone import SkipstoneConfig, SkipstoneForCausalLM

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(TOOLS_OWN_WARNINGS)

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_page(page: Page, names: dict[str, Any]) -> None:
    exec(page.block("LoraConfig"), names)
    torch.testing.assert_close(logits(load("my-merged")), logits(load("my-model")))  # adapters start at nothing


def test_lora_reaches_projections_and_no_router(work: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", modules_to_save=["router"])
    adapted = get_peft_model(load("my-model"), config)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained if ".lora_" in name} == PROJECTIONS
    assert all(".router." in name for name in trained if ".lora_" not in name)
    ids = torch.arange(24)[None]
    adapted.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    tuned = logits(adapted)
    assert not torch.allclose(tuned, logits(load("my-model")))
    adapted.save_pretrained("adapter")
    again = PeftModel.from_pretrained(load("my-model"), "adapter")
    torch.testing.assert_close(logits(again), tuned)
    again.merge_and_unload().save_pretrained("merged")
    torch.testing.assert_close(logits(load("merged")), tuned, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "groups",
    [{"group_size": 8, "chunk_size": 4}, {"decision": "magnitude", "group_size": 1, "down_capacity": 0.5}],
    ids=str,
)
def test_adapters_of_neurons_that_are_left_out(groups: dict[str, Any]) -> None:
    """Where parts of the weights were taken, adapters beside them would be left out."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = SkipstoneForCausalLM(SkipstoneConfig(**small, intermediate_size=48, neuron_groups=groups)).eval()
    assert model.cost(tokens=1).forward.mlp < model.cost(tokens=1).dense.forward.mlp  # type: ignore[union-attr]
    config = LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    ids, cache = torch.arange(10)[None], DynamicCache(config=model.config)
    with torch.no_grad():
        masked = adapted(ids, executor="masked").logits
        torch.testing.assert_close(adapted(ids).logits, masked)
        steps = [adapted(ids[:, t : t + 1], past_key_values=cache).logits for t in range(10)]
        torch.testing.assert_close(torch.cat(steps, 1), masked)
        torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, masked, rtol=1e-4, atol=1e-5)
