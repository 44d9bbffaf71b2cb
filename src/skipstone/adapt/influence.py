"""How much each block changes the residual stream of a text (its influence), and the choice of blocks by this number.

Shape letters: B rows, T tokens, D width, N tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from skipstone.core.strict import PlainMapping, unknown
from skipstone.data.rows import Row
from skipstone.measure.passes import inputs_of, real_tokens
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.layers import parse_layers

SCORE = "block_influence"
SCORE_KEYS = ("score", "count", "among")


@torch.no_grad()
def site_streams(model: SkipstoneForCausalLM, rows: Sequence[Row]) -> Iterator[list[dict[str, tuple[Tensor, Tensor]]]]:
    """Yield for each batch the residual stream of a dense model before and after every block, attention and MLP.

    model: dense. rows: the batches, each with its tensors by name. Each batch gives a list over blocks; its entries map
    "block", "attention" and "mlp" to a pair of tensors [N, D], for the N tokens of the batch that are not padding.
    """
    seen: list[Tensor] = []
    blocks = model.model.layers
    hooks = [block.register_forward_hook(lambda _, args, out: seen.extend((args[0], out[0]))) for block in blocks]
    last = [block.attention_output_layernorm or block.self_attn for block in blocks]
    hooks += [module.register_forward_hook(lambda _, args, out: seen.append(out)) for module in last]
    try:
        for row in rows:
            seen.clear()
            inputs = inputs_of(row, model.device)
            model(**inputs, use_cache=False, logits_to_keep=1)
            real_BT = real_tokens(inputs)
            found = []
            for block, a_BTD, x_BTD, y_BTD in zip(blocks, seen[::3], seen[1::3], seen[2::3], strict=True):
                a_ND, before, after = block.residual_scale * a_BTD[real_BT], x_BTD[real_BT], y_BTD[real_BT]
                between = before + a_ND
                mlp = (before, after - a_ND) if block.parallel else (between, after)
                found.append({"block": (before, after), "attention": (before, between), "mlp": mlp})
            yield found
    finally:
        for hook in hooks:
            hook.remove()


def token_influence(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    """Return 1 - cos(x, y) for each token, fp32 [N]: by how much a block changes the direction of its residual stream.

    x_ND, y_ND: the residual stream of N tokens before and after the block.
    """
    return 1 - F.cosine_similarity(x_ND.float(), y_ND.float(), dim=-1)


def block_influence(model: SkipstoneForCausalLM, rows: Sequence[Row]) -> list[float]:
    """Return the influence of each block on the residual stream: the mean over tokens of 1 - cos(x_in, x_out).

    It is the score of ShortGPT (arXiv 2403.03853, equation 1): 0 for a block that only scales the stream. Values have 6
    decimals. model: dense. rows: batches of text to measure on, each with its tensors by name.
    """
    sums = torch.zeros(len(model.model.layers), dtype=torch.float64)
    count = 0
    for batch in site_streams(model, rows):
        sums += torch.stack([token_influence(*sites["block"]).double().sum().cpu() for sites in batch])
        count += len(batch[0]["block"][0])
    return [round(value, 6) for value in (sums / count).tolist()]


def wants_score(layers: object) -> bool:
    """Return whether the value `layers` of an option asks for blocks by their influence, which a mapping does."""
    return isinstance(layers, Mapping)


def choose_layers(layers: PlainMapping, scores: Sequence[float], where: str) -> list[int]:
    """Return the indices of the blocks of least influence that an option `layers` asks for, ascending.

    layers: {score: block_influence, count: N, among: PATTERN}; N blocks are chosen among those that the pattern names,
    such as "1::2" (default: all). scores: the influence of each block. where: name of the option, for messages. Raises
    ValueError for other keys, another score, and a count below 1 or above the number of blocks to choose from.
    """
    for key in layers:
        if key not in SCORE_KEYS:
            raise ValueError(unknown(f"key in {where}", key, SCORE_KEYS))
    if layers.get("score") != SCORE:
        raise ValueError(unknown(f"{where}.score", layers.get("score"), [SCORE]))
    among = parse_layers(layers.get("among", ":"), len(scores), f"{where}.among")
    count = layers.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= len(among):
        raise ValueError(f"{where}.count must be a number of blocks from 1 to {len(among)}, got {count!r}")
    return sorted(sorted(among, key=lambda i: (scores[i], i))[:count])


def table(scores: Sequence[float], chosen: Mapping[str, Sequence[int]]) -> str:
    """Return a table of the blocks as text, ordered by influence on the residual stream, the largest first.

    scores: the influence of each block. chosen: {purpose: indices of the blocks chosen for it}, such as {"drop_layers":
    [3, 5]}; the last column shows the purposes of a block.
    """
    lines = ["block  influence  chosen for"]
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        marks = ", ".join(name for name, layers in chosen.items() if i in layers)
        lines.append(f"{i:5d}  {scores[i]:9.4f}  {marks}".rstrip())
    return "\n".join(lines)
