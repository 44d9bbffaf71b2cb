"""PolyGLU (Medeiros 2026, arXiv 2603.13347): each neuron of a gated MLP routes among ReLU, Tanh, SiLU and GELU.

    logits = alpha + beta * gate_net(context)        alpha [F, A] of each neuron, gate_net: Linear 32, ReLU, Linear A
    g      = softmax((logits + Gumbel noise) / tau)  noise in training only
    y      = W_down( sum_k g_k act_k(W_gate x) * W_up x )

Differences from the paper: its context is the mean of the whole sequence, which includes later tokens (`context:
sequence`, for parity); the default is the mean of the tokens so far (`running_mean`), which generation can compute, and
three other contexts are causal (`contexts.py`). The paper draws noise in evaluation too; here evaluation is
deterministic. alpha is `preference_scale` times `preference_bias`, whose name exempts it from weight decay; since the
step of an adaptive optimizer does not depend on the size of the gradient, alpha moves `preference_scale` times as fast
as other weights. tau is a buffer that the trainer anneals.

A price on neurons that are on (`price`) draws neurons to ReLU whose pre-activations W_gate x are often negative,
because only ReLU is then exactly 0. Once each neuron is fixed to its strongest function (hardened), such a model leaves
these neurons out when it decodes (`zeros.py`):

    on     = mean over neurons of 1 - g_relu * P(gate <= 0)    without noise; P over the tokens of the pass, a constant
    loss  += price * on

Shape letters: B rows, T tokens, D width, F neurons, A activations, R projected width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import initialization as init

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.core.noise import row_noise
from skipstone.core.records import ActivationRecord, Records
from skipstone.core.routing_module import RoutingModule
from skipstone.core.stream_gate import Mixture
from skipstone.core.strict import parsed
from skipstone.core.tokens import Tokens
from skipstone.core.width import Activation
from skipstone.mechanisms.base import Placement, real_mask
from skipstone.mechanisms.contexts import Memory, chunk_mean, exponential_mean, running_mean, sequence_mean
from skipstone.mechanisms.mix_figures import MixFigures
from skipstone.ops import mix_activations, score_linear
from skipstone.ops import reference as ops
from skipstone.ops.neurons import Runs, mix_kept

NUM_ACTIVATIONS = len(ops.ACTIVATIONS)
RELU, SILU = 0, 2
SEQUENCE = "context 'sequence' of polyglu"
NEUTRAL_LOGIT = 10.0  # the other three then share 1.4e-4, with gradients that do not vanish

Context = Literal["running_mean", "exponential_mean", "token", "chunk", "sequence"]
OPTION_OF = {"decay": "exponential_mean", "chunk_size": "chunk"}
SUMS = {"running_mean": 1, "exponential_mean": 1, "chunk": 2}  # sums per token in the cache


@dataclass(frozen=True, kw_only=True)
class PolyGLUConfig:
    """The options of PolyGLU, in which a router mixes several activation functions in each neuron.

    context: the router's input at a token. "running_mean": the mean of the document's tokens so far;
    "exponential_mean": the same with weight decay^n for a token n back; "token": the token alone; "chunk": the mean of
    all earlier chunks of chunk_size tokens, 0 in the first; "sequence": the mean of the whole document as in the paper,
    which includes later tokens and cannot generate. decay: the decay of "exponential_mean", in (0, 1). tau_start,
    tau_end: softmax temperature at the start and the end of the training. noise: whether training adds Gumbel noise to
    the logits. router_width: hidden width of the router. preference_scale: factor between a neuron's preference
    parameters and its logits; above 1, preferences learn faster. price: coefficient of an auxiliary loss on the
    expected share of neurons with a nonzero activation. Raises ValueError for values out of range and for options that
    the context does not use.
    """

    context: Context = "running_mean"
    decay: float = 0.95
    chunk_size: int = 64
    tau_start: float = 1.0
    tau_end: float = 0.1
    noise: bool = True
    router_width: int = 32
    preference_scale: float = 1.0
    price: float = 0.0

    def __post_init__(self) -> None:
        if not self.price >= 0:
            raise ValueError(f"price must not be negative, got {self.price}")
        if not 0 < self.tau_end <= self.tau_start:
            raise ValueError(f"tau_end must be in (0, tau_start = {self.tau_start}], got {self.tau_end}")
        if self.router_width < 1:
            raise ValueError(f"router_width must be at least 1, got {self.router_width}")
        if not self.preference_scale > 0:
            raise ValueError(f"preference_scale must be above 0, got {self.preference_scale}")
        if not 0 < self.decay < 1:
            raise ValueError(f"decay must be in (0, 1), got {self.decay}; 1 would be context 'running_mean'")
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {self.chunk_size}")
        for option, context in OPTION_OF.items():
            if context != self.context and getattr(self, option) != getattr(PolyGLUConfig, option):
                raise ValueError(f"{option} applies to context {context!r} only, got context {self.context!r}")


class PolyGLU(MixFigures, Activation):
    """The activation PolyGLU (arXiv 2603.13347): each neuron of a gated MLP mixes ReLU, Tanh, SiLU and GELU.

    The mix of a neuron is softmax((preference + scale * gate_net(context)) / tau), with a learned preference for each
    neuron and a small network on a mean of hidden states. hidden_size: width of the MLP's input. neurons: MLP neurons.
    placement: the block in which it is used; None outside of a model. config: the options (`PolyGLUConfig`), or pass
    its fields as keyword arguments.
    """

    Config: ClassVar[type[PolyGLUConfig]] = PolyGLUConfig
    cast_with_model = ("scale", "context_weight", "context_bias", "mix_weight", "mix_bias")

    def __init__(
        self,
        hidden_size: int,
        neurons: int,
        placement: Placement | None = None,
        config: PolyGLUConfig | None = None,
        **options: object,
    ) -> None:
        """Build the activation.

        hidden_size: width D of the MLP's input. neurons: F, of the MLP. placement: the block and the name of the
        record. config: the options; if None, `options`, the fields of `PolyGLUConfig`, are parsed.
        """
        super().__init__()
        self.config: PolyGLUConfig = parsed(PolyGLUConfig, config, options)
        self.placement = placement or Placement(name="polyglu")
        R = self.config.router_width
        self.preference_bias = nn.Parameter(torch.empty(neurons, NUM_ACTIVATIONS))
        self.scale = nn.Parameter(torch.empty(NUM_ACTIVATIONS))
        self.context_weight = nn.Parameter(torch.empty(R, hidden_size))
        self.context_bias = nn.Parameter(torch.empty(R))
        self.mix_weight = nn.Parameter(torch.empty(NUM_ACTIVATIONS, R))
        self.mix_bias = nn.Parameter(torch.empty(NUM_ACTIVATIONS))
        self.register_buffer("tau", torch.tensor(self.config.tau_start))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw small random weights for the router, and set all other parameters so that functions are mixed evenly.

        Preferences and biases become 0, the factor on the router's logits 1, and the temperature tau becomes
        `tau_start`.
        """
        for parameter in (self.preference_bias, self.context_bias, self.mix_bias):
            init.zeros_(parameter)
        init.ones_(self.scale)
        init.normal_(self.context_weight, 0.0, 0.02)
        init.normal_(self.mix_weight, 0.0, 0.02)
        init.constant_(self.tau, self.config.tau_start)

    def forward(
        self,
        gate_BTF: Tensor,
        x_BTD: Tensor,
        tokens: Tokens,
        cache: SkipstoneCacheLayer | None = None,
        runs: Runs | None = None,
    ) -> tuple[Tensor, Records]:
        """Return the mixed activations, shaped as `gate_BTF`, and an `ActivationRecord` under the mechanism's name.

        gate_BTF: pre-activations W_gate x of F neurons. x_BTD: the MLP's input, from which the context is computed.
        tokens: the tokens of this call (documents, padding, random seed). cache: the layer's cache, which also stores
        sums over earlier tokens; None means no earlier tokens. runs: runs of tokens with the same neuron groups on;
        `gate_BTF` then holds, for each token, the neurons of its groups alone. None means that all neurons are on.
        Raises ValueError with context "sequence" if a cache is given or the pass must not look at later tokens.
        """
        dynamic_BTA = self._dynamic(x_BTD, tokens, cache)
        noise = tokens.mode.noise and self.config.noise
        static_BFA = self.preference_FA[None]
        if noise:
            static_BFA = static_BFA + self._gumbel(len(x_BTD), tokens)
        y_BTF = self._mixed(gate_BTF, static_BFA, dynamic_BTA, tokens, runs)
        reached_BT = real_mask(tokens, x_BTD[..., 0])
        loss_BT = self._loss(gate_BTF, dynamic_BTA, reached_BT) if self.training and self.config.price else None
        return y_BTF, {self.placement.name: ActivationRecord(dynamic_BTA.detach(), reached_BT, loss_BT)}

    @property
    def has_auxiliary_loss(self) -> bool:
        return self.config.price > 0

    def _loss(self, gate_BTF: Tensor, dynamic_BTA: Tensor, reached_BT: Tensor) -> Tensor:
        """Return the auxiliary loss: `price` times the expected share of neurons that are not 0, fp32 [B, T].

        It is the same for all tokens of the call, and 0 for those that did not reach the MLP. dynamic_BTA: the logits
        that depend on the input.
        """
        count = reached_BT.sum().clamp(min=1)
        off_BTF = (gate_BTF.detach() <= 0) & reached_BT[..., None]
        mean_A = torch.where(reached_BT[..., None], dynamic_BTA, 0.0).sum((0, 1)) / count
        relu_F = ((self.preference_FA + mean_A) / self.tau).softmax(-1)[:, RELU]
        on = 1 - (relu_F * (off_BTF.sum((0, 1)) / count)).mean()
        return torch.where(reached_BT, self.config.price * on, 0.0)

    def _mixed(
        self, gate_BTF: Tensor, static_BFA: Tensor, dynamic_BTA: Tensor, tokens: Tokens, runs: Runs | None
    ) -> Tensor:
        """Return the mixed activations, shaped as gate_BTF.

        static_BFA: each neuron's own logits, with any noise, [B or 1, F, A]. dynamic_BTA: the logits that depend on the
        input. runs: the neuron groups that are on, if not all are.
        """
        if runs is None:
            return mix_activations(gate_BTF, static_BFA, dynamic_BTA, self.tau)
        B, T = len(dynamic_BTA), tokens.length
        row_BT = torch.arange(B, device=dynamic_BTA.device)[:, None].expand(B, T)
        dynamic_NA, row_N = tokens.unpad(dynamic_BTA.expand(B, T, -1)).flatten(0, 1), tokens.unpad(row_BT).flatten()
        y_NF = mix_kept(gate_BTF.flatten(0, 1), static_BFA, dynamic_NA, self.tau, runs, row_N)
        return y_NF.view(gate_BTF.shape)

    @property
    def preference_FA(self) -> Tensor:
        return ops.wide(self.preference_bias) * self.config.preference_scale

    def _dynamic(self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None) -> Tensor:
        """Return the logits that depend on the input, scale * gate_net(context), fp32 [B, T or 1, A]."""
        mean_BTR = self._context(score_linear(x_BTD, self.context_weight), tokens, cache)
        hidden_BTR = (mean_BTR + ops.wide(self.context_bias)).relu()
        return ops.wide(self.scale) * score_linear(hidden_BTR, self.mix_weight, self.mix_bias)

    def _context(self, z_BTR: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None) -> Tensor:
        """Return the context of each token, fp32 [B, T or 1, R]."""
        config, memory = self.config, Memory(tokens, cache, self.placement.name)
        if config.context == "running_mean":
            return running_mean(z_BTR, tokens, memory)
        if config.context == "exponential_mean":
            return exponential_mean(z_BTR, tokens, memory, config.decay)
        if config.context == "chunk":
            return chunk_mean(z_BTR, tokens, memory, config.chunk_size)
        if config.context == "token":
            return z_BTR
        if tokens.mode.routing == "causal":
            self.require_causal()
        if cache is not None:
            raise ValueError(f"{SEQUENCE} needs the whole row in every call, not a cache; pass use_cache=False")
        return sequence_mean(z_BTR, tokens)

    def stream_mix(self) -> Mixture | None:
        config = self.config
        decays: dict[str, float | None] = {"running_mean": 1.0, "exponential_mean": config.decay, "token": None}
        if config.context not in decays:
            return None
        return Mixture(
            name=self.placement.name,
            context_weight=self.context_weight,
            context_bias=self.context_bias,
            mix_weight=self.mix_weight,
            mix_bias=self.mix_bias,
            scale=self.scale,
            preference=self.preference_bias,
            tau=self.tau,
            preference_scale=config.preference_scale,
            decay=decays[config.context],
        )

    def _gumbel(self, rows: int, tokens: Tokens) -> Tensor:
        """Return Gumbel noise, fp32 [B, F, A], so that all tokens of a row share a neuron's noise. rows: B."""
        return -(-row_noise(tokens, self.placement.noise_key, rows, *self.preference_bias.shape).log()).log()

    def routing_modules(self) -> dict[str, RoutingModule]:
        return {self.placement.name: self}

    def advance(self, progress: float, statistics: Tensor | None) -> None:
        """Set the temperature tau by linear interpolation from `tau_start` to `tau_end`.

        progress: the fraction of training completed, from 0 to 1. With the default options this is the paper's max(0.1,
        1 - 0.9 * step / total). `statistics` is not used.
        """
        start, end = self.config.tau_start, self.config.tau_end
        self.tau.fill_(start + (end - start) * min(max(progress, 0.0), 1.0))

    def moving(self) -> dict[str, Tensor]:
        """Return what changes during training, for logs: the temperature, as {"tau": fp32 []}.

        All blocks use the same name, because their temperatures are equal.
        """
        return {"tau": self.tau}

    def decay_kind(self, name: str) -> str | None:
        return "preferences" if name == "preference_bias" else super().decay_kind(name)

    def set_identity(self) -> None:
        """Give SiLU a mixing weight of 1 - 1.4e-4 in every neuron, so that the MLP is nearly a SwiGLU."""
        with torch.no_grad():
            self.mix_weight.zero_()
            self.mix_bias.zero_()
            self.preference_bias.zero_()
            self.preference_bias[:, SILU] = NEUTRAL_LOGIT * self.tau / self.config.preference_scale

    def empty_record(self, x_BTD: Tensor) -> ActivationRecord:
        logits_BTA = x_BTD.new_full((*x_BTD.shape[:2], NUM_ACTIVATIONS), float("nan"), dtype=ops.wide_dtype(x_BTD))
        return ActivationRecord(logits_BTA, x_BTD.new_zeros(x_BTD.shape[:2], dtype=torch.bool))

    def build_warning(self) -> str | None:
        if self.config.context != "sequence":
            return None
        return (
            f"{SEQUENCE} is not causal: every position sees a mean over later tokens too, so losses are not those of a "
            "language model; the causal context is 'running_mean'"
        )

    def require_causal(self) -> None:
        if self.config.context == "sequence":
            raise ValueError(
                f"{SEQUENCE} sees the whole row and cannot generate; train with context 'running_mean', or pass "
                "routing='oracle' (to generate: and use_cache=False) for what the published model does"
            )

    def flops(self, tokens: float, routing: str) -> float:
        contexts = min(tokens, 1) if self.config.context == "sequence" else tokens
        return 2 * tokens * self.context_weight.numel() + 2 * contexts * self.mix_weight.numel()

    def cache_bytes(self, tokens: float) -> float:
        """Return how many bytes the router caches, besides keys and values, for a row of `tokens` tokens.

        For each token it stores sums of the projected inputs so far and their count, fp32, and the token's index,
        int64; nothing with the option `context` "token" (the token alone) or "sequence" (which has no cache).
        """
        sums = SUMS.get(self.config.context, 0)
        return tokens * (4 * sums * (self.config.router_width + 1) + 8) if sums else 0
