"""The depth map: which tokens of a text each block updates, by its depth mechanisms, and the loss of each prediction.

It is a table with one line for each token, block and mechanism; a `DepthMap` is the part of this table for some rows of
text. `skipstone trace` writes it, and the live page reads the same decisions (`read_decisions`) token by token.

Shape letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skipstone.core.records import DepthRecord, Records, of_kind
from skipstone.core.routing_module import causal_obstacle
from skipstone.measure.losses import token_nats
from skipstone.measure.passes import PASSES
from skipstone.model.causal_lm import IGNORED, SkipstoneForCausalLM
from skipstone.model.wrapped import require_ours
from skipstone.nn.block import Block

ROWS = 8  # rows of a forward pass


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """The decisions of one mechanism of one block in a forward pass; all tensors are [B, T] (rows, tokens) on the CPU.

    layer: index of the block. mechanism: the mechanism's name within the block; None for a block without depth
    mechanisms, which updates every token. score_BT: fp32, the router's score, which is compared with a threshold; NaN
    without a mechanism, and where the token did not reach it because another mechanism skipped it. weight_BT: fp32, the
    factor on the update that the mechanism wraps, 0 where the token skips it, 1 without a mechanism. kept_BT: bool,
    whether the token gets that update.
    """

    layer: int
    mechanism: str | None
    score_BT: Tensor
    weight_BT: Tensor
    kept_BT: Tensor


def read_decisions(blocks: Sequence[Block], records: Sequence[Records], shape: tuple[int, int]) -> list[Decisions]:
    """Return the decisions of every depth mechanism in a forward pass, ordered by block, then mechanism.

    blocks: the model's blocks. records: what the pass recorded, a dict by mechanism name for each block. shape: rows
    and tokens per row (B, T) of the pass. A block without depth mechanisms gets one entry with mechanism None, all
    tokens kept. A mechanism nested inside another that kept no token has no record; its entry keeps no token.
    """
    found = []
    for layer, (block, decided) in enumerate(zip(blocks, records, strict=True)):
        records_of = of_kind(decided, DepthRecord)
        names = [name for site in block.sites.values() for name in site]
        found += [_decisions(layer, name, records_of.get(name), shape) for name in names]
        if not names:
            whole = torch.ones(shape)
            unknown = torch.full(shape, float("nan"))
            found.append(
                Decisions(layer=layer, mechanism=None, score_BT=unknown, weight_BT=whole, kept_BT=whole.bool())
            )
    return found


def _decisions(layer: int, name: str, record: DepthRecord | None, shape: tuple[int, int]) -> Decisions:
    if record is None:
        score_BT, weight_BT, kept_BT = torch.full(shape, float("nan")), torch.zeros(shape), torch.zeros(shape).bool()
    else:
        score_BT, weight_BT, kept_BT = (
            x.float().expand(shape).cpu() for x in (record.score_BT, record.weight_BT, record.kept_BT)
        )
    return Decisions(layer=layer, mechanism=name, score_BT=score_BT, weight_BT=weight_BT, kept_BT=kept_BT.bool())


@dataclass(frozen=True, kw_only=True)
class DepthMap:
    """The decisions and losses of B consecutive rows of T tokens: one part of a depth map, the table of a whole text.

    first_row: index, in the text, of the first of these rows. ids_BT: token ids, int64. decisions: the decisions of
    every mechanism of every block, ordered by block, with tensors [B, T]. loss_BT: fp32, cross-entropy in nats of
    predicting the token that follows; NaN for the last token of the text. routing: "causal" if no decision looks at a
    later token, "oracle" if decisions look at the whole row.
    """

    first_row: int
    routing: str
    ids_BT: Tensor
    decisions: Sequence[Decisions]
    loss_BT: Tensor

    def lines(self, text_of: Callable[[int], str]) -> Iterator[tuple[object, ...]]:
        """Yield one tuple for each token, block and mechanism, ordered by row, token and block.

        The values of a tuple are: row, position in the row, text of the token, block index, mechanism name, score,
        weight, kept, loss, routing. The name is None for a block without depth mechanisms, and a score or loss that
        does not exist is None. text_of: returns the text of a token id.
        """
        names = {i: text_of(i) for i in self.ids_BT.unique().tolist()}
        ids, losses = self.ids_BT.tolist(), _numbers(self.loss_BT)
        columns = [
            (d.layer, d.mechanism, _numbers(d.score_BT), d.weight_BT.tolist(), d.kept_BT.tolist())
            for d in self.decisions
        ]
        for b, row in enumerate(ids):
            for t, token in enumerate(row):
                for layer, mechanism, score, weight, kept in columns:
                    place = (self.first_row + b, t, names[token], layer, mechanism)
                    yield (*place, score[b][t], weight[b][t], kept[b][t], losses[b][t], self.routing)


def _numbers(x_BT: Tensor) -> list[list[float | None]]:
    return [[None if value != value else value for value in row] for row in x_BT.tolist()]


@torch.no_grad()
def depth_maps(
    model: SkipstoneForCausalLM, ids: Sequence[int], context: int, done: Callable[[int], None] | None = None
) -> Iterator[DepthMap]:
    """Yield which blocks update each token of a text (its depth map), in parts of at most 8 rows.

    model: is run in the mode (training or evaluation) and on the device that it is in. ids: token ids of the text, cut
    into rows of `context` tokens; the last row may be shorter. done: called after each part with the number of tokens
    processed so far. Decisions look at no later token and blocks are really skipped, as in generation; a model that
    cannot decide this way looks at the whole row, as in training. Noise on router scores is off. Raises ValueError for
    an empty text, for a model that is not a Skipstone model, and for a model whose decisions the caller has to provide.
    """
    if not len(ids):
        raise ValueError("the text is empty: a depth map needs at least one token")
    require_ours(model)
    forward = PASSES["oracle" if causal_obstacle(model.routing_modules()) else "executed"]
    blocks = list(model.decoder.layers)
    whole = len(ids) // context * context
    parts = [(i, min(i + ROWS * context, whole)) for i in range(0, whole, ROWS * context)]
    parts += [(whole, len(ids))] if whole < len(ids) else []
    for start, stop in parts:
        length = min(context, stop - start)
        ids_BT = torch.tensor(ids[start:stop]).view(-1, length)
        target_BT = torch.tensor([*ids[start + 1 : stop + 1], *([IGNORED] if stop == len(ids) else [])]).view_as(ids_BT)
        out = forward.run(model, {"input_ids": ids_BT.to(model.device)}, output_records=True)
        assert out.logits is not None
        assert out.records is not None
        loss_BT = token_nats(out.logits, target_BT.to(model.device)).cpu()
        yield DepthMap(
            first_row=start // context,
            routing=forward.routing,
            ids_BT=ids_BT,
            decisions=read_decisions(blocks, out.records, (ids_BT.shape[0], length)),
            loss_BT=loss_BT.masked_fill(target_BT == IGNORED, float("nan")),
        )
        if done is not None:
            done(stop)
