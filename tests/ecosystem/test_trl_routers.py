"""TRL's trainers with `RoutingMixin`: routers and thresholds learn, with one forward pass a step."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import skipstone
from skipstone.data.tokenizers import byte_tokenizer
from skipstone.model.decoder import LOSSES_LEFT_OUT
from skipstone.train import RoutingMixin

trl = pytest.importorskip("trl")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

GUIDED = {"name": "mixture_of_depths", "layers": ":", "capacity": 0.5}
WEIGHING = {**GUIDED, "weight": "sigmoid"}
PREDICTOR = {**WEIGHING, "decision": "predictor"}
TEXT = ["Once upon a time there was a dog.", "The wood was dark.", "They ran.", "No one knew why."]
COMMON: dict[str, Any] = {
    "max_steps": 2, "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
    "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3,
}  # fmt: skip
PAIRS = [{"prompt": text[:8], "chosen": text[8:], "rejected": " no no"} for text in TEXT]


def model(folder: Path, entry: dict[str, Any], **options: Any) -> Any:
    """Saved and loaded: TRL looks into the folder that a model came from."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
    config = skipstone.SkipstoneConfig(
        vocab_size=len(tokenizer), mechanisms=[entry], pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, **sizes, **options,
    )  # fmt: skip
    return loaded(skipstone.SkipstoneForCausalLM(config), folder)


def loaded(net: Any, folder: Path) -> Any:
    net.save_pretrained(folder / "net")
    byte_tokenizer().save_pretrained(folder / "net")
    return type(net).from_pretrained(folder / "net")


class Watching:
    """Router gradients of every step, and how often the decoder ran with gradients."""

    def __init__(self, net: Any) -> None:
        self.passes = 0
        self.gradients: list[float] = []
        decoder = net.decoder if hasattr(net, "decoder") else net.get_decoder()
        decoder.register_forward_hook(self._count)
        for name, parameter in net.named_parameters():
            if name.endswith("router.weight"):
                parameter.register_hook(lambda grad: self.gradients.append(float(grad.abs().max())))

    def _count(self, *_: Any) -> None:
        self.passes += torch.is_grad_enabled()


def sft(net: Any, folder: Path, mixed: bool, **options: Any) -> Any:
    kind = type("Mine", (RoutingMixin, trl.SFTTrainer), {}) if mixed else trl.SFTTrainer
    from datasets import Dataset

    args = trl.SFTConfig(str(folder), max_length=32, **{**COMMON, **options})
    rows = Dataset.from_list([{"text": text} for text in TEXT])
    return kind(model=net, args=args, train_dataset=rows, processing_class=byte_tokenizer())


@pytest.mark.parametrize("entry", [GUIDED, PREDICTOR], ids=["guided", "predictor"])
def test_supervised_fine_tuning_trains_routers_in_one_pass_a_step(entry: dict[str, Any], tmp_path: Path) -> None:
    net = model(tmp_path, entry)
    trainer, watching = sft(net, tmp_path, mixed=True), Watching(net)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    net.train()
    loss = trainer.compute_loss(net, dict(batch))
    assert watching.passes == 1
    torch.testing.assert_close(loss, net(**batch).loss)
    items = torch.tensor(3 * int((batch["labels"][:, 1:] != -100).sum()))  # of a step of three such batches
    torch.testing.assert_close(trainer.compute_loss(net, dict(batch), num_items_in_batch=items), loss / 3)
    watching.passes = 0
    trainer.train()
    assert watching.passes == COMMON["max_steps"]
    assert min(watching.gradients) > 0
    assert entry is PREDICTOR or all(m.decision.steps == 2 and m.decision.threshold != 0 for m in net.routing_modules())


def test_label_smoothing_keeps_the_routers_losses(tmp_path: Path) -> None:
    net = model(tmp_path, PREDICTOR)
    trainer = sft(net, tmp_path, mixed=True, label_smoothing_factor=1e-9)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    torch.testing.assert_close(trainer.compute_loss(net.train(), dict(batch)), net(**batch).loss)


def test_without_the_mixin_a_line_says_that_routers_rest(tmp_path: Path) -> None:
    net = model(tmp_path, GUIDED)
    trainer, watching = sft(net, tmp_path, mixed=False), Watching(net)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert any(str(line.message) == LOSSES_LEFT_OUT for line in caught)
    assert not any(watching.gradients)


def dpo(net: Any, folder: Path) -> Any:
    from datasets import Dataset

    kind = type("Mine", (RoutingMixin, trl.DPOTrainer), {})
    args = trl.DPOConfig(str(folder), max_length=32, **COMMON)
    return kind(model=net, args=args, train_dataset=Dataset.from_list(PAIRS), processing_class=byte_tokenizer())


def grpo(net: Any, folder: Path) -> Any:
    from datasets import Dataset

    kind = type("Mine", (RoutingMixin, trl.GRPOTrainer), {})
    args = trl.GRPOConfig(str(folder), num_generations=2, max_completion_length=6, **COMMON)
    rows = Dataset.from_list([{"prompt": row["prompt"]} for row in PAIRS])
    return kind(
        model=net, args=args, train_dataset=rows, processing_class=byte_tokenizer(),
        reward_funcs=lambda completions, **_: [float(text.count("e") + i) for i, text in enumerate(completions)],
    )  # fmt: skip


@pytest.mark.parametrize("make", [dpo, grpo])
def test_preferences_and_rewards_train_routers_that_weigh(make: Any, tmp_path: Path) -> None:
    net = model(tmp_path, WEIGHING, training_routing="causal")
    trainer, watching = make(net, tmp_path), Watching(net)
    trainer.train()
    assert watching.passes == COMMON["max_steps"]
    assert max(watching.gradients) > 0
    assert all(m.decision.steps == 2 and m.decision.threshold != 0 for m in net.routing_modules())


@pytest.mark.parametrize("make", [dpo, grpo])
def test_preferences_and_rewards_say_which_routers_rest(make: Any, tmp_path: Path) -> None:
    net = model(tmp_path, GUIDED, training_routing="causal")
    trainer = make(net, tmp_path)
    with pytest.warns(UserWarning, match="give no auxiliary losses to block 0 mixture_of_depths and 1 more"):
        trainer.train()


def test_a_decoder_routed_in_place_learns_under_trl(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)
    net = loaded(LlamaForCausalLM(config), tmp_path)
    handle = skipstone.route(net, [PREDICTOR])
    trainer, watching = sft(net, tmp_path, mixed=True), Watching(net)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    whole: Tensor = trainer.compute_loss(net.train(), dict(batch))
    assert watching.passes == 1
    alone = trl.SFTTrainer.compute_loss(trainer, net, dict(batch))
    labels = batch["labels"][:, 1:] != -100
    torch.testing.assert_close(whole, alone + handle.auxiliary_loss(), rtol=1e-3, atol=1e-3, msg=str(labels.sum()))
    trainer.train()
    assert min(watching.gradients) > 0
