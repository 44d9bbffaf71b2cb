"""A routed decoder in the hands of other tools: generation's options, PEFT, weights on disk, a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import skipstone
from in_place.test_route import MOD, routed


@pytest.mark.slow
@torch.no_grad()
def test_what_generate_and_forward_offer(ids: Tensor, mask: Tensor) -> None:
    """Caches of fixed size, drafts from the prompt, embeddings, masks of pairs, packed rows, hidden states."""
    model, _ = routed("mixtral", [MOD])
    wanted: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    text = model.generate(ids, **wanted)
    fixed = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(ids, **fixed, **wanted), text)
    padded = model.generate(ids, attention_mask=mask, **wanted)
    assert torch.equal(model.generate(ids, attention_mask=mask, **fixed, **wanted), padded)
    assert torch.equal(model.generate(ids[:1], prompt_lookup_num_tokens=2, **wanted), text[:1])
    logits = model(ids).logits
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, logits)
    pairs = torch.ones(10, 10, dtype=torch.bool).tril().expand(2, 1, 10, 10)
    torch.testing.assert_close(model(ids, attention_mask=pairs).logits, logits)
    packed = model(ids[:1], position_ids=torch.arange(10)[None] % 5, use_cache=False).logits
    torch.testing.assert_close(packed[:, 5:], model(ids[:1, 5:], use_cache=False).logits)
    assert [x.shape for x in model(ids, output_hidden_states=True).hidden_states] == [(2, 10, 32)] * 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_peft_and_weights_on_disk(ids: Tensor, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    wanted: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    model, handle = routed("llama", [MOD])
    text = model.generate(ids, **wanted)
    model.save_pretrained(tmp_path)
    handle.save(tmp_path)
    where = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "off"}
    elsewhere = AutoModelForCausalLM.from_pretrained(tmp_path, **where).eval()
    skipstone.route(elsewhere, tmp_path)
    assert torch.equal(elsewhere.generate(ids, **wanted), text)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", modules_to_save=["router"])
    adapted = get_peft_model(model, lora)
    assert torch.equal(adapted.generate(ids, **wanted), text)
    adapted.train()(ids, labels=ids).loss.backward()
    routers = [p for n, p in adapted.named_parameters() if "router.modules_to_save" in n]
    assert len(routers) == 3
    assert all(p.grad is not None for p in routers)


@pytest.mark.slow
def test_a_trainer_moves_thresholds(tmp_path: Path) -> None:
    from transformers import TrainingArguments, default_data_collator

    from skipstone.train import RoutingTrainer

    model, handle = routed("mixtral", [{"name": "mixture_of_depths", "layers": ":", "capacity": 0.5}])
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 60, (8, 12)).tolist()]
    args = TrainingArguments(
        str(tmp_path), max_steps=4, use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=2,
        save_strategy="no", gradient_accumulation_steps=2,
    )  # fmt: skip
    RoutingTrainer(model=model, args=args, train_dataset=rows, data_collator=default_data_collator).train()
    moved = [(m.decision.steps.item(), m.decision.threshold.item() != 0, m.capacity) for m in handle.routing_modules()]
    assert moved == [(4, True, 0.5)] * 3
