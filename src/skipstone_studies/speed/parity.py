"""Parity with transformers: logits and greedy text of both models, for the same weights and tokens.

Each family is tested at a small size with random weights (norms and biases too, so that none is neutral), and with the
real checkpoints in SKIPSTONE_DATA. `measure(CHECKPOINT)` tests any other checkpoint.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from skipstone.core.strict import PlainDict
from skipstone.measure.passes import real_tokens
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.loading import quiet
from skipstone.model.pretrained import load_pretrained
from skipstone_studies.adapting import source_path
from skipstone_studies.study import Column, Figures, RecipeDict, Study

SIZE: PlainDict = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GPT2_SIZE: PlainDict = {
    "vocab_size": 97,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

CASES: dict[str, PreTrainedConfig] = {
    "Llama": LlamaConfig(**SIZE),
    "Llama, tied": LlamaConfig(**SIZE, tie_word_embeddings=True),
    "Llama 3 RoPE scaling": LlamaConfig(**SIZE, rope_parameters=LLAMA3),
    "Llama, yarn": LlamaConfig(**SIZE, rope_parameters=YARN),
    "Llama, linear RoPE, biases": LlamaConfig(**SIZE, rope_parameters=LINEAR, attention_bias=True, mlp_bias=True),
    "Mistral": MistralConfig(**SIZE, sliding_window=None),
    "Mistral, head size 20": MistralConfig(**SIZE, sliding_window=None, head_dim=20),
    "Qwen2": Qwen2Config(**SIZE),
    "Qwen2, tied": Qwen2Config(**SIZE, tie_word_embeddings=True),
    "Qwen3": Qwen3Config(**SIZE, head_dim=16),
    "Qwen3, tied, biases": Qwen3Config(**SIZE, head_dim=16, tie_word_embeddings=True, attention_bias=True),
    "GPT-2": GPT2Config(**GPT2_SIZE),
    "GPT-2, untied, n_inner": GPT2Config(**GPT2_SIZE, tie_word_embeddings=False, n_inner=72),
}


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The parity of one checkpoint.

    fp32, bf16: relative error of the logits. generation: whether both generate the same greedy text.
    """

    fp32: float
    bf16: float
    generation: bool


def save_random(config: PreTrainedConfig, folder: Path) -> None:
    """Save a checkpoint with random tensors, so that an omitted norm or bias changes the output."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name or ".ln_" in name else 0.0, 0.2)
    model.save_pretrained(folder)


def theirs(source: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load the checkpoint with transformers."""
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Return max |ours - reference| / max |reference|."""
    return ((ours - reference).abs().max() / reference.abs().max()).item()


@torch.no_grad()
def logits_error(source: str | Path, ids_BT: Tensor, dtype: torch.dtype, **call: Tensor) -> float:
    """Return the relative error of the logits over tokens that are not padding."""
    ours, reference = load_pretrained(source, dtype), theirs(source, dtype)
    assert ours.dtype == reference.dtype == dtype
    real_BT = real_tokens({"input_ids": ids_BT, **call})
    a, b = (model(ids_BT, **call).logits[real_BT].float() for model in (ours, reference))
    return relative_error(a, b)


def greedy(model: SkipstoneForCausalLM, ids_BT: Tensor, tokens: int, **call: Tensor) -> list[list[int]]:
    """Return the ids of prompt and greedy continuation."""
    call.setdefault("attention_mask", torch.ones_like(ids_BT))
    return model.generate(ids_BT, do_sample=False, max_new_tokens=tokens, pad_token_id=0, **call).tolist()


def measure(source: str | Path, *, length: int = 40, tokens: int = 20) -> Parity:
    """Measure the parity of one checkpoint on two rows of random tokens."""
    vocabulary = AutoConfig.from_pretrained(source).vocab_size
    ids_BT = torch.randint(2, vocabulary, (2, length), generator=torch.Generator().manual_seed(1))
    prompt = ids_BT[:, : length // 2]
    return Parity(
        fp32=logits_error(source, ids_BT, torch.float32),
        bf16=logits_error(source, ids_BT, torch.bfloat16),
        generation=greedy(load_pretrained(source, torch.float32), prompt, tokens)
        == greedy(theirs(source), prompt, tokens),
    )


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the families' configurations, and a real checkpoint."""
    families: dict[str, RecipeDict] = {name: {"config": config.to_diff_dict()} for name, config in CASES.items()}
    return families | {"stories260K (real)": {"source": "stories260K"}}


def measured(recipe: RecipeDict) -> Figures:
    """Return the parity of an arm as figures."""
    with quiet(), tempfile.TemporaryDirectory() as folder:
        if "source" in recipe:
            return vars(measure(source_path(recipe["source"]), length=128, tokens=100))
        values = dict(recipe["config"])
        save_random(AutoConfig.for_model(values.pop("model_type"), **values), Path(folder))
        return vars(measure(folder))


PARITY = Study(
    name="parity",
    purpose="Parity with transformers: logits and greedy text of both models for the same weights and tokens",
    about=(
        "Small models of each family with random weights (also in norms and biases, so that none is neutral), and one "
        "real checkpoint. *Max relative error* is the largest difference between two logits divided by the largest "
        "logit. *Greedy text equal* is the share of prompts that both models continue with the same tokens."
    ),
    arms=arms,
    seeds={"laptop": (0,)},
    clock=measured,
    columns=(
        Column(key="fp32", title="max relative error, fp32", format=".1e"),
        Column(key="bf16", title="max relative error, bf16", format=".1e"),
        Column(key="generation", title="greedy text equal", format=".0%"),
    ),
)
