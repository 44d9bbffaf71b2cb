"""PolychromaticLM (Medeiros 2026, arXiv 2603.13347): read and write the state dict of its released weights.

All sizes follow from the weights. They include rounded rotary tables, which are checked against the paper's angles,
dropped, and recomputed for writing. tau, the temperature of the mix of activations, is not a tensor: a .pt file stores
it beside the state dict; it is .1 at the end of the paper's training. The converted model keeps tau constant when it is
trained further.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from skipstone.core.strict import PlainDict
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.fields import unlike_llama
from skipstone.model.released.files import Weights
from skipstone.model.released.layout import Options, ReleasedLayout, Translated
from skipstone.model.released.names import check_names, count_blocks, expand, sizes

COSINES, SINES = "rope.cosines", "rope.sins"
EMBEDDING, NORM, HEAD = "embeddings.weight", "rmsnorm.gama", "output_head.weight"
BLOCKS = "model_core"
FIRST = f"{BLOCKS}.0."
BLOCK = {
    "model_core.{i}.rmsnorm_1.gama": "model.layers.{i}.input_layernorm.weight",
    "model_core.{i}.rmsnorm_2.gama": "model.layers.{i}.post_attention_layernorm.weight",
    "model_core.{i}.polyglu.alpha": "model.layers.{i}.mlp.activation.preference_bias",
    "model_core.{i}.polyglu.beta": "model.layers.{i}.mlp.activation.scale",
    "model_core.{i}.polyglu.W_gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "model_core.{i}.polyglu.W_up.weight": "model.layers.{i}.mlp.up_proj.weight",
    "model_core.{i}.polyglu.W_down.weight": "model.layers.{i}.mlp.down_proj.weight",
    "model_core.{i}.polyglu.gate_net.0.weight": "model.layers.{i}.mlp.activation.context_weight",
    "model_core.{i}.polyglu.gate_net.0.bias": "model.layers.{i}.mlp.activation.context_bias",
    "model_core.{i}.polyglu.gate_net.2.weight": "model.layers.{i}.mlp.activation.mix_weight",
    "model_core.{i}.polyglu.gate_net.2.bias": "model.layers.{i}.mlp.activation.mix_bias",
    "model_core.{i}.gqa.rmsnorm_q.gama": "model.layers.{i}.self_attn.q_norm.weight",
    "model_core.{i}.gqa.rmsnorm_k.gama": "model.layers.{i}.self_attn.k_norm.weight",
    "model_core.{i}.gqa.W_q.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "model_core.{i}.gqa.W_k.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "model_core.{i}.gqa.W_v.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "model_core.{i}.gqa.W_o.weight": "model.layers.{i}.self_attn.o_proj.weight",
}
OUR_EMBEDDING = "model.embed_tokens.weight"
TAU = "model.layers.{i}.mlp.activation.tau"
LAST_TAU = 0.1

ROPE_THETA = 10_000.0
ROPE_TOLERANCE = 1e-2  # bf16 rounds the tables by up to 4e-3; another theta is wrong by 1
# Settings of the released code that do not depend on its sizes.
BASE: PlainDict = {
    "norm": "rmsnorm",
    "norm_eps": 1e-6,
    "positions": "rope",
    "qk_norm": True,
    "attention_bias": False,
    "attention_output_bias": False,
    "mlp": "gated",
    "mlp_bias": False,
    "scaled_output_init": True,
    "tie_word_embeddings": True,
}


def _names(layers: int) -> dict[str, str]:
    """Return our name of every released parameter, in the release's order."""
    return {EMBEDDING: OUR_EMBEDDING, **expand(BLOCK, layers), NORM: "model.norm.weight"}


def rope_tables(context: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin, fp32 [context, head_dim / 2], of the angles position / 10000^(2 i / head_dim)."""
    even = torch.arange(0, head_dim, 2, dtype=torch.float32)
    angle = torch.arange(context, dtype=torch.float32)[:, None] * (1 / ROPE_THETA ** (even / head_dim))
    return angle.cos(), angle.sin()


def _read(weights: Weights, options: Options) -> Translated:
    tensors = weights.tensors
    layers = count_blocks(tensors, BLOCKS)
    ours = _names(layers)
    # safetensors has no shared tensors: its own saver omits the head, others write it twice
    check_names(tensors, {**ours, COSINES: None, SINES: None}, ignored=(HEAD,))
    if HEAD in tensors and not tensors[HEAD].equal(tensors[EMBEDDING]):
        raise ValueError(f"{HEAD} differs from {EMBEDDING}; in this layout they are one matrix")
    values = values_of(tensors, layers)
    _check_rope(tensors, values["max_position_embeddings"], values["head_dim"])
    tau = options.get("tau", weights.beside.get("tau", LAST_TAU))
    if not tau > 0:
        raise ValueError(f"tau must be above 0, got {tau}")
    values["activation"] |= {"tau_start": tau, "tau_end": tau}
    translated = {name: tensors[key] for key, name in ours.items()}
    return Translated(
        values=values, tensors={**translated, **{TAU.format(i=i): torch.tensor(tau) for i in range(layers)}}
    )


def values_of(tensors: Mapping[str, Tensor], layers: int) -> PlainDict:
    """Return the fields of SkipstoneConfig for released weights, from tensor shapes and settings of the released code.

    tensors: the released state dict. layers: its number of blocks. Raises ValueError for shapes that do not fit.
    """
    vocabulary, width = sizes(tensors, EMBEDDING, 2)
    (head_dim,) = sizes(tensors, f"{FIRST}gqa.rmsnorm_q.gama", 1)
    heads = {}
    for letter in "qk":
        rows, _ = sizes(tensors, name := f"{FIRST}gqa.W_{letter}.weight", 2)
        if rows % head_dim:
            raise ValueError(f"{name} has {rows} rows, which is not a multiple of the head size {head_dim}")
        heads[letter] = rows // head_dim
    return {
        **BASE,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": sizes(tensors, f"{FIRST}polyglu.W_gate.weight", 2)[0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads["q"],
        "num_key_value_heads": heads["k"],
        "head_dim": head_dim,
        "max_position_embeddings": sizes(tensors, COSINES, 2)[0],
        "activation": {
            "name": "polyglu",
            "context": "sequence",
            "router_width": sizes(tensors, f"{FIRST}polyglu.gate_net.0.weight", 2)[0],
        },
    }


def _check_rope(tensors: Mapping[str, Tensor], context: int, head_dim: int) -> None:
    for key, table in zip((COSINES, SINES), rope_tables(context, head_dim), strict=True):
        if tensors[key].shape != table.shape or (tensors[key].float() - table).abs().max() > ROPE_TOLERANCE:
            raise ValueError(f"{key} is not the table of a head of size {head_dim} and theta {ROPE_THETA:.0f}")


def _write(model: SkipstoneForCausalLM) -> Weights:
    config, ours = model.config, model.state_dict()
    assert config.head_dim is not None
    _check_config(model)
    dtype = ours[OUR_EMBEDDING].dtype
    tables = dict(zip((COSINES, SINES), rope_tables(config.max_position_embeddings, config.head_dim), strict=True))
    tensors = {**tables, **{theirs: ours[name] for theirs, name in _names(config.num_hidden_layers).items()}}
    tensors = {theirs: tensor.to(dtype).contiguous() for theirs, tensor in tensors.items()}
    taus = {ours[TAU.format(i=i)].item() for i in range(config.num_hidden_layers)}
    if len(taus) > 1:
        raise ValueError(f"the blocks differ in tau ({min(taus):g} to {max(taus):g}); this layout has one")
    return Weights({**tensors, HEAD: tensors[EMBEDDING]}, {"tau": _shortest(taus.pop())})


def _shortest(tau: float) -> float:
    """Return the decimal number that was rounded to this fp32 value: .1, not .10000000149."""
    return float(f"{tau:.7g}")


def _check_config(model: SkipstoneForCausalLM) -> None:
    """Raise ValueError for a model that the released code would compute differently."""
    config = model.config
    for key, value in {**BASE, "mechanisms": []}.items():
        if key != "scaled_output_init" and getattr(config, key) != value:
            raise ValueError(f"{key} is {getattr(config, key)!r}, this layout has {value!r} only")
    if parts := unlike_llama(config):
        raise ValueError(f"{next(iter(parts))} is {next(iter(parts.values()))!r}, this layout has none")
    rope = {"partial_rotary_factor": 1.0, **(config.rope_parameters or {})}
    if (rope.get("rope_type", "default"), rope["partial_rotary_factor"]) != ("default", 1.0) or (
        rope.get("rope_theta") != ROPE_THETA
    ):
        raise ValueError(f"rope_parameters are {rope}, this layout has theta {ROPE_THETA:.0f} without scaling only")
    activation = config.activation_options
    if (activation["name"], activation.get("context")) != ("polyglu", "sequence"):
        raise ValueError(f"activation is {activation}, this layout has polyglu with context 'sequence' only")
    if activation.get("preference_scale", 1) != 1:
        raise ValueError(f"preference_scale is {activation['preference_scale']}, this layout has 1 only")
    if config.head_dim is None or config.num_attention_heads * config.head_dim != config.hidden_size:
        raise ValueError(
            f"head_dim ({config.head_dim}) times num_attention_heads ({config.num_attention_heads}) must be "
            f"hidden_size ({config.hidden_size}) in this layout"
        )


POLYCHROMATIC = ReleasedLayout(read=_read, write=_write, options=("tau",))
