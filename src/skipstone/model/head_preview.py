"""Computation of the preview of a model's head (`ops/head_preview.py`) from hidden states.

After SVD-softmax (Shim et al., NeurIPS 2017), which previews the head in its leading singular directions. Here the
directions are those in which the logits vary most, for hidden states h with mean m and covariance C:

    w' = w - mean of w over the vocabulary         a constant added to all logits changes nothing
    logit = w' m + w' (h - m) + constant           the first is one number for each token of the vocabulary
    C = S S^T,  S^T W'^T W' S = U L U^T            the columns of S U, ordered by L, are the directions

Coordinates of the head's rows in these directions have four bits and one scale a row. The part of a logit that the
preview leaves out has a variance v. If it is normal, the mean of exp(logit) is exp(preview + v / 2), so v / 2 is added
to the preview, and half the variance that rounding adds is subtracted.

Shape letters: N tokens, D width, V vocabulary, K directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skipstone.core.strict import PlainDict
from skipstone.model.build import StoredLinear
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig
from skipstone.model.quantise import check_model, rebuilt
from skipstone.ops import head_preview

SHRINK = 0.1  # of the covariance towards equal ones, because the text is short
PART = 1 << 14  # rows of the head at a time
LARGEST = 7  # of a four-bit number's magnitude


@torch.no_grad()
def with_head_candidates(
    model: SkipstoneForCausalLM, ids_BT: Tensor, candidates: int, directions: int
) -> SkipstoneForCausalLM:
    """Return a copy of the model whose decoding steps multiply only the `candidates` best rows of its output head.

    A step first computes approximate logits for the whole vocabulary from a small table, then exact ones for the best
    rows; other tokens keep the approximate logits. ids_BT: int64 [rows, tokens], a few thousand tokens of text like the
    one to be decoded. directions: dimensions of the table, a multiple of 64. After SVD-softmax (Shim et al., NeurIPS
    2017). Raises ValueError for values out of range, and for a model that has such a table already.
    """
    check_model(model)
    if ids_BT.dim() != 2 or 0 in ids_BT.shape:
        raise ValueError(f"ids must have shape [rows, tokens] with at least one of each, got {list(ids_BT.shape)}")
    config = config_with_candidates(model, candidates, directions)
    states = [model.model(row[None], use_cache=False, routing="causal").last_hidden_state[0] for row in ids_BT]
    hidden_ND = model.to_head(torch.cat(states))
    head = model.lm_head
    weight_VD = head.restored() if isinstance(head, StoredLinear) else head.weight
    found = preview_of(weight_VD.detach().float(), hidden_ND.float(), directions)
    tensors: PlainDict = dict(model.state_dict())
    tensors |= {f"head_preview.{name}": tensor for name, tensor in vars(found).items()}
    return rebuilt(model, config, tensors)


def config_with_candidates(model: SkipstoneForCausalLM, candidates: int, directions: int) -> SkipstoneConfig:
    """Return the model's configuration with an output head of which decoding steps multiply only some rows exactly.

    candidates: number of these rows, those with the largest approximate logits. directions: dimensions in which the
    logits are approximated, a multiple of 64. Raises ValueError for values out of range, and for a model that has head
    candidates already.
    """
    if model.config.head_candidates is not None:
        raise ValueError("the model has head_candidates already; begin with the model without")
    fields = {"head_candidates": candidates, "head_directions": directions}
    return SkipstoneConfig(**{**model.config.to_dict(), **fields})


def preview_of(weight_VD: Tensor, hidden_ND: Tensor, directions: int) -> head_preview.Preview:
    """Return a table that approximates a head's logits for hidden states like the given ones.

    weight_VD: fp32, the head, V vocabulary entries by D inputs. hidden_ND: fp32, N hidden states as the head reads
    them. directions: K, the number of dimensions of the table, which are those in which the logits vary most.
    """
    mean_D, row_D = hidden_ND.mean(0), weight_VD.mean(0)
    parts = [weight_VD[at : at + PART] - row_D for at in range(0, len(weight_VD), PART)]
    along, back, size = _directions(parts, hidden_ND - mean_D)
    numbers, scales, offsets = [], [], []
    for part in parts:
        turned = part @ along
        scale = turned[:, :directions].abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
        numbers.append(head_preview.pack((turned[:, :directions] / scale[:, None]).round().clamp(-8, LARGEST)))
        left_out = turned[:, directions:].square() @ size[directions:]
        rounding = scale.square() / 12 * size[:directions].sum()
        scales.append(scale)
        offsets.append(part @ mean_D + (left_out - rounding) / 2)
    return head_preview.Preview(
        turn=torch.cat((back[:directions], row_D[None])),
        shift=torch.cat((-(back[:directions] @ mean_D), row_D.new_zeros(1))),
        packed=torch.cat(numbers),
        scale=torch.cat(scales),
        offset=torch.cat(offsets),
    )


def _directions(parts: list[Tensor], centred_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return two matrices that change the basis of the head's rows and of the hidden states, and mean squares.

    With A and B the matrices [D, D], row @ A and B @ state have the same product as row and state. In the new basis,
    directions are ordered by how much the logits vary along them, and the rows' mean square is 1 in each. The mean
    squares [D] are those of the states in the new basis. parts: the rows of the head, minus their mean, in several
    tensors. centred_ND: the states minus their mean.
    """
    D = centred_ND.shape[1]
    covariance = (centred_ND.t() @ centred_ND).double() / len(centred_ND)
    even = covariance.trace().clamp(min=1e-12) / D * torch.eye(D).double()
    value, vector = torch.linalg.eigh((1 - SHRINK) * covariance + SHRINK * even)
    spread = vector * value.sqrt()
    moment = torch.zeros(D, D, dtype=torch.float64)
    for part in parts:
        moment += (part.t() @ part).double()
    moment /= sum(map(len, parts))
    variance, turn = torch.linalg.eigh(spread.t() @ moment @ spread)
    variance, turn = variance.flip(0).clamp(min=1e-12), turn.flip(1)
    along = spread @ turn / variance.sqrt()
    back = torch.linalg.inv(along)
    size = (centred_ND @ back.t().float()).square().mean(0)
    return along.float(), back.float(), size
