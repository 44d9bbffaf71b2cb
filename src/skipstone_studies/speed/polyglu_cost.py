"""PolyGLU's MLP in training, and a model with one fixed activation per neuron in decoding, compared with SwiGLU.

Training: forward and backward of one MLP whose matrices equal the SwiGLU's. The logits by which PolyGLU mixes
activations are as at initialisation (temperature tau 1) or as after training (some nats apart, tau .1). Saved bytes are
those that autograd keeps for the backward pass, without parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.adapt.harden import harden
from skipstone.core.strict import PlainDict
from skipstone.core.tokens import PassMode, Tokens
from skipstone.mechanisms import PolyGLU
from skipstone.nn.mlp import FixedActivation, GatedMLP
from skipstone_studies.speed.interleaved import time_ratio
from skipstone_studies.study import Column, Figures, RecipeDict, Study

WIDTHS, TOKENS, ROUNDS = (256, 512, 1024), 2048, 15
ROWS = 8
STEPS = 20  # decoded tokens per round
TAUS = (1.0, 0.1)  # initial and trained


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the settings of every timing by its name: training by width, tau, precision and noise; decoding by width.

    Each is a dict that `measured` takes. tau is the temperature of PolyGLU's mixture, noise whether Gumbel noise is
    added to its logits. scale: not used.
    """
    found: dict[str, RecipeDict] = {}
    for width, tau, bf16, noise in itertools.product(WIDTHS, TAUS, (False, True), (False, True)):
        case: PlainDict = {"width": width, "precision": "bf16" if bf16 else "fp32", "tau": tau, "noise": noise}
        found[training_name(**case)] = {**case, "tokens": TOKENS, "rounds": ROUNDS}
    return found | {decoding_name(width): {"width": width, "blocks": 6, "rounds": ROUNDS} for width in WIDTHS}


def training_name(width: int, precision: str, tau: float, noise: bool) -> str:
    """Return the name under which the table shows a timing of PolyGLU's MLP in training.

    width: width of the residual stream. precision: "fp32" or "bf16". tau: temperature of the mixture, by which the
    logits are divided. noise: whether Gumbel noise is added to the logits.
    """
    return f"training, width {width}, {precision}, tau {tau:g}, noise {'on' if noise else 'off'}"


def decoding_name(width: int) -> str:
    """Return the name under which the table shows a timing of decoding by a PolyGLU model with fixed activations.

    width: width of the model's residual stream.
    """
    return f"decoding, width {width}, hardened"


def measured(recipe: RecipeDict) -> Figures:
    """Time PolyGLU in turns with SwiGLU, in training (one MLP) or in decoding (a whole model).

    recipe: an entry of `arms` with a key "seed". Keys of the result: `time`, seconds divided by SwiGLU's, as {"median",
    "min", "max"} over rounds; in training also `saved`, the bytes that autograd keeps for the backward pass, divided by
    SwiGLU's.
    """
    torch.manual_seed(recipe["seed"])
    return _training(recipe) if "tau" in recipe else _decoding(recipe)


def _training(recipe: RecipeDict) -> Figures:
    length, bf16 = recipe["tokens"] // ROWS, recipe["precision"] == "bf16"
    x_BTD, slot = torch.randn(ROWS, length, recipe["width"], requires_grad=True), torch.arange(length)[None]
    ours, theirs = mlps(recipe["width"])
    if recipe["tau"] < 1:
        as_if_trained(ours.activation, recipe["tau"])  # type: ignore[arg-type]
    tokens = Tokens(slot_BT=slot, position_BT=slot, mode=PassMode(noise=recipe["noise"]))
    time = time_ratio(step(ours, x_BTD, tokens, bf16), step(theirs, x_BTD, tokens, bf16), recipe["rounds"])
    saved = [saved_bytes(mlp, x_BTD, tokens, bf16) for mlp in (ours, theirs)]
    return {"time": time, "saved": saved[0] / saved[1]}


def mlps(width: int) -> tuple[GatedMLP, GatedMLP]:
    """Return a PolyGLU and a SwiGLU MLP for a residual stream of `width`, of the same sizes and with equal matrices."""
    neurons = -(-8 * width // 96) * 32
    ours = GatedMLP(width, neurons, PolyGLU(width, neurons))
    theirs = GatedMLP(width, neurons, FixedActivation("silu"))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    return ours, theirs


def step(mlp: GatedMLP, x_BTD: Tensor, tokens: Tokens, bf16: bool) -> Callable[[], None]:
    """Return a function that runs forward and backward pass of an MLP on `x_BTD` [rows, tokens, width].

    mlp: the MLP. tokens: for each token its index in the row and its position, and whether Gumbel noise is added to
    PolyGLU's logits. bf16: whether the forward pass runs under autocast.
    """

    def run() -> None:
        mlp.zero_grad(set_to_none=True)
        x_BTD.grad = None
        with torch.autocast(x_BTD.device.type, torch.bfloat16, enabled=bf16):
            y_BTD, _ = mlp(x_BTD, tokens)
        y_BTD.square().sum().backward()

    return run


def saved_bytes(mlp: GatedMLP, x_BTD: Tensor, tokens: Tokens, bf16: bool) -> int:
    """Return the bytes of the tensors that an MLP's forward pass on `x_BTD` keeps for the backward pass.

    mlp: the MLP. Parameters and their copies in bf16 do not count. tokens: for each token its index in the row and its
    position, and whether Gumbel noise is added to PolyGLU's logits. bf16: whether the pass runs under autocast.
    """
    seen: dict[int, int] = {}
    weights = {p.numel() for p in mlp.parameters()}

    def pack(x: Tensor) -> Tensor:
        if x.numel() not in weights:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with hooks, torch.autocast(x_BTD.device.type, torch.bfloat16, enabled=bf16):
        kept = mlp(x_BTD, tokens)
    del kept
    return sum(seen.values())


@torch.no_grad()
def as_if_trained(activation: PolyGLU, tau: float) -> None:
    """Set the router weights and temperature of PolyGLU to random values that are typical after training.

    A token's logits for the activations then differ by about five nats, a neuron's own logits by a third of a nat.
    activation: the module to change. tau: the temperature.
    """
    for weight, spread in ((activation.context_weight, 0.3), (activation.mix_weight, 1.0)):
        nn.init.normal_(weight, 0.0, spread)
    nn.init.normal_(activation.preference_bias, 0.0, 0.3)
    activation.tau.fill_(tau)


def _decoding(recipe: RecipeDict) -> Figures:
    """Time decoding of a model hardened to a quarter of the neurons per activation, divided by SwiGLU."""
    heads = max(1, recipe["width"] // 64)
    values = {"vocab_size": 256, "hidden_size": recipe["width"], "num_hidden_layers": recipe["blocks"]}
    routed = SkipstoneForCausalLM(SkipstoneConfig(**values, num_attention_heads=heads, activation={"name": "polyglu"}))
    for mechanism in routed.eval().routing_modules():
        nn.init.normal_(mechanism.preference_bias)
    theirs = SkipstoneForCausalLM(SkipstoneConfig(**values, num_attention_heads=heads)).eval()
    return {"time": time_ratio(decode(harden(routed)), decode(theirs), recipe["rounds"])}


def decode(model: SkipstoneForCausalLM) -> Callable[[], None]:
    """Return a function that runs 20 decoding steps of `model` for one row, and empties the cache before it returns."""
    cache, token_B1 = DynamicCache(config=model.config), torch.zeros(1, 1, dtype=torch.long)

    @torch.no_grad()
    def run() -> None:
        for _ in range(STEPS):
            model(token_B1, past_key_values=cache)
        cache.crop(-STEPS)

    return run


POLYGLU_COST = Study(
    name="polyglu_cost",
    purpose="PolyGLU against SwiGLU: time and memory of training, and time of decoding once hardened",
    about=(
        "**Random weights.** Training: forward and backward of one MLP on 2,048 tokens, with the routing of a model "
        "at its start (tau 1) and of a trained one (tau .1). *Saved bytes* are kept for the backward pass. Decoding: "
        "one token of one row through a whole model of 6 blocks with a cache, after each neuron was hardened to one "
        "activation. Everything is interleaved with SwiGLU; the table has medians of the ratios."
    ),
    arms=arms,
    seeds={"laptop": (0,)},
    clock=measured,
    columns=(
        Column(key="time", title="time / SwiGLU (min to max)", format=".2f", spread=True),
        Column(key="saved", title="saved bytes / SwiGLU", format=".2f"),
    ),
)
