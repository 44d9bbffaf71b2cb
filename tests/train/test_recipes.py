"""Every shipped recipe, with reduced sizes, trains, and its model can generate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from transformers import TrainingArguments

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.train import RoutingTrainer
from train.test_config import RECIPES
from train.tool import quick

SMALL = {"vocab_size": 31, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
MODELS = {path.stem: values for path in RECIPES if "adapt" not in (values := yaml.safe_load(path.read_text("utf-8")))}
ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(8 * 24).view(8, 24) ** 2 % 31]


def test_a_bare_on_that_yaml_takes_for_true_is_understood() -> None:
    entry = yaml.safe_load("{name: mixture_of_depths, on: mlp}")
    assert True in entry
    config = SkipstoneConfig.from_plain({**SMALL, "mechanisms": [entry]})
    assert config.mechanisms == [{"name": "mixture_of_depths", "on": "mlp"}]


@torch.no_grad()
def token_loss(model: SkipstoneForCausalLM) -> float:
    rows = torch.stack([row["labels"] for row in ROWS]).to(model.device)
    return model.eval()(rows, labels=rows, routing="oracle").token_loss.item()


UNSET = [name for name, recipe in MODELS.items() if "preset" not in recipe["model"]]


@pytest.mark.parametrize("name", quick(UNSET, "all", "mode-integrated", "neuron-groups"))
def test_two_steps_and_a_few_tokens(name: str, tmp_path: Path) -> None:
    values = {**MODELS[name]["model"], **SMALL}
    if "neuron_groups" in values:
        values["neuron_groups"] = {**values["neuron_groups"], "group_size": 16}
    model = SkipstoneForCausalLM(SkipstoneConfig.from_plain(values))
    before, loss = {name: value.clone() for name, value in model.state_dict().items()}, token_loss(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False, learning_rate=0.01,
    )  # fmt: skip
    RoutingTrainer(model=model, args=arguments, train_dataset=ROWS).train()
    assert token_loss(model) < loss
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert {name for name in same if not name.endswith("dynamic_chunking.threshold")} == set()  # only budgets move it
    tokens = model.eval().generate(ROWS[0]["input_ids"][None, :5], max_new_tokens=3, do_sample=False)
    assert tokens.shape == (1, 8)
