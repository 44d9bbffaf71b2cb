"""Independent implementations of the two papers' models as plain functions of a released state dict.

Shape letters: B rows, T tokens, D width, H heads, E head size, F neurons, A activations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]
LAMBDA = 0.001


def causal_attention(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor) -> Tensor:
    """Return causal softmax attention, [B, T, H * E]."""
    score = torch.einsum("bhqe,bhke->bhqk", q_BHTE, k_BHTE) / math.sqrt(q_BHTE.shape[-1])
    T = score.shape[-1]
    score = score + torch.full((T, T), -torch.inf).triu(1)
    return torch.einsum("bhqk,bhke->bqhe", score.softmax(-1), v_BHTE).flatten(2)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


@dataclass
class Gated:
    """The output of `token_selective`.

    logits: [B, T, V]. p: halting probabilities of the gated blocks, each [B, T].
    """

    logits: Tensor
    p: list[Tensor]

    @property
    def alpha(self) -> Tensor:
        return sum((1 - p).mean() for p in self.p) / len(self.p)  # type: ignore[return-value]

    @property
    def saved(self) -> Tensor:
        L = len(self.p) + 1
        return 1 - (1 + (L - 1) * self.alpha) / L

    def loss(self, target_BT: Tensor) -> Tensor:
        picked = self.logits.log_softmax(-1).gather(-1, target_BT.clamp(min=0)[..., None])[..., 0]
        return -picked[target_BT >= 0].mean() + LAMBDA * self.alpha


def layer_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def token_selective(w: Weights, ids_BT: Tensor, heads: int, hard: bool = False) -> Gated:
    """Compute the model of the Token-Selective Attention paper, whose gates scale updates by 1 - p.

    w: the released state dict. heads: number of attention heads. hard: whether a gate is 1 where p < .5 and 0
    elsewhere; all tokens give keys and values in either case.
    """
    B, T = ids_BT.shape
    blocks = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    h = w["token_emb.weight"][ids_BT] + w["pos_emb.weight"][:T]
    halting = []
    for i in range(blocks):
        factor = torch.ones(B, T, 1)
        if i > 0:
            r = f"routers.{i - 1}.mlp"
            inner = torch.clamp(h @ w[f"{r}.0.weight"].T + w[f"{r}.0.bias"], min=0)
            p = 1 / (1 + torch.exp(-(inner @ w[f"{r}.2.weight"].T + w[f"{r}.2.bias"])))[..., 0]
            halting.append(p)
            factor = ((p < 0.5).float() if hard else 1 - p)[..., None]
        b = f"blocks.{i}"
        packed = (layer_norm(h, w, f"{b}.ln1") @ w[f"{b}.attn.qkv.weight"].T).view(B, T, 3, heads, -1)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        h = h + factor * (causal_attention(q, k, v) @ w[f"{b}.attn.proj.weight"].T)
        inner = gelu(layer_norm(h, w, f"{b}.ln2") @ w[f"{b}.ffn.net.0.weight"].T + w[f"{b}.ffn.net.0.bias"])
        h = h + factor * (inner @ w[f"{b}.ffn.net.3.weight"].T + w[f"{b}.ffn.net.3.bias"])
    return Gated(layer_norm(h, w, "ln_f") @ w["token_emb.weight"].T, halting)


def token_selective_weights(vocabulary: int, width: int, neurons: int, layers: int, context: int) -> Weights:
    """Return random weights in the layout that the paper released, with which about half of the gates are open."""
    R = max(width // 4, 16)
    w = {"token_emb.weight": torch.randn(vocabulary, width) * 0.5, "pos_emb.weight": torch.randn(context, width) * 0.5}
    for i in range(layers):
        for norm in ("ln1", "ln2"):
            w |= {f"blocks.{i}.{norm}.weight": 1 + 0.2 * torch.randn(width)}
            w |= {f"blocks.{i}.{norm}.bias": 0.2 * torch.randn(width)}
        w[f"blocks.{i}.attn.qkv.weight"] = torch.randn(3 * width, width) * 0.2
        w[f"blocks.{i}.attn.proj.weight"] = torch.randn(width, width) * 0.2
        w |= linear(f"blocks.{i}.ffn.net.0", width, neurons) | linear(f"blocks.{i}.ffn.net.3", neurons, width)
    for i in range(layers - 1):
        w |= linear(f"routers.{i}.mlp.0", width, R) | linear(f"routers.{i}.mlp.2", R, 1)
        w[f"routers.{i}.mlp.2.weight"] *= 4
    w |= {"ln_f.weight": 1 + 0.2 * torch.randn(width), "ln_f.bias": 0.2 * torch.randn(width)}
    for i in range(layers - 1):  # in order: a gate moves the stream that the next router reads
        p = token_selective(w, torch.randint(0, vocabulary, (4, context)), heads=1, hard=True).p[i]
        w[f"routers.{i}.mlp.2.bias"] -= torch.logit(p, 1e-6).median()
    return w | {"head.weight": w["token_emb.weight"], "_last_depth_reg_loss": torch.tensor(0.7)}


def linear(name: str, inputs: int, outputs: int) -> Weights:
    return {
        f"{name}.weight": torch.randn(outputs, inputs) / math.sqrt(inputs),
        f"{name}.bias": torch.randn(outputs) * 0.3,
    }


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * gain


def rotated(x_BHTE: Tensor) -> Tensor:
    """Apply rotary embeddings: pairs (i, i + E/2) as complex numbers, turned by position / 10000^(2 i / E)."""
    real, imaginary = x_BHTE.chunk(2, -1)
    T, half = real.shape[2:]
    angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


def polychromatic(w: Weights, ids_BT: Tensor, tau: float) -> tuple[Tensor, list[Tensor]]:
    """Compute the model of the PolyGLU paper without noise.

    w: the released state dict. tau: the temperature. Returns the logits [B, T, V], and for each block the mean entropy
    of softmax(logits for the activations) in nats.
    """
    x, entropies = w["embeddings.weight"][ids_BT], []
    E = len(w["model_core.0.gqa.rmsnorm_q.gama"])
    for i in range(1 + max(int(name.split(".")[1]) for name in w if name.startswith("model_core."))):
        b = {name.removeprefix(f"model_core.{i}."): v for name, v in w.items() if name.startswith(f"model_core.{i}.")}
        n = rms_norm(x, b["rmsnorm_1.gama"])
        q, k, v = ((n @ b[f"gqa.W_{letter}.weight"].T).unflatten(-1, (-1, E)).transpose(1, 2) for letter in "qkv")
        q, k = rotated(rms_norm(q, b["gqa.rmsnorm_q.gama"])), rotated(rms_norm(k, b["gqa.rmsnorm_k.gama"]))
        each = torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])  # query head -> key/value head
        x = x + causal_attention(q, k[:, each], v[:, each]) @ b["gqa.W_o.weight"].T
        y, entropy = polyglu(
            {k.removeprefix("polyglu."): v for k, v in b.items()}, rms_norm(x, b["rmsnorm_2.gama"]), tau
        )
        x = x + y
        entropies.append(entropy)
    return rms_norm(x, w["rmsnorm.gama"]) @ w["embeddings.weight"].T, entropies


def polyglu(b: Weights, x_BTD: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    hidden = torch.clamp(x_BTD.mean(1) @ b["gate_net.0.weight"].T + b["gate_net.0.bias"], min=0)
    dynamic_BA = b["beta"] * (hidden @ b["gate_net.2.weight"].T + b["gate_net.2.bias"])
    logits_BFA = b["alpha"] + dynamic_BA[:, None]
    weight_BFA = torch.exp(logits_BFA / tau) / torch.exp(logits_BFA / tau).sum(-1, keepdim=True)
    gate, up = x_BTD @ b["W_gate.weight"].T, x_BTD @ b["W_up.weight"].T
    functions = (gate.clamp(min=0), torch.tanh(gate), gate / (1 + torch.exp(-gate)), gelu(gate))
    mixed = sum(weight_BFA[:, None, :, k] * function for k, function in enumerate(functions))
    share = logits_BFA.softmax(-1)
    return (mixed * up) @ b["W_down.weight"].T, -(share * share.log()).sum(-1).mean()


def polychromatic_shapes(
    vocabulary: int, width: int, neurons: int, layers: int, heads: tuple[int, int], context: int
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that the PolyGLU paper released, by name and in its order."""
    E = width // heads[0]
    found: dict[str, tuple[int, ...]] = {"rope.cosines": (context, E // 2), "rope.sins": (context, E // 2)}
    found["embeddings.weight"] = (vocabulary, width)
    block = {"rmsnorm_1.gama": (width,), "rmsnorm_2.gama": (width,)}
    block |= {"polyglu.alpha": (neurons, 4), "polyglu.beta": (4,)}
    block |= {f"polyglu.W_{name}.weight": (neurons, width) for name in ("gate", "up")}
    block |= {"polyglu.W_down.weight": (width, neurons)}
    block |= {"polyglu.gate_net.0.weight": (32, width), "polyglu.gate_net.0.bias": (32,)}
    block |= {"polyglu.gate_net.2.weight": (4, 32), "polyglu.gate_net.2.bias": (4,)}
    block |= {"gqa.rmsnorm_q.gama": (E,), "gqa.rmsnorm_k.gama": (E,), "gqa.W_q.weight": (E * heads[0], width)}
    block |= {f"gqa.W_{letter}.weight": (E * heads[1], width) for letter in "kv"}
    block |= {"gqa.W_o.weight": (width, E * heads[0])}
    for i in range(layers):
        found |= {f"model_core.{i}.{name}": shape for name, shape in block.items()}
    return found | {"rmsnorm.gama": (width,), "output_head.weight": (vocabulary, width)}


def polychromatic_weights(*sizes: int, heads: tuple[int, int], context: int) -> Weights:
    """Return random weights in the layout that the PolyGLU paper released.

    Neurons prefer some activations, and the context changes their choice.
    """
    w = {}
    for name, shape in polychromatic_shapes(*sizes, heads=heads, context=context).items():
        scale = 1.0 if name.endswith(("alpha", "beta")) else shape[-1] ** -0.5 if len(shape) > 1 else 0.2
        w[name] = torch.randn(shape) * scale + (1.0 if name.endswith("gama") else 0.0)
    half = w["rope.cosines"].shape[1]
    angle = torch.arange(context, dtype=torch.float32)[:, None] * (1 / 10000 ** (2 * torch.arange(half) / (2 * half)))
    w |= {"rope.cosines": angle.cos(), "rope.sins": angle.sin(), "output_head.weight": w["embeddings.weight"]}
    return w
