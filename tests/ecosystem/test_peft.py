"""PEFT: adapters on the projections, routers beside them, saved, loaded and merged."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import skipstone
from ecosystem.tool import TOOLS_OWN_WARNINGS, load, logits, stirred
from pages import Page
from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.generate import generate
from skipstone.measure.depth_map import depth_maps
from skipstone.measure.flops import flop_check
from skipstone.measure.losses import measure_loss
from skipstone.measure.passes import PASSES, Pass
from skipstone.measure.speed import prefill
from skipstone.measure.trace import trace_tokens

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


@pytest.mark.parametrize("moves", [True, False], ids=["moves", "keeps"])
def test_buffers_that_no_adapter_holds_are_named_when_they_move(moves: bool, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import TrainingArguments, default_data_collator

    from skipstone.train import RoutingTrainer

    decision = "ema_threshold" if moves else "threshold"
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    mechanisms = [{"name": "mixture_of_depths", "capacity": 0.5, "decision": decision}]
    model = SkipstoneForCausalLM(SkipstoneConfig(**sizes, mechanisms=mechanisms, initializer_range=0.2))
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["router"])
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 40, (8, 9))]
    arguments = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = RoutingTrainer(
        model=get_peft_model(model, lora), args=arguments, train_dataset=rows, data_collator=default_data_collator
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(w.message) for w in caught if "no adapter holds" in str(w.message)]
    assert len(told) == moves
    assert not moves or "block 1 mixture_of_depths decision.threshold" in told[0]


LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", "modules_to_save": ["router"]}


def gated() -> SkipstoneForCausalLM:
    mechanisms = [{"name": "mixture_of_depths", "layers": ":", "capacity": 0.5, "decision": "threshold"}]
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return stirred(SkipstoneConfig(**sizes, mechanisms=mechanisms)).eval()


@pytest.mark.slow
def test_an_adapted_model_is_measured_as_its_base() -> None:
    """Budgets, generation, losses and traces of a model that PEFT has wrapped, its adapter being neutral."""
    from peft import LoraConfig, get_peft_model

    base = gated()
    ids = torch.randint(3, 290, (4, 24))

    def measured(model: Any) -> list[Any]:
        table = skipstone.calibrate(model, ids)
        middle = sum(table.range) / 2
        with table.at(model, middle):
            text = generate(model, ids[:2], max_new_tokens=4)
        loss = measure_loss(model, Pass(name="causal", routing="causal"), [{"input_ids": ids, "labels": ids}])
        depths = [part.loss_BT.nansum().item() for part in depth_maps(model, ids[0].tolist(), 12)]
        return [table.trained, table.handles, text.tolist(), loss.nats, depths]

    expected = measured(base)
    assert measured(get_peft_model(base, LoraConfig(**LORA)).eval()) == expected


@pytest.mark.parametrize("exact", [True, False])
def test_the_cost_of_adapters_is_what_executes_or_is_said_to_lack(exact: bool) -> None:
    from peft import LoraConfig, get_peft_model

    ids = torch.randint(3, 290, (2, 12))
    model = get_peft_model(gated(), LoraConfig(**LORA, use_dora=not exact)).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = flop_check(model, PASSES["executed"], [{"input_ids": ids}])  # type: ignore[arg-type]
    told = [str(w.message) for w in caught if "the cost leaves out" in str(w.message)]
    assert (found.counted == found.predicted) == exact == (not told)
    assert exact or "DoRA" in told[0]
    merged = model.merge_and_unload()
    assert merged.cost(12).forward.total == gated().cost(12).forward.total


def test_prompt_learning_is_one_line_where_ids_are_measured() -> None:
    """Its virtual tokens stand before every text, in each step of a decode loop again."""
    from peft import PromptTuningConfig, get_peft_model

    model: Any = get_peft_model(gated(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    assert model(input_ids=torch.arange(9)[None]).logits.shape[1] == 12
    _refused(model, r"prompt learning \(PROMPT_TUNING\)")


def test_decoders_of_transformers_are_one_line_where_ours_is_measured() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    theirs: Any = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).eval()
    _refused(theirs, "expected a Skipstone model, got LlamaForCausalLM; .*load_pretrained converts")
    skipstone.route(theirs, [{"name": "mixture_of_depths", "layers": [1], "decision": "threshold", "kv": "full"}])
    _refused(theirs, "got LlamaForCausalLM that skipstone.route has routed in place")


def _refused(model: Any, why: str) -> None:
    ids = torch.arange(3, 12)[None]
    batches = [{"input_ids": ids, "labels": ids}]
    for measure in (
        lambda: skipstone.calibrate(model, ids),
        lambda: generate(model, ids, max_new_tokens=2),
        lambda: measure_loss(model, PASSES["causal"], batches),
        lambda: flop_check(model, PASSES["executed"], batches),
        lambda: list(depth_maps(model, [3, 4, 5], 3)),
        lambda: trace_tokens(model, {"input_ids": ids}, []),
        lambda: prefill(model, ids),
    ):
        with pytest.raises(ValueError, match=why) as told:
            measure()
        assert "\n" not in str(told.value)


@pytest.mark.slow
def test_a_budget_table_from_before_the_adapter_says_so(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    ids = torch.randint(3, 290, (4, 12))
    base = gated()
    base.save_pretrained(tmp_path)
    skipstone.calibrate(base, ids).save(tmp_path)
    model: Any = get_peft_model(load(tmp_path), LoraConfig(**LORA)).eval()
    with pytest.warns(UserWarning, match=r"budget.json of .* was measured without the model's adapters"):
        generate(model, ids[:1], max_new_tokens=2, budget=0.8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = skipstone.calibrate(model, ids)
        generate(model, ids[:1], max_new_tokens=2, budget=sum(table.range) / 2, budget_table=table)
