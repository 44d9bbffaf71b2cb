"""Routers: modules that turn a token's hidden state into its score, always in fp32.

They hold bare parameters instead of nn.Linear, so that adapters and quantisers that replace every Linear leave them
alone. Shape letters: B rows, T tokens, D width, R hidden width of the router.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import initialization as init

from skipstone.core.stream_gate import Scorer
from skipstone.core.strict import choose
from skipstone.ops import reference as ops
from skipstone.ops import score_linear


class LinearRouter(nn.Module):
    """A linear router: score = w . x + b, computed in fp32 (Mixture-of-Depths, arXiv 2404.02258, section 3.4).

    width: D, the size of x. start_bias: initial value of b; None means that there is no bias. outputs: number of scores
    per token. norm: whether x is divided by its root mean square.
    """

    def __init__(self, width: int, start_bias: float | None = None, outputs: int = 1, norm: bool = False) -> None:
        super().__init__()
        self.start_bias, self.norm = start_bias, norm
        self.weight = nn.Parameter(torch.empty(outputs, width))
        self.score_bias = None if start_bias is None else nn.Parameter(torch.empty(outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight uniformly within 1 / sqrt(input width) of 0, and set the bias, if any, to `start_bias`."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        init.uniform_(self.weight, -bound, bound)
        if self.score_bias is not None:
            init.constant_(self.score_bias, self.start_bias)

    def forward(self, x_BTD: Tensor, every: bool = False) -> Tensor:
        """Return the score of each token, fp32 [B, T], or all scores of each token, [B, T, outputs].

        x_BTD: hidden states. every: whether to return all scores; with False, the router must have one output.
        """
        score_BTO = score_linear(x_BTD, self.weight, self.score_bias, self.norm)
        return score_BTO if every else score_BTO.squeeze(-1)

    def constant(self, score: float) -> None:
        """Set the parameters so that every token gets this score (0 without a bias) and the weight still learns."""
        with torch.no_grad():
            self.weight.zero_()
            if self.score_bias is not None:
                self.score_bias.fill_(score)

    def flops(self, tokens: float) -> float:
        """Return the matrix FLOPs of the forward pass over `tokens` tokens."""
        return 2 * tokens * self.weight.numel()

    def weight_flops(self, tokens: float) -> float:
        """Return the matrix FLOPs of a backward pass over `tokens` tokens that computes weight gradients only.

        The gradient with respect to the router's input is left out.
        """
        return self.flops(tokens)


class MLPRouter(nn.Module):
    """A router with one hidden layer: score = w2 . relu(W1 x + b1) + b2, in fp32 (arXiv 2605.05222).

    width: size of x. hidden: hidden width. start_bias: initial value of b2. norm: whether x is divided by its root mean
    square.
    """

    def __init__(self, width: int, hidden: int, start_bias: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.start_bias, self.norm = start_bias, norm
        self.hidden_weight = nn.Parameter(torch.empty(hidden, width))
        self.hidden_bias = nn.Parameter(torch.empty(hidden))
        self.weight = nn.Parameter(torch.empty(1, hidden))
        self.score_bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise like nn.Linear, except for the last bias, `start_bias`, which decides how open a gate starts."""
        hidden, width = self.hidden_weight.shape
        for parameter, fan in ((self.hidden_weight, width), (self.hidden_bias, width), (self.weight, hidden)):
            init.uniform_(parameter, -1 / math.sqrt(fan), 1 / math.sqrt(fan))
        init.constant_(self.score_bias, self.start_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the score of each token, fp32 [B, T]. x_BTD: hidden states."""
        hidden_BTR = score_linear(x_BTD, self.hidden_weight, self.hidden_bias, self.norm).relu()
        return score_linear(hidden_BTR, self.weight, self.score_bias).squeeze(-1)

    def constant(self, score: float) -> None:
        """Set the parameters so that every token gets this score and the last layer still learns."""
        with torch.no_grad():
            self.weight.zero_()
            self.score_bias.fill_(score)

    def flops(self, tokens: float) -> float:
        """Return the matrix FLOPs of the forward pass over `tokens` tokens."""
        return 2 * tokens * (self.hidden_weight.numel() + self.weight.numel())

    def weight_flops(self, tokens: float) -> float:
        """Return the matrix FLOPs of a backward pass over `tokens` tokens without the gradient of the router's input.

        Gradients of all weights are counted, and those of the hidden layer that they need.
        """
        return 2 * self.flops(tokens) - 2 * tokens * self.hidden_weight.numel()


class ConstantRouter(nn.Module):
    """A router that gives every token the same learned score, as a control for routers that read the token.

    start_bias: the initial score.
    """

    def __init__(self, start_bias: float = 0.0) -> None:
        super().__init__()
        self.start_bias = start_bias
        self.score_bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the score to `start_bias`."""
        init.constant_(self.score_bias, self.start_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the learned score for every token, fp32 [B, T]. x_BTD: hidden states, whose values are not used."""
        return ops.wide(self.score_bias) + x_BTD.new_zeros(x_BTD.shape[:2], dtype=ops.wide_dtype(x_BTD))

    def constant(self, score: float) -> None:
        """Set the score of all tokens to `score`."""
        with torch.no_grad():
            self.score_bias.fill_(score)

    def flops(self, tokens: float) -> float:
        """Return 0, because there is no matrix product."""
        return 0

    weight_flops = flops


class NoRouter(nn.Module):
    """A router without parameters whose score is always 0, used if nothing depends on the score.

    Tokens are then kept by their ids, and kept updates have weight 1.
    """

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return zeros, fp32 [B, T]. x_BTD: hidden states, whose values are not used."""
        return x_BTD.new_zeros(x_BTD.shape[:2], dtype=ops.wide_dtype(x_BTD))

    def flops(self, tokens: float) -> float:
        """Return 0, because there is no matrix product."""
        return 0

    weight_flops = flops


def scorer_of(router: nn.Module) -> Scorer | None:
    """Return a router's parameters as a `Scorer`, from which decoding by numba code computes its scores.

    None if it cannot be described so: a router of a class defined elsewhere, or one with several scores per token.
    """
    kind, own = type(router), router._parameters  # looked up there in a fraction of the time of an attribute
    weight, bias = own.get("weight"), own.get("score_bias")
    if kind is LinearRouter and weight is not None and weight.shape[0] == 1:
        return Scorer(weight, bias, None, None, bool(router.norm))
    if kind is MLPRouter:
        return Scorer(weight, bias, own["hidden_weight"], own["hidden_bias"], bool(router.norm))
    if kind is ConstantRouter:
        return Scorer(None, bias)
    return Scorer() if kind is NoRouter else None


def hidden_width(width: int) -> int:
    """Return the default hidden width of an MLP router on inputs of size `width`: max(width // 4, 16)."""
    return max(width // 4, 16)


def build_router(kind: str, width: int, norm: bool = False) -> LinearRouter | MLPRouter:
    """Build a router by name.

    kind: "linear" or "mlp". width: size of a hidden state. norm: whether the router divides its input by its root mean
    square. Raises ValueError for an unknown kind.
    """
    return choose("router", kind, ROUTERS)(width, norm)


ROUTERS: dict[str, Callable[[int, bool], LinearRouter | MLPRouter]] = {
    "linear": lambda width, norm: LinearRouter(width, norm=norm),
    "mlp": lambda width, norm: MLPRouter(width, hidden_width(width), norm=norm),
}
