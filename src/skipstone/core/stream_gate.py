"""Descriptions of mechanisms as data (weights, thresholds), by which a compiled decoding step decides in their place.

A step that runs all blocks in one compiled call (`nn/compiled_blocks.py`) does not call mechanisms. It knows how to
compute what these values describe, and nothing else. Three kinds of modules can be described: a mechanism that decides
about a token by its hidden state (`DepthModule.stream_gate`); an activation whose result follows from its
pre-activations and the tokens so far (`Activation.stream_mix`); and a router that chooses neurons by an MLP's own
activations and products (`ActivationGroupRouter.stream_choice`). Modules that compute something else return None and
are called as usual. Descriptions hold the tensors themselves, not copies, and are asked for in every step.

Shape letters: D width, R hidden width of a router, F neurons, A activations.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor, nn

ALL = float("-inf")  # a line that every token is above, whatever its score


class Scorer(NamedTuple):
    """A router: score = w2 . relu(W1 x + b1) + b2; without W1, w2 . x + b2; without w2, the constant b2.

    weight: w2, fp32 [1, R], or [1, D] without W1, for width D and R hidden units. bias: b2, [1]; None means 0.
    hidden_weight, hidden_bias: W1 [R, D] and b1 [R]. norm: whether x is first divided by its root mean square.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    hidden_weight: Tensor | None = None
    hidden_bias: Tensor | None = None
    norm: bool = False


class Line(NamedTuple):
    """The limit that a token's score must exceed for a causal decision (one made without later tokens) to keep it.

    value: the limit as a number; -inf keeps every token. threshold: the limit as a scalar tensor, read anew in each
    step; if given, it replaces `value`. scorer: the router whose score is compared with the limit; None means the
    mechanism's own router.
    """

    value: float = ALL
    threshold: Tensor | None = None
    scorer: Scorer | None = None


EVERY = Line()


class StreamGate(NamedTuple):
    """A description of how a depth mechanism decides in a causal pass (as in generation, without exploration noise).

        score = sign * scorer(x)        opening = sigmoid(score) * state

    It applies where the caller imposes no decisions. scorer: the router. sign: 1, or -1 if tokens with low outputs of
    the router are kept. line: the limit that the score must exceed, or the opening if `compares` is "opening". weight:
    the factor on the update of a kept token: "none" (1), "raw" (the score), "opening", or "tanh" (1 + scale *
    tanh(score)). scale: a scalar tensor for "tanh". acts_on: whether the factor multiplies the block's whole "update",
    or the updates of attention and MLP separately ("sublayers"), so that the MLP sees the scaled attention. others:
    whether tokens that are not kept are "absent", or still provide "keys" and values. state: the name of a tensor in
    `Tokens.state`, a factor of the opening (see above; 1 if None), which is then set to the opening. known: whether
    token ids decide: `state` then names no tensor of `Tokens.state`, but is 1 for the tokens that
    `DepthModule.kept_by_ids` returns and 0 for others. loss: the opening times this coefficient is the auxiliary loss
    returned with the decision; None means no loss.
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
    known: bool = False
    loss: float | None = None

    def tensors(self) -> list[Tensor]:
        """Return every tensor that a decoding step reads: `scale`, the limit's tensor, and those of the routers."""
        scorers = (self.scorer, self.line.scorer or Scorer())
        found = [x for scorer in scorers for x in scorer if isinstance(x, Tensor)]
        return [*found, *(x for x in (self.line.threshold, self.scale) if x is not None)]


def by_ids(state: str, kv: Literal["kept", "full"]) -> StreamGate:
    """Return the description of a mechanism whose decisions follow from token ids, with updates of weight 1.

    state: a name that no other mechanism uses. kv: "full" if tokens that are not kept provide keys and values, else
    "kept". The score is 0, so the opening is a half for a kept token and 0 for others.
    """
    others: Literal["absent", "keys"] = "keys" if kv == "full" else "absent"
    return StreamGate(Scorer(), Line(0.25), compares="opening", others=others, state=state, known=True)


class Functions(NamedTuple):
    """A description of an activation that applies a fixed function to each neuron.

    runs: pairs of a function's name (such as "silu", "gelu" or "relu") and the number of adjacent neurons that use it,
    in their order; the number None stands for all neurons.
    """

    runs: tuple[tuple[str, int | None], ...]

    def tensors(self) -> list[Tensor]:
        """Return every tensor that a decoding step reads: none."""
        return []


class Mixture(NamedTuple):
    """A description of an activation that mixes several functions in each of F neurons, as PolyGLU does.

        logits = scale * (mix_weight relu(mean + context_bias) + mix_bias)
        share  = softmax((preference_scale * preference + logits) / tau)

    A neuron's result is the sum of its A functions (`ops.reference.ACTIVATIONS`), each times its share. x is the MLP's
    input, of width D; R is a hidden width. mean: the mean of context_weight x over the tokens so far, in which a token
    n tokens back has the weight decay^n; with decay None, of the current token alone. name: the name under which the
    decisions are returned and the running sums are cached. context_weight: [R, D]. context_bias: [R]. mix_bias,
    scale: [A]. mix_weight: [A, R]. preference: [F, A], the neurons' learned logits, and preference_scale, a constant
    factor on them. tau: scalar tensor, the temperature.
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
        """Return the tensors among the fields: all that a decoding step reads."""
        return [x for x in self if isinstance(x, Tensor)]


StreamMix = Functions | Mixture


class NeuronChoice(NamedTuple):
    """A description of how an MLP chooses, for each token, the neurons that it multiplies.

    The choice follows from the activations a = act(W_gate x). decision: "zeros" keeps the neurons with a != 0;
    "largest" computes W_up x for the `tried` groups whose mean of |a| * typical over their neurons is largest, and
    multiplies the last matrix for those `kept` of them whose mean of |a * W_up x| is largest. tried, kept: numbers of
    groups; "zeros" does not use them. size: number of neurons in a group. typical: fp32 [F], a factor for each of F
    neurons. name: the name under which the decisions are returned.
    """

    name: str
    decision: Literal["zeros", "largest"]
    typical: Tensor
    tried: int
    kept: int
    size: int = 1

    def tensors(self) -> list[Tensor]:
        """Return every tensor that a decoding step reads: only `typical`, the factors of the neurons."""
        return [self.typical]


def declares(module: nn.Module, method: str) -> bool:
    """Return whether the description returned by `method` (such as `stream_gate`) can be trusted for this module.

    module: the mechanism or activation. It can be trusted if the class that defines `method` defines everything the
    module computes: neither a subclass nor the module itself may add or replace methods or properties, because these
    may compute something else. Such a subclass has to define `method` again.
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
