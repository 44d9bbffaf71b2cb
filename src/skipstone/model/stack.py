"""Run a decoder's blocks in order, including segments: several blocks inside one mechanism.

A segment's mechanism wraps the update of a stack of blocks, as others wrap the update of one block:

    update(x, tokens) = block_j(... block_i(x, tokens) ...) - x

The mechanism is a module of the segment's first block (`Block.sites["segment"]`); the other blocks refer to that block.
Its decisions are returned in the records of every block of the segment, so that each block's records tell what the
block computed; the auxiliary loss and the carried state are returned with the first block alone.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor
from transformers.cache_utils import Cache

from skipstone.core.records import Records, carried, decisions_only
from skipstone.core.seam import wrap
from skipstone.core.tokens import Tokens
from skipstone.model.build import SEGMENT, Block, CompiledRun, runs_of
from skipstone.ops.reference import added

Rotation: TypeAlias = tuple[Tensor, Tensor]  # cos and sin of each token's angles
FORCED = "forced/"  # names in `Tokens.state` of the decisions that the caller imposes on blocks inside a segment


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The blocks of one forward pass, and what they need besides the tokens.

    blocks: the blocks, in their order. turn: a function that takes the name of a block's rotary angles ("row"; "window"
    for blocks with a window that have their own; or "none") and tokens (all of the call, or a selection), and returns
    these tokens' cos and sin, None for "none". forced: bool masks [B, T] of the tokens that blocks have to keep, by
    block index. cache: the KV cache, or None. recorded: whether records of decisions are wanted.
    """

    blocks: Sequence[Block]
    turn: Callable[[str, Tokens], Rotation | None]
    forced: Mapping[int, Tensor]
    cache: Cache | None
    recorded: bool = True

    def run(self, x_BTD: Tensor, tokens: Tokens) -> tuple[Tensor, list[Records]]:
        """Return the hidden states after the last block, [B, T, D], and the records of each block's decisions.

        x_BTD, tokens: hidden states and tokens before the first block. Records are dicts of decisions by mechanism
        name, one for each block; if `recorded` is False, they are empty for blocks that ran in one call compiled by
        numba.
        """
        records: list[Records] = []
        for blocks, compiled in self._runs(x_BTD, tokens):
            done = None if compiled is None else self._compiled(compiled, blocks, x_BTD, tokens)
            if done is None:
                done = self._general(blocks, x_BTD, tokens)
            x_BTD, decided, carry = done
            tokens = tokens.replace(state={**tokens.state, **carry}) if carry else tokens
            records += decided
        return x_BTD, records

    def _runs(self, x_BTD: Tensor, tokens: Tokens) -> list[tuple[range, CompiledRun | None]]:
        """Return consecutive ranges of blocks, each with the compiled call that computes it, or None without one."""
        if self.cache is None or self.forced or not self.blocks:
            return [(range(len(self.blocks)), None)]
        return runs_of(self.blocks, list(self._parts()), x_BTD, tokens, self._layers(range(len(self.blocks))))

    def _layers(self, blocks: range) -> list[Any]:
        assert self.cache is not None
        return [self.cache.layers[self.blocks[i].self_attn.layer_idx] for i in blocks]

    def _compiled(
        self, compiled: CompiledRun, blocks: range, x_BTD: Tensor, tokens: Tokens
    ) -> tuple[Tensor, list[Records], dict[str, Tensor]] | None:
        names = [self.blocks[i].turned_by for i in blocks]
        return compiled(x_BTD, tokens, self._layers(blocks), self.turn, names, self.recorded)

    def _general(self, blocks: range, x_BTD: Tensor, tokens: Tokens) -> tuple[Tensor, list[Records], dict[str, Tensor]]:
        """Run blocks one by one; return the stream, their records, and the tensors carried to later blocks, by name."""
        records: list[Records] = []
        crossing: dict[str, Tensor] = {}
        for part in self._parts():
            if part.start not in blocks:
                continue
            if self.blocks[part.start].sites[SEGMENT]:
                x_BTD, decided = self._segment(part, x_BTD, tokens)
            else:
                given = self.forced.get(part.start), self.blocks[0].turned_by
                x_BTD, decided = self._one(part.start, x_BTD, tokens, *given)
            if carry := carried(record for each in decided for record in each.values()):
                tokens, crossing = tokens.replace(state={**tokens.state, **carry}), {**crossing, **carry}
            records += decided
        return x_BTD, records, crossing

    def _parts(self) -> Iterator[range]:
        """Yield ranges of blocks that must run together: those of a segment, or one block."""
        at = 0
        while at < len(self.blocks):
            span = min(self.blocks[at].span, len(self.blocks) - at)  # a draft may end inside a segment
            yield range(at, at + span)
            at += span

    def _one(
        self, i: int, x_BTD: Tensor, tokens: Tokens, forced_BT: Tensor | None, turned_by: str
    ) -> tuple[Tensor, list[Records]]:
        """Run block `i` alone; return the stream after it and a list of its records.

        forced_BT: bool, the tokens that it has to keep, or None. turned_by: the name of the angles that `tokens` has.
        """
        rotary = tokens.rotary if self.blocks[i].turned_by == turned_by else self.turn(self.blocks[i].turned_by, tokens)
        if rotary is not tokens.rotary or forced_BT is not tokens.forced_BT:
            tokens = tokens.replace(rotary=rotary, forced_BT=forced_BT)
        x_BTD, decided = self.blocks[i](x_BTD, tokens, past_key_values=self.cache)
        return x_BTD, [decided]

    def _segment(self, part: range, x_BTD: Tensor, tokens: Tokens) -> tuple[Tensor, list[Records]]:
        """Run the blocks `part` of a segment inside its mechanisms; return the stream and the records of each block."""
        first = self.blocks[part.start]
        names, turned_by = first.sites[SEGMENT], self.blocks[part.start].turned_by
        inner = {f"{FORCED}{i}": self.forced[i].expand(x_BTD.shape[:2]) for i in part if i in self.forced}
        given = tokens.replace(
            rotary=self.turn(turned_by, tokens),
            forced_BT=self.forced.get(part.start),
            state={**tokens.state, **inner},
            memory=None if self.cache is None else self.cache.layers[first.self_attn.layer_idx],
        )

        def update(x: Tensor, tokens: Tokens) -> tuple[Tensor, Records]:
            start, found, tokens = x, Records(), tokens.replace(memory=None)
            for i in part:
                x, (decided,) = self._one(i, x, tokens, tokens.state.get(f"{FORCED}{i}"), turned_by)
                if carry := carried(decided.values()):
                    tokens = tokens.replace(state={**tokens.state, **carry})
                found |= {f"{i}/{name}": record for name, record in decided.items()}
            return x - start, found

        delta_BTD, found = wrap(update, [first.mechanisms[name] for name in names])(x_BTD, given)
        own = {name: found[name] for name in names if name in found}
        own |= {name: first.mechanisms[name].empty_record(x_BTD) for name in names if name not in own}
        records = []
        for i in part:
            prefix = f"{i}/"
            decided = {key.removeprefix(prefix): r for key, r in found.items() if key.startswith(prefix)}
            outer = own if i == part.start else {name: decisions_only(record) for name, record in own.items()}
            records.append({**outer, **self.blocks[i].complete(decided, x_BTD)})
        return added(x_BTD, delta_BTD), records
