"""What a mechanism says about itself so that a compiled decoding step can decide in its place.

A step that runs all blocks in one compiled call (`nn/compiled_blocks.py`) does not call mechanisms. It knows how to
compute what these values describe, and nothing else: a mechanism whose causal decision about a token is a function of
the stream describes it (`DepthModule.stream_gate`), and so does an activation whose result is a function of its
pre-activations and of the tokens so far (`Activation.stream_mix`). Others return None and are called as usual.
Descriptions hold the tensors themselves, not copies, and are asked for in every step.

Shape letters: D width, R hidden width of a router, F neurons, A activations.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor, nn

ALL = float("-inf")  # a line that every token is above, whatever its score


class Scorer(NamedTuple):
    """A router: w2 . relu(W1 x + b1) + b2, or w2 . x + b2 without W1; a constant without w2.

    weight: fp32 [1, R] or [1, D]. bias: [1]. hidden_weight, hidden_bias: [R, D] and [R]. norm: x is divided by its root
    mean square.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    hidden_weight: Tensor | None = None
    hidden_bias: Tensor | None = None
    norm: bool = False


class Line(NamedTuple):
    """How a causal decision compares: a token is kept if its score is above a line.

    value: the line, `ALL` for a decision that keeps every token. threshold: the line as a tensor [], which is read in
    each step instead of `value`. scorer: what gives the score that is compared; None: the mechanism's own.
    """

    value: float = ALL
    threshold: Tensor | None = None
    scorer: Scorer | None = None


EVERY = Line()


class StreamGate(NamedTuple):
    """A depth mechanism in a causal pass without noise and without imposed decisions.

        score = sign * scorer(x)        opening = sigmoid(score) * state

    line: what keeps a token, compared with the score or with the opening (`compares`). weight: the factor of a kept
    token: none (1), raw (the score), opening, or tanh (1 + scale * tanh(score)). acts_on: whether it multiplies the
    whole update, or that of each sub-layer, so that the MLP sees the stream after the gated attention. others: whether
    tokens that are not kept are absent, or give keys and values. state: the name of a tensor in `Tokens.state` that the
    opening is multiplied with and then becomes; None: there is none, 1. loss: coefficient of the opening in the loss of
    the record; None: it has none.
    """

    scorer: Scorer
    line: Line
    sign: float = 1.0
    compares: Literal["score", "opening"] = "score"
    weight: Literal["none", "raw", "opening", "tanh"] = "none"
    scale: Tensor | None = None
    acts_on: Literal["update", "sublayers"] = "update"
    others: Literal["absent", "keys"] = "absent"
    state: str | None = None
    loss: float | None = None

    def tensors(self) -> list[Tensor]:
        """Return every tensor that a step reads."""
        scorers = (self.scorer, self.line.scorer or Scorer())
        found = [x for scorer in scorers for x in scorer if isinstance(x, Tensor)]
        return [*found, *(x for x in (self.line.threshold, self.scale) if x is not None)]


class Functions(NamedTuple):
    """An activation that applies fixed functions to neurons in their order.

    runs: names of functions, as in `nn/mlp.py`, each with the number of its neurons; None: all of them.
    """

    runs: tuple[tuple[str, int | None], ...]

    def tensors(self) -> list[Tensor]:
        """Return every tensor that a step reads: none."""
        return []


class Mixture(NamedTuple):
    """An activation that mixes `ops.reference.ACTIVATIONS` in each neuron, as PolyGLU does.

        logits = scale * (mix_weight relu(mean + context_bias) + mix_bias)
        share  = softmax((preference_scale * preference + logits) / tau)

    mean: of context_weight x over the tokens so far, a token n tokens back with weight decay^n; without a decay, of the
    token alone. name: of the record, and of the store of the sums. context_weight: [R, D]. mix_weight: [A, R].
    preference: [F, A]. scale, mix_bias: [A]. tau: [].
    """

    name: str
    context_weight: Tensor
    context_bias: Tensor
    mix_weight: Tensor
    mix_bias: Tensor
    scale: Tensor
    preference: Tensor
    tau: Tensor
    preference_scale: float
    decay: float | None

    def tensors(self) -> list[Tensor]:
        """Return every tensor that a step reads."""
        return [x for x in self if isinstance(x, Tensor)]


StreamMix = Functions | Mixture


def declares(module: nn.Module, method: str) -> bool:
    """Return whether a declaration made by the class that defines `method` holds for this module.

    It does not if a subclass of that class, or the module itself, defines methods or properties of its own, which may
    compute something else; such a subclass declares again.
    """
    for kind in type(module).__mro__:
        if method in vars(kind):
            return not any(callable(value) and hasattr(type(module), name) for name, value in vars(module).items())
        if any(
            _computes(value) for name, value in vars(kind).items() if not name.startswith("__") or name == "__call__"
        ):
            return False
    return False


def _computes(value: object) -> bool:
    return (callable(value) and not isinstance(value, type)) or isinstance(value, property | classmethod | staticmethod)
