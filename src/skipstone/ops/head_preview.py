"""Logits of one token from a four-bit preview of the head, and from the whole rows of its best candidates.

The preview is the head in a few directions of the hidden states. The best candidates by it get the logits that the
whole head gives them; every other token keeps its previewed logit, so that the distribution stays whole.

    p_v = s_v sum_k (q_vk - 8) x'_k + o_v + x'_K     x' = turn x + shift     k = 0 ... K - 1
    y_v = w_v x if p_v is among the m largest of p, else p_v

p: previewed logits, y: logits returned, m: number of candidates. x: hidden state, w: the head's weight. q: four-bit
numbers, s and o: scale and offset of each vocabulary entry. The rows of turn are the K directions and, last, the mean
row of the head, whose product x'_K all entries share.

On a CPU with numba, a compiled kernel reads the preview and the candidates' rows alone. `plain` is the form that it is
tested against.

Shape letters: N tokens, D width, V vocabulary, K directions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
from torch import Tensor, library

from skipstone.ops import float16, int8

_namespace = library.Library("skipstone", "FRAGMENT")  # a torch operation, so that FLOP counters see it
_namespace.define(
    "head_by_candidates(Tensor x, Tensor turn, Tensor shift, Tensor packed, Tensor scale, Tensor offset, "
    "Tensor weight, Tensor? weight_scale, int candidates) -> Tensor"
)
library.register_fake(
    "skipstone::head_by_candidates",
    lambda x, turn, shift, packed, scale, offset, weight, weight_scale, candidates: int8.product_shape(x, weight),
    lib=_namespace,
)
NATIVE = torch.ops.skipstone.head_by_candidates

GROUP = 64  # directions that lie together
ZERO = 8  # the four-bit number that stands for 0
NO_NUMBA = (
    "head_candidates is not used, and the whole head is read: pip install 'skipstone[numba]' reads the candidates' rows"
)


@dataclass(frozen=True)
class Preview:
    """The output head in K directions of the hidden states, as four-bit numbers q: it approximates the head's logits.

    The approximate logit of vocabulary entry v is scale_v sum_k (q_vk - 8) t_k + offset_v + t_K, with t = turn x +
    shift. turn: fp32 [K + 1, D], the directions, and last the mean row of the head. shift: fp32 [K + 1]. packed: uint8
    [V, K / 2], two numbers q in each byte (`pack`). scale, offset: fp32 [V]. V: vocabulary, D: width of a hidden state
    x.
    """

    turn: Tensor
    shift: Tensor
    packed: Tensor
    scale: Tensor
    offset: Tensor


def pack(number_VK: Tensor) -> Tensor:
    """Pack integers from -8 to 7 into bytes, two in each, and return uint8 [V, K / 2].

    number_VK: [V, K] for V rows of K numbers, K a multiple of 64.
    """
    low, high = (number_VK + ZERO).to(torch.uint8).unflatten(1, (-1, 2, GROUP // 2)).unbind(2)
    return (low | (high << 4)).flatten(1)


def unpack(packed: Tensor) -> Tensor:
    """Return the integers that `pack` packed, from -8 to 7, as fp32 [V, K] for V rows of K numbers.

    packed: uint8 [V, K / 2].
    """
    halves = packed.unflatten(1, (-1, GROUP // 2))
    return torch.stack((halves & 15, halves >> 4), 2).flatten(1).float() - ZERO


def previewed(x_ND: Tensor, preview: Preview) -> Tensor:
    """Return the approximate logits that a preview gives, fp32 [N, V] for V vocabulary entries.

    x_ND: hidden states of N tokens. preview: a low-rank four-bit copy of the head.
    """
    turned = x_ND.float() @ preview.turn.t() + preview.shift
    return turned[:, :-1] @ unpack(preview.packed).t() * preview.scale + preview.offset + turned[:, -1:]


def plain(x_ND: Tensor, preview: Preview, weight_VD: Tensor, scale: Tensor | None, candidates: int) -> Tensor:
    """Return logits that are exact for the best candidates, fp32 [N, V], by plain PyTorch.

    The `candidates` vocabulary tokens with the largest logits by the preview (at most V) get their exact logits, all
    others keep the preview's. The faster `logits` is tested against this function. x_ND: hidden states of N tokens.
    preview: a low-rank four-bit copy of the head. weight_VD: weight of the head, for V vocabulary entries. scale: fp32
    scales of an int8 head, [V] or [V, G] for G groups of inputs (`ops/int8.py`); None if the weight is in floating
    point.
    """
    guess_NV = previewed(x_ND, preview)
    whole = weight_VD.float() if scale is None else int8.restore(weight_VD, scale)
    best_NM = guess_NV.topk(candidates).indices
    return guess_NV.scatter(1, best_NM, (x_ND.float() @ whole.t()).gather(1, best_NM))


def takes(x: Tensor, weight_VD: Tensor, scale: Tensor | None) -> bool:
    """Return whether the compiled kernel can compute `logits`: for one token without gradients, on a CPU with numba.

    x: hidden states [..., D]; for more than one token, the result is False. weight_VD: weight of the head [V, D]; if
    the kernel cannot read it (`readable`), for example because of its dtype, the result is False, too. scale: fp32
    scales of an int8 head, [V], [V, D / 64] or [V, D / 32]; None if the head is in floating point.
    """
    if (
        x.numel() != weight_VD.shape[1]
        or torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and x.requires_grad)
    ):
        return False
    return readable(weight_VD, scale) and x.device.type == "cpu"


def readable(weight_VD: Tensor, scale: Tensor | None) -> bool:
    """Return whether the compiled kernel can read this head: contiguous on a CPU, in a format that it knows.

    The formats are fp32; bf16 and fp16 if D is a multiple of 32; int8 if D is a multiple of 64. weight_VD: weight of
    the head [V, D]; on the meta device it is judged as if on a CPU. scale: fp32 scales of an int8 head, [V], [V, D /
    64] or [V, D / 32]; None if the head is in floating point. The result is False without numba, after one warning.
    """
    kind = weight_VD.dtype == torch.float32 or (scale is not None and weight_VD.shape[1] % int8.GROUP == 0)
    kind = kind or (weight_VD.dtype in (torch.bfloat16, torch.float16) and weight_VD.shape[1] % float16.STEP == 0)
    return kind and weight_VD.device.type in ("cpu", "meta") and weight_VD.is_contiguous() and _kernel()


def logits(x: Tensor, preview: Preview, weight_VD: Tensor, scale: Tensor | None, candidates: int) -> Tensor:
    """Return the logits of one token, exact for the best candidates, by the compiled kernel.

    The result is [..., V] in the dtype of x. Call it only if `takes` returned True. x: hidden states [..., D] of one
    token. preview: a low-rank four-bit copy of the head, which picks the candidates and gives all other logits.
    weight_VD: weight of the head [V, D]. scale: fp32 scales of an int8 head, [V], [V, D / 64] or [V, D / 32]; None if
    it is in floating point. candidates: number of vocabulary tokens that get exact logits, at most V.
    """
    given = (preview.turn, preview.shift, preview.packed, preview.scale, preview.offset, weight_VD, scale, candidates)
    return int8.called(_native(), NATIVE, x, *given)


def flops(width: int, vocabulary: int, directions: int, candidates: int) -> int:
    """Return the FLOPs of computing one token's logits by `logits`: a low-rank preview, then exact logits of the best.

    width: size of a hidden state. vocabulary: number of tokens in the vocabulary. directions: rank of the preview.
    candidates: number of vocabulary tokens that get exact logits.
    """
    return 2 * (width * (directions + 1) + vocabulary * directions + candidates * width)


@cache
def _kernel() -> bool:
    """Register the compiled kernel as a torch operation; False without numba, after one warning."""
    try:
        _namespace.impl("head_by_candidates", _native(), "CPU")
    except ImportError:
        warnings.warn(NO_NUMBA, stacklevel=2)
        return False
    return True


@cache
def _native() -> Callable[..., Tensor]:
    native: Callable[..., Tensor] = import_module("skipstone.ops.head_preview_native").logits
    return native
