"""An approximate output head (a preview) that selects the tokens whose exact logits are worth computing in a step."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from skipstone.nn.float16 import Float16Linear
from skipstone.nn.int8 import Int8Linear
from skipstone.nn.own_dtype import OwnDtype
from skipstone.ops import head_preview
from skipstone.ops.reference import autocast

HEADS = (nn.Linear, Int8Linear, Float16Linear)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
UNREAD = "head_candidates is not used with this head, device or dtype: the whole head is read"


class HeadPreview(OwnDtype):
    """A low-rank four-bit copy of the output head, which chooses the candidates for the next token in a decoding step.

    Exact logits are computed for the candidates alone, from their rows of the head itself. All other tokens get the
    copy's approximate logits, the preview. width: width of the hidden states, D. vocabulary: number of tokens, V.
    directions: rank of the copy, K, a multiple of 64. candidates: number of candidates per step; the attribute may be
    changed. The approximate logit of token v for a hidden state x is scale_v sum_k (q_vk - 8) t_k + offset_v + t_K,
    with t = turn x + shift and the four-bit numbers q in `packed`. Buffers: turn [K + 1, D], shift [K + 1], scale and
    offset [V], which stay fp32 when the model's dtype changes, and packed, uint8 [V, K / 2].
    """

    turn: Tensor
    shift: Tensor
    packed: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, width: int, vocabulary: int, directions: int, candidates: int) -> None:
        super().__init__()
        self.directions, self.candidates = directions, candidates
        for name, shape in (
            ("turn", (directions + 1, width)),
            ("shift", (directions + 1,)),
            ("scale", (vocabulary,)),
            ("offset", (vocabulary,)),
        ):
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("packed", torch.zeros(vocabulary, directions // 2, dtype=torch.uint8))

    @property
    def preview(self) -> head_preview.Preview:
        return head_preview.Preview(self.turn, self.shift, self.packed, self.scale, self.offset)

    def takes(self, x: Tensor, head: nn.Module) -> bool:
        """Return whether `forward` can compute the logits of the hidden states x with this head.

        That needs one token without gradients, a CPU with numba, and a head for which `fits` is True. If the head or
        the device is the obstacle, a warning says that the whole head is read instead.
        """
        if x.numel() != self.turn.shape[1]:
            return False
        if not self.fits(head) or x.device.type != "cpu":
            _warn_once()
            return False
        return head_preview.takes(x, *_weight(head))

    def fits(self, head: nn.Module | None) -> bool:
        """Return whether the rows of a head can be read in place.

        head: the output head. The result is True for an unmodified linear layer without bias, hooks or adapters, of the
        preview's vocabulary, with weights that the compiled kernel reads (`ops.head_preview.readable`); None gives
        False.
        """
        if not isinstance(head, HEADS) or type(head) not in HEADS:
            return False
        if "forward" in vars(head):
            return False
        weight, scale = _weight(head)
        if any(getattr(head, name) for name in HOOKS) or type(head.weight) is not nn.Parameter or head.bias is not None:
            return False
        return weight.shape[0] == len(self.scale) and head_preview.readable(weight, scale)

    def forward(self, x: Tensor, head: nn.Module) -> Tensor:
        """Return the logits of one token, [..., V] for V tokens of the vocabulary, in the dtype of x, or of autocast.

        Call it only if `takes` returned True. x: hidden states of one token, [..., D]. head: the output head.
        """
        return head_preview.logits(autocast(x), self.preview, *_weight(head), self.candidates)

    def plain(self, x_ND: Tensor, head: nn.Module) -> Tensor:
        """Return the logits of any number of tokens by plain PyTorch, fp32 [N, V], exact for the best candidates alone.

        The candidates are the tokens with the largest approximate logits; all others keep these. `forward` computes the
        same for one token by a compiled kernel. x_ND: hidden states of N tokens. head: the output head, for V tokens of
        the vocabulary.
        """
        return head_preview.plain(x_ND, self.preview, *_weight(head), self.candidates)

    def flops(self) -> int:
        """Return the FLOPs of one token's logits: projection to the low rank, approximate logits, exact candidates."""
        return head_preview.flops(self.turn.shape[1], len(self.scale), self.directions, self.candidates)

    def bytes_read(self, head: nn.Module) -> int:
        """Return how many bytes of memory one token's logits read: the preview, and the candidates' rows of `head`."""
        weight, scale = _weight(head)
        row = weight[:1].numel() * weight.element_size() + (0 if scale is None else 4 * scale[:1].numel())
        own = sum(x.numel() * x.element_size() for x in self.buffers())
        return own + min(self.candidates, len(self.scale)) * row

    def extra_repr(self) -> str:
        return f"{self.directions} directions, {self.candidates} candidates of {len(self.scale)}"


def _weight(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    if isinstance(head, Float16Linear):
        return head.values, None
    return head.weight, head.weight_scale if isinstance(head, Int8Linear) else None  # type: ignore[return-value]


def _warn_once() -> None:
    warnings.warn(UNREAD, stacklevel=4)
