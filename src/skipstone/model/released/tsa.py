"""Token-Selective Attention (Mohammed 2026, arXiv 2605.05222): read the state dict of its released PyTorch code.

Queries, keys and values are one matrix whose rows are all queries, then all keys, then all values, each grouped by
head, so the number of heads is the only size that the weights do not determine. Routers are separate from blocks:
router r reads the stream after block r and gates block r + 1. The head shares the embedding's weights. lambda, the
coefficient of the penalty on open gates, is a training setting that the weights do not contain: the converted model
gets the paper's value for language.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from skipstone.core.strict import PlainDict
from skipstone.model.released.files import Weights
from skipstone.model.released.layout import Options, ReleasedLayout, Translated
from skipstone.model.released.names import check_names, count_blocks, expand, sizes

HEAD, EMBEDDING = "head.weight", "token_emb.weight"
DEPTH_LOSS = "_last_depth_reg_loss"  # a buffer with the last training step's loss, not needed here
WHOLE = {
    EMBEDDING: "model.embed_tokens.weight",
    "pos_emb.weight": "model.positions.weight",
    "ln_f.weight": "model.norm.weight",
    "ln_f.bias": "model.norm.bias",
}
QKV = {"blocks.{i}.attn.qkv.weight": "model.layers.{i}.self_attn.{{}}_proj.weight"}
BLOCK = {
    "blocks.{i}.ln1.weight": "model.layers.{i}.input_layernorm.weight",
    "blocks.{i}.ln1.bias": "model.layers.{i}.input_layernorm.bias",
    "blocks.{i}.attn.proj.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "blocks.{i}.ln2.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "blocks.{i}.ln2.bias": "model.layers.{i}.post_attention_layernorm.bias",
    "blocks.{i}.ffn.net.0.weight": "model.layers.{i}.mlp.up_proj.weight",
    "blocks.{i}.ffn.net.0.bias": "model.layers.{i}.mlp.up_proj.bias",
    "blocks.{i}.ffn.net.3.weight": "model.layers.{i}.mlp.down_proj.weight",
    "blocks.{i}.ffn.net.3.bias": "model.layers.{i}.mlp.down_proj.bias",
}
ROUTER = {
    "routers.{i}.mlp.0.weight": "model.layers.{next}.mechanisms.token_selective.router.hidden_weight",
    "routers.{i}.mlp.0.bias": "model.layers.{next}.mechanisms.token_selective.router.hidden_bias",
    "routers.{i}.mlp.2.weight": "model.layers.{next}.mechanisms.token_selective.router.weight",
    "routers.{i}.mlp.2.bias": "model.layers.{next}.mechanisms.token_selective.router.score_bias",
}

# Settings of the released code that do not depend on its sizes. It initialises embeddings with N(0, .02), projections
# into the residual stream with 1/sqrt(2 L) of that, and everything else as PyTorch does. Its gates are soft in every
# pass; its sparse mode gives kept tokens gain 1; its depth loss averages over all tokens, labelled or not.
BASE: PlainDict = {
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "positions": "learned",
    "mlp": "plain",
    "mlp_bias": True,
    "activation": "gelu",
    "embedding_dropout": 0.1,
    "attention_dropout": 0.1,
    "mlp_dropout": 0.1,
    "mlp_hidden_dropout": 0.1,
    "linear_init": "torch",
    "scaled_output_init": True,
    "auxiliary_loss_over": "all",
    "tie_word_embeddings": True,
}
LANGUAGE, SYNTHETIC = 0.001, 0.01  # the paper's lambdas


def gate(depth_weight: float = LANGUAGE, **options: object) -> PlainDict:
    """Return the entry of `mechanisms` for Token-Selective Attention on all blocks but the first.

    Options that are not given take the values of the released code. depth_weight: the paper's lambda, the coefficient
    of its depth loss; .001 for language. options: further options of `TokenSelectiveConfig`.
    """
    values = {"start_bias": -1.0, "depth_weight": depth_weight, "execution": "soft", "hard_gain": "one"}
    return {"name": "token_selective", "layers": "1:", **values, **options}


def _read(weights: Weights, options: Options) -> Translated:
    tensors = weights.tensors
    layers = count_blocks(tensors, "blocks")
    if layers < 2:
        raise ValueError("has only one block, which is never gated; at least 2 are expected")
    qkv, plain = expand(QKV, layers), {**WHOLE, **expand(BLOCK, layers), **expand(ROUTER, layers - 1)}
    check_names(tensors, {**plain, **qkv, HEAD: None}, ignored=(DEPTH_LOSS,))
    if not tensors[HEAD].equal(tensors[EMBEDDING]):
        raise ValueError(f"{HEAD} differs from {EMBEDDING}; in this layout they are one matrix")
    ours = {name: tensors[key] for key, name in plain.items()}
    for key, pattern in qkv.items():
        for letter, part in zip("qkv", _thirds(tensors, key), strict=True):
            ours[pattern.format(letter)] = part
    return Translated(values=_values(tensors, layers, options.get("num_heads")), tensors=ours)


def _thirds(tensors: Mapping[str, Tensor], key: str) -> tuple[Tensor, ...]:
    rows, width = sizes(tensors, key, 2)
    if rows != 3 * width:
        raise ValueError(f"{key} has shape [{rows}, {width}]; three stacked square matrices are expected")
    return tensors[key].split(width)


def _values(tensors: Mapping[str, Tensor], layers: int, num_heads: int | None) -> PlainDict:
    vocabulary, width = sizes(tensors, EMBEDDING, 2)
    if num_heads is None:
        raise ValueError("the number of heads does not follow from the weights: give num_heads (--num-heads)")
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads must divide the width, which is {width}; got {num_heads}")
    return {
        **BASE,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": sizes(tensors, "blocks.0.ffn.net.0.weight", 2)[0],
        "num_hidden_layers": layers,
        "num_attention_heads": num_heads,
        "max_position_embeddings": sizes(tensors, "pos_emb.weight", 2)[0],
        "mechanisms": [gate(router_width=sizes(tensors, "routers.0.mlp.0.weight", 2)[0])],
    }


TSA = ReleasedLayout(read=_read, options=("num_heads",))
