"""Parity with transformers: logits and greedy text of both models, for the same weights and tokens.

Each family is tested at a small size with random weights (norms and biases too, so that none is neutral), and one real
checkpoint, stories260K, is tested as it is. `measure(CHECKPOINT)` tests any other checkpoint.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    NemotronConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    Starcoder2Config,
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

PARTIAL: PlainDict = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LONGROPE: PlainDict = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
    "factor": 2.0,
    "original_max_position_embeddings": 32,
}
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
PADDED: PlainDict = {**SIZE, "pad_token_id": 0}
ENDED: PlainDict = {**PADDED, "eos_token_id": 96}  # where transformers replaces None by ids of its own
UNGROUPED: PlainDict = {name: value for name, value in SIZE.items() if name != "num_key_value_heads"}
MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.25,
    "logits_scaling": 8.0,
}
GEMMA: PlainDict = {**PADDED, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 20}

CASES: dict[str, PreTrainedConfig] = {
    "Llama": LlamaConfig(**SIZE),
    "Llama, tied": LlamaConfig(**SIZE, tie_word_embeddings=True),
    "Llama 3 RoPE scaling": LlamaConfig(**SIZE, rope_parameters=LLAMA3),
    "Llama, yarn": LlamaConfig(**SIZE, rope_parameters=YARN),
    "Llama, linear RoPE, biases": LlamaConfig(**SIZE, rope_parameters=LINEAR, attention_bias=True, mlp_bias=True),
    "Mistral": MistralConfig(**SIZE, sliding_window=None),
    "Mistral, head size 20": MistralConfig(**SIZE, sliding_window=None, head_dim=20),
    "Mistral, window": MistralConfig(**SIZE, sliding_window=7),
    "Ministral": MinistralConfig(**SIZE, head_dim=12, sliding_window=5, layer_types=TYPES),
    "Qwen2": Qwen2Config(**SIZE),
    "Qwen2, tied": Qwen2Config(**SIZE, tie_word_embeddings=True),
    "Qwen2, window": Qwen2Config(**SIZE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "Qwen3": Qwen3Config(**SIZE, head_dim=16),
    "Qwen3, tied, biases": Qwen3Config(**SIZE, head_dim=16, tie_word_embeddings=True, attention_bias=True),
    "Qwen3, window": Qwen3Config(**SIZE, head_dim=16, use_sliding_window=True, sliding_window=5, layer_types=TYPES),
    "SmolLM3": SmolLM3Config(**PADDED, no_rope_layers=[1, 0, 1]),
    "SmolLM3, window, biases": SmolLM3Config(
        **PADDED,
        no_rope_layers=[1, 0, 1],
        use_sliding_window=True,
        sliding_window=6,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
    ),
    "Granite": GraniteConfig(**SIZE, **MULTIPLIERS),
    "Granite, tied, biases": GraniteConfig(
        **SIZE, **MULTIPLIERS, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "OLMo 2": Olmo2Config(**PADDED),
    "OLMo 2, tied, biases": Olmo2Config(**PADDED, tie_word_embeddings=True, attention_bias=True),
    "OLMo 3, window, yarn": Olmo3Config(
        **PADDED, sliding_window=6, layer_types=TYPES, rope_scaling={**YARN, "attention_factor": 1.2}
    ),
    "OLMo 3, tied, biases": Olmo3Config(
        **PADDED,
        sliding_window=6,
        layer_types=TYPES[1:] + TYPES[:1],
        tie_word_embeddings=True,
        attention_bias=True,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 3e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "Gemma 2": Gemma2Config(**GEMMA),
    "Gemma 2, no caps": Gemma2Config(**GEMMA, attn_logit_softcapping=None, final_logit_softcapping=None),
    "Gemma 3": Gemma3TextConfig(**GEMMA, layer_types=TYPES),
    "Gemma 3, caps, biases, linear RoPE": Gemma3TextConfig(
        **GEMMA,
        layer_types=TYPES,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=4.0,
        attention_bias=True,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    "Phi-3, window, partial RoPE": Phi3Config(**PADDED, sliding_window=6, rope_parameters=PARTIAL),
    "Phi-3, longrope": Phi3Config(**PADDED, rope_parameters=LONGROPE),
    "GLM": GlmConfig(**ENDED, head_dim=16, tie_word_embeddings=True),
    "GLM-4": Glm4Config(**ENDED, head_dim=16),
    "GLM-4, tied, no biases, yarn": Glm4Config(
        **ENDED,
        head_dim=12,
        rope_parameters={**YARN, "partial_rotary_factor": 1.0},
        attention_bias=False,
        tie_word_embeddings=True,
    ),
    "Cohere": CohereConfig(**PADDED),
    "Cohere, untied, QK-norm, biases, linear RoPE": CohereConfig(
        **PADDED,
        tie_word_embeddings=False,
        use_qk_norm=True,
        attention_bias=True,
        logit_scale=0.3,
        rope_parameters=LINEAR,
    ),
    "Cohere 2, biases": Cohere2Config(**PADDED, sliding_window=6, layer_types=TYPES, attention_bias=True),
    "Nemotron, partial RoPE": NemotronConfig(**SIZE, head_dim=20),
    "Nemotron, tied, biases, linear RoPE": NemotronConfig(
        **SIZE,
        rope_parameters={**LINEAR, "partial_rotary_factor": 1.0},
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "StarCoder2, window": Starcoder2Config(**SIZE, sliding_window=9),
    "StarCoder2, no biases, untied": Starcoder2Config(**SIZE, use_bias=False, tie_word_embeddings=False),
    "GPT-NeoX": GPTNeoXConfig(**UNGROUPED, rope_parameters=PARTIAL),
    "GPT-NeoX, sequential, no biases": GPTNeoXConfig(
        **UNGROUPED,
        use_parallel_residual=False,
        attention_bias=False,
        rope_parameters={**LINEAR, "partial_rotary_factor": 1.0},
    ),
    "GPT-2": GPT2Config(**GPT2_SIZE),
    "GPT-2, untied, n_inner": GPT2Config(**GPT2_SIZE, tie_word_embeddings=False, n_inner=72),
}


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The agreement of one checkpoint's outputs with transformers'.

    fp32, bf16: largest difference of the logits, with both models in this dtype, divided by the largest of
    transformers' logits in magnitude. generation: whether both continue prompts with the same greedy text.
    """

    fp32: float
    bf16: float
    generation: bool


def save_random(config: PreTrainedConfig, folder: Path) -> None:
    """Save a checkpoint of random tensors to `folder`, so that an omitted norm or bias would change the output.

    config: the configuration of one of transformers' causal language models; it is not changed.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # which takes the dtype of the model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name or ".ln_" in name else 0.0, 0.2)
    model.save_pretrained(folder)


def theirs(source: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a checkpoint with transformers' `AutoModelForCausalLM`, in evaluation mode, as the reference for our model.

    source: a folder, a Hub name or a .gguf file. dtype: the dtype of its weights.
    """
    path, gguf = Path(source), {}
    if path.suffix == ".gguf":
        source, gguf = path.parent, {"gguf_file": path.name}
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **gguf).eval()


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Return max |ours - reference| / max |reference| of two tensors of the same shape."""
    return ((ours - reference).abs().max() / reference.abs().max()).item()


@torch.no_grad()
def logits_error(source: str | Path, ids_BT: Tensor, dtype: torch.dtype, **call: Tensor) -> float:
    """Return the largest difference between our logits and transformers', divided by the largest of theirs.

    Both are the largest magnitude over all tokens that are not padding (`attention_mask`) and the whole vocabulary.
    source: folder, Hub name or .gguf file of the checkpoint. ids_BT: token ids, int64 [B, T] (B rows of T tokens).
    dtype: the dtype in which both models compute. call: further arguments of both models' forward, such as
    `attention_mask`, int64 [B, T].
    """
    ours, reference = load_pretrained(source, dtype), theirs(source, dtype)
    assert ours.dtype == reference.dtype == dtype
    real_BT = real_tokens({"input_ids": ids_BT, **call})
    a, b = (model(ids_BT, **call).logits[real_BT].float() for model in (ours, reference))
    return relative_error(a, b)


def greedy(model: SkipstoneForCausalLM, ids_BT: Tensor, tokens: int, **call: Tensor) -> list[list[int]]:
    """Return the ids of the prompts, each followed by at most `tokens` greedy tokens, one list per row.

    model: the model that generates. ids_BT: token ids of the prompts, int64 [B, T] (B rows of T tokens). call: further
    arguments of `generate`; without an `attention_mask`, no token of the prompts is padding. A row that ends early is
    filled up with 0.
    """
    call.setdefault("attention_mask", torch.ones_like(ids_BT))
    return model.generate(ids_BT, do_sample=False, max_new_tokens=tokens, pad_token_id=0, **call).tolist()


def measure(source: str | Path, *, length: int = 40, tokens: int = 20) -> Parity:
    """Measure the agreement of one checkpoint with transformers on two rows of random tokens.

    source: folder, Hub name or .gguf file of the checkpoint. length: tokens of a row; the first half is the prompt.
    tokens: number of generated tokens. The result is a `Parity`: `fp32` and `bf16`, largest difference of the logits
    divided by the largest of transformers' logits in magnitude, and `generation`, whether greedy texts are equal.
    """
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
    """Return the settings of every comparison by its name: many small configurations, and one real checkpoint.

    Each is a dict that `measured` takes. The configurations, `CASES`, are of all supported families. The checkpoint is
    stories260K. scale: not used.
    """
    families: dict[str, RecipeDict] = {name: {"config": config.to_diff_dict()} for name, config in CASES.items()}
    return families | {"stories260K (real)": {"source": "stories260K"}}


def measured(recipe: RecipeDict) -> Figures:
    """Measure the agreement of one checkpoint with transformers.

    recipe: an entry of `arms`, with "source" (name of a checkpoint in SKIPSTONE_DATA) or "config" (fields of a
    configuration of transformers, for a checkpoint with random weights). Keys of the result: `fp32` and `bf16`, the
    largest difference of the logits divided by the largest of transformers' logits in magnitude, and `generation`,
    whether greedy texts are equal.
    """
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
