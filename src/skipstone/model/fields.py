"""`ModelFields`: sizes and parts of a model, with checks of their values that need no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, get_type_hints

from skipstone.core.strict import PlainDict, PlainMapping, convert, unknown
from skipstone.model.layers import parse_layers

FORMAT_VERSION = 1
Written: TypeAlias = Mapping[str, object]  # options of a part as a user wrote them
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
DROPOUTS = ("embedding_dropout", "attention_dropout", "residual_dropout", "mlp_dropout", "mlp_hidden_dropout")
DYNAMIC_ROPE = ("dynamic", "proportional")
# Parts of a decoder whose defaults are those of Llama.
PARTS = (
    "norm_placement",
    "parallel_residual",
    "rope_layers",
    "qk_norm_over",
    "attention_scale",
    "attention_soft_cap",
    "attention_window",
    "window_layers",
    "window_rope_parameters",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
    "logit_soft_cap",
)
SCALES = ("embedding_scale", "residual_scale", "logit_scale")
ALLOWED = {
    "positions": ("rope", "learned"),
    "norm_placement": ("before", "after", "around", "shared"),
    "qk_norm_over": ("head", "each_head", "all_heads"),
    "linear_init": ("normal", "torch"),
    "auxiliary_loss_over": ("labelled", "all"),
    "training_routing": ("oracle", "causal"),
    "cache_format": ("float", "float16"),
    "weight_format": ("float", "bfloat16", "float16", "int8", "int4"),
}
CACHE_FORMATS = {32: "float", 16: "float16"}  # `cache_format` by the bits of a number, of a model in fp32
# Keys that transformers has for every model.
FOREIGN = (
    "architectures",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "transformers_version",
)
MOST_BLOCKS, MOST_BYTES = 1 << 16, 1 << 46  # beyond any machine, so a larger value is a typing mistake


@dataclass(kw_only=True)
class ModelFields:
    """The sizes and parts of a model: sizes named as in Llama, parts chosen by name, mechanisms as plain dicts.

    Sizes: intermediate_size: neurons of an MLP; None means 8/3 of hidden_size, rounded up to a multiple of 32, or 4
    times hidden_size for a plain MLP. num_key_value_heads: None means num_attention_heads. head_dim: None means
    hidden_size / num_attention_heads. max_position_embeddings: context length in tokens. tie_word_embeddings: whether
    the head uses the embedding's weights.

    Blocks: norm: rmsnorm, layernorm, layernorm_without_bias, or rmsnorm_offset and layernorm_offset, whose factor is 1
    + weight; norm_eps: its epsilon. norm_placement: norms before each sub-layer (before), after it (after), on both
    sides (around), or one norm before attention and MLP (shared), which needs parallel_residual. parallel_residual:
    whether the MLP reads the stream that attention reads, and not the one after attention's update. qk_norm: whether
    queries and keys are normalised; qk_norm_over: each head with one weight for all (head) or with its own (each_head),
    or all_heads together. attention_scale: factor on q . k; None means 1 / sqrt(head_dim). attention_soft_cap,
    logit_soft_cap: c of c * tanh(x / c) on scores and logits; None means no cap. embedding_scale, residual_scale,
    logit_scale: factors on embeddings, on each sub-layer's update, and on logits. attention_bias: whether queries, keys
    and values have biases; attention_output_bias, mlp_bias: whether the output projection and MLPs have biases.

    Positions: positions: rope or learned. rope_parameters: as in transformers; None means theta 10,000. rope_layers:
    the blocks with RoPE, a slice such as "1::2" or a list of indices; None means all, [] means none. attention_window:
    number of last tokens of a row that a query sees, itself and skipped ones included, in the blocks window_layers
    (None means all); None means no window. window_rope_parameters: RoPE of the blocks with a window; None means
    rope_parameters.

    MLP: mlp: gated, plain or experts. experts: options of a mixture of experts (`ExpertsConfig`). activation: the name
    of a function, or a mapping {name: polyglu, ...} (`PolyGLUConfig`) or {name: fixed_mix, groups: {silu: 96, gelu:
    32}}, neurons by function. neuron_groups: options of leaving out groups of a gated MLP's neurons
    (`NeuronGroupsConfig`, `MagnitudeGroupsConfig` or `ZeroNeuronsConfig`, by its `decision`); None means that all
    neurons are always multiplied. mechanisms: a list of {name, on: block | attention | mlp | segment, layers: a slice
    or a list of indices, ...options}, the outermost first.

    Training: embedding_dropout, attention_dropout, residual_dropout, mlp_hidden_dropout: dropout rates on embeddings,
    attention weights, the outputs of attention and MLP, and neurons; mlp_dropout: the rate on the MLP's output; None
    means residual_dropout. linear_init: linear layers start normal with standard deviation initializer_range and zero
    biases (normal), or as in nn.Linear (torch). scaled_output_init: whether the standard deviation of projections into
    the residual stream is divided by sqrt(2 * num_hidden_layers). auxiliary_loss_over: routers' losses are averaged
    over labelled tokens (labelled), or each over the tokens that reach its mechanism, labelled or not (all).
    training_routing: how training passes decide by default, looking at the whole row (oracle) or without later tokens
    and noise (causal).

    Decoding: weight_format: float, or bfloat16, float16 or int8 for matrices and token embedding, or int4 for the
    matrices of the blocks and int8 for head and token embedding (`skipstone quantise`); weight_int8: with int4, the
    paths below the decoder of matrices that are int8 nevertheless, such as layers.0.mlp.down_proj; weight_group: 64 or
    32, the inputs of an int8 matrix that share a scale; None means that all inputs of a row do. head_candidates: rows
    of the output head that a decoding step multiplies exactly, those with the largest logits in a cheap preview of
    head_directions dimensions (`skipstone quantise --head-candidates`); both None means all rows. Quantised models and
    those with candidates are not trained. cache_format: caches hold keys and values in the dtype in which they are
    computed (float), or in fp16 if that is wider (float16, `--cache-bits 16`). use_cache and special ids: as in
    transformers. family: the `model_type` that the model was converted from, or None. format_version: version of
    config.json's format.
    """

    format_version: int = FORMAT_VERSION
    vocab_size: int = 256
    hidden_size: int = 256
    intermediate_size: int | None = None
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 1024
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    norm_placement: str = "before"
    parallel_residual: bool = False
    positions: str = "rope"
    rope_parameters: PlainDict | None = None
    rope_layers: str | list[int] | None = None
    qk_norm: bool = False
    qk_norm_over: str = "head"
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    attention_window: int | None = None
    window_layers: str | list[int] | None = None
    window_rope_parameters: PlainDict | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp: str = "gated"
    mlp_bias: bool = False
    experts: Written | None = None
    neuron_groups: Written | None = None
    activation: str | Written = "silu"
    mechanisms: Sequence[Written] | None = None
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    mlp_dropout: float | None = None
    mlp_hidden_dropout: float = 0.0
    auxiliary_loss_over: str = "labelled"
    training_routing: str = "oracle"
    initializer_range: float = 0.02
    linear_init: str = "normal"
    scaled_output_init: bool = False
    tie_word_embeddings: bool = False
    weight_format: str = "float"
    weight_group: int | None = None
    weight_int8: list[str] | None = None
    head_candidates: int | None = None
    head_directions: int | None = None
    cache_format: str = "float"
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    family: str | None = None

    def __post_init__(self) -> None:
        self._fill()
        self._check_size()
        self._check()

    def _fill(self) -> None:
        """Convert fields to their declared types and fill in defaults that follow from other fields."""
        for name, hint in TYPES.items():
            setattr(self, name, convert(hint, getattr(self, name), name))
        if self.num_attention_heads < 1:
            raise ValueError(f"num_attention_heads must be at least 1, got {self.num_attention_heads}")
        gated = self.mlp != "plain"
        if self.intermediate_size is None:  # as many parameters as a plain MLP of 4 d neurons, rounded up
            self.intermediate_size = -(-8 * self.hidden_size // 96) * 32 if gated else 4 * self.hidden_size
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                    f"({self.num_attention_heads}), unless head_dim says how wide a head is"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads

    def _check(self) -> None:
        for field in DROPOUTS:
            if not 0 <= (getattr(self, field) or 0) < 1:
                raise ValueError(f"{field} must be in [0, 1), got {getattr(self, field)}")
        for field in ("norm_eps", "initializer_range"):
            if not 0 < getattr(self, field) < float("inf"):
                raise ValueError(f"{field} must be above 0, got {getattr(self, field)}")
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        for field, allowed in ALLOWED.items():
            if getattr(self, field) not in allowed:
                raise ValueError(unknown(field, getattr(self, field), allowed))
        self._check_positions()
        self._check_attention()
        self._check_special_tokens()

    def _check_size(self) -> None:
        for field in SIZES:
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.num_hidden_layers > MOST_BLOCKS:
            raise ValueError(f"num_hidden_layers must be at most {MOST_BLOCKS:,}, got {self.num_hidden_layers:,}")
        if 4 * self.weights() > MOST_BYTES:
            sizes = ", ".join(f"{name} {getattr(self, name):,}" for name in SIZES[:4])
            raise ValueError(
                f"{sizes}: these weights would be {4 * self.weights() / 2**40:,.0f} TiB in fp32; at most "
                f"{MOST_BYTES >> 40} TiB are accepted"
            )

    def weights(self) -> int:
        """Return the number of parameters in the matrices: embeddings, head, attention, MLPs with all their experts."""
        assert self.intermediate_size is not None
        assert self.head_dim is not None
        assert self.num_key_value_heads is not None
        attention = 2 * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
        mlp = (2 if self.mlp == "plain" else 3) * self._neurons_of_all_experts(self.intermediate_size)
        embeddings = self.vocab_size * (1 if self.tie_word_embeddings else 2)
        return self.hidden_size * (embeddings + self.num_hidden_layers * (attention + mlp))

    def _neurons_of_all_experts(self, dense: int) -> int:
        """Return the neurons of an MLP with all its experts, as far as they are written; without any, `dense`."""
        written = self.experts if self.mlp == "experts" and isinstance(self.experts, Mapping) else {}
        sizes = {key: value for key, value in written.items() if type(value) is int and value > 0}
        return sizes.get("count", 1) * sizes.get("intermediate_size", dense // sizes.get("top_k", 1))

    def _check_positions(self) -> None:
        self.windowed_layers()
        self.rotary_layers()
        if self.positions != "rope":
            if self.rope_layers is not None:
                raise ValueError(f"rope_layers needs positions 'rope', got {self.positions!r}")
            return
        for field in ("rope_parameters", "window_rope_parameters"):
            self._check_rope(getattr(self, field) or {}, field)

    def _check_rope(self, rope: PlainDict, field: str) -> None:
        theta, share = rope.get("rope_theta", 1.0), rope.get("partial_rotary_factor", 1.0)
        if isinstance(theta, bool) or not isinstance(theta, int | float) or not theta > 0:
            raise ValueError(f"{field}.rope_theta must be a number above 0, got {theta!r}")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(f"{field}.partial_rotary_factor must be in (0, 1], got {share!r}")
        if self.head_dim is not None and (turned := int(self.head_dim * share)) % 2:
            of = "head_dim" if share == 1 else f"head_dim {self.head_dim} times partial_rotary_factor {share}"
            raise ValueError(f"{of} must be even with positions 'rope', which turns pairs, got {turned}")
        refuse_dynamic(rope)

    def _check_attention(self) -> None:
        for field in ("attention_scale", "attention_soft_cap", "logit_soft_cap", *SCALES):
            value = getattr(self, field)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{field} must be above 0, got {value}")
        if self.attention_window is not None and self.attention_window < 1:
            raise ValueError(f"attention_window must be at least 1 slot, got {self.attention_window}")
        for field in ("window_layers", "window_rope_parameters"):
            if self.attention_window is None and getattr(self, field) is not None:
                raise ValueError(f"{field} is set, but attention_window is not: no block has a window")
        if self.window_rope_parameters is not None and "rope_theta" not in self.window_rope_parameters:
            raise ValueError("window_rope_parameters.rope_theta is missing")
        if self.norm_placement == "shared" and not self.parallel_residual:
            raise ValueError("norm_placement 'shared' needs parallel_residual: only then both read the same stream")

    def windowed_layers(self) -> list[int]:
        """Return the indices of the blocks with sliding-window attention."""
        return [] if self.attention_window is None else self._layers("window_layers")

    def rotary_layers(self) -> list[int]:
        """Return the indices of the blocks with rotary positions."""
        return self._layers("rope_layers")

    def _layers(self, field: str) -> list[int]:
        """Return the block indices of a pattern; None means all, [] none."""
        pattern = getattr(self, field)
        if pattern is None:
            return list(range(self.num_hidden_layers))
        return parse_layers(pattern, self.num_hidden_layers, field) if pattern != [] else []

    def _check_special_tokens(self) -> None:
        for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, field)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(
                        f"{field} must be in [0, {self.vocab_size}), a token of the vocabulary, got {token}"
                    )

    @property
    def neurons(self) -> int:
        """The number of neurons of an MLP: `intermediate_size` once its default is filled in."""
        assert self.intermediate_size is not None
        return self.intermediate_size

    @property
    def head_size(self) -> int:
        """The size of an attention head: `head_dim` once its default is filled in."""
        assert self.head_dim is not None
        return self.head_dim


def unlike_llama(config: ModelFields) -> dict[str, object]:
    """Return the architecture fields of `config` (all that `PARTS` lists) whose values differ from Llama's, by name."""
    values = {name: getattr(config, name) for name in PARTS}
    return {name: value for name, value in values.items() if value != getattr(ModelFields, name)}


def cache_format_of(bits: int) -> str:
    """Return the `cache_format` that holds keys and values in this many bits; raise ValueError for others than 32, 16.

    bits: 32 stands for the dtype in which a model computes them.
    """
    if type(bits) is not int or bits not in CACHE_FORMATS:
        raise ValueError(f"cache_bits must be 32 or 16, got {bits!r}")
    return CACHE_FORMATS[bits]


def refuse_dynamic(rope: PlainMapping) -> None:
    """Raise ValueError for RoPE parameters whose frequencies depend on the length of the input.

    rope: a `rope_parameters` mapping. With rope_type "dynamic" or "proportional", cached keys would be rotated by
    outdated frequencies.
    """
    if (kind := rope.get("rope_type", "default")) in DYNAMIC_ROPE:
        raise ValueError(
            f"rope_type {kind!r} changes its frequencies with the input's length, so that cached keys go stale; "
            "supported: default, linear, llama3, yarn, longrope"
        )


TYPES = get_type_hints(ModelFields)  # by field name
