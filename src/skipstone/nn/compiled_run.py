"""Consecutive blocks that run as one compiled call: its arguments, and the decisions that it returns.

Shape letters: B rows, T tokens, D width, G depth mechanisms (called gates here), A activations.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.core.lock import locked
from skipstone.core.records import ActivationRecord, DepthRecord, NeuronGroupsRecord, Records, decisions_only
from skipstone.core.stream_gate import Mixture, Scorer, StreamGate
from skipstone.core.tokens import Tokens
from skipstone.nn.block import SEGMENT, Block
from skipstone.nn.block_table import choice_of, choice_row, gate_tables, gates_of, program_of, states_of
from skipstone.nn.magnitude_mlp import MagnitudeMLP
from skipstone.nn.neuron_shares import NeuronShares
from skipstone.nn.store_places import Places, is_usual
from skipstone.ops import decode_stack, decode_step

BARE = {*vars(nn.Module())}  # what every module holds
KEPT_IN = (torch.float32, torch.float16)  # dtypes of the keys and values that compiled code reads
Angles = tuple[Tensor, Tensor] | None
PLACES = "compiled"  # name of a cache's notes about where its entries lie
Outcome = tuple[Tensor, list[Records], dict[str, Tensor]]


class CompiledRun:
    """Consecutive blocks that one call of compiled (numba) code runs for a few tokens, as in decoding.

    The tokens are several of one row, or one of each row. blocks: the blocks. sizes: the widths, head counts and
    constants that all of them share.
    """

    def __init__(self, blocks: Sequence[Block], sizes: decode_stack.Sizes) -> None:
        spans = [block.span if block.sites[SEGMENT] and block.segment_start() is None else 0 for block in blocks]
        self.blocks = blocks
        self.program, self.held = program_of(blocks, spans, sizes)
        with ExitStack() as stack:  # processes that begin together compile once: the others find it on disk
            with suppress(OSError), decode_stack.said_if_long(decode_stack.WAITING):  # OSError: a folder without locks
                stack.enter_context(locked(decode_stack.kept() / "step", wait=True))
            decode_stack.prepare(self.program)
        self.gates = [gate for _, _, gate in gates_of(blocks)]
        self.described = [gate.stream_gate() for gate in self.gates]
        self.choices = [choice_of(block) for block in blocks]
        self.shares = NeuronShares(blocks) if self.program.chooses else None
        routers = [block.mlp.router for block in blocks if isinstance(block.mlp, MagnitudeMLP)]
        self.deciders: list[nn.Module] = [*self.gates, *routers]
        self.watched = Watched(self.deciders)
        self.states = states_of(self.described)
        self.known = {each.state: g for g, each in enumerate(self.described) if each is not None and each.known}
        self.config = blocks[0].self_attn.config
        mixes = [block.mlp.activation.stream_mix() for block in blocks]
        self.mixes = [mix if isinstance(mix, Mixture) else None for mix in mixes]
        self.names = _names(blocks)

    def __call__(
        self,
        x_BTD: Tensor,
        tokens: Tokens,
        layers: Sequence[SkipstoneCacheLayer],
        turn: Callable[[str, Tokens], Angles],
        turned_by: Sequence[str],
        recorded: bool,
    ) -> Outcome | None:
        """Run the blocks: return the stream after them, the records of each, and the tensors carried to later blocks.

        Return None, with nothing changed, if compiled code cannot run this call. x_BTD: the stream before the blocks,
        one row or one token per row. layers: the cache layer of each block. turn: returns the cos and sin of the rotary
        angles of a given name for given tokens. turned_by: for each block, the name of its rotary angles. recorded:
        whether records are wanted; if not, they are empty dicts. Carried tensors are a dict by name.
        """
        (B, T), s = x_BTD.shape[:2], self.program.sizes
        if not self._reaches(tokens) or not self._knows_gates():
            return None
        angles = {name: turn(name, tokens) for name in dict.fromkeys(turned_by)}
        if any(each is not None and each[0].shape[1:] != (T, s.head_size) for each in angles.values()):
            return None
        if (places := self._places(layers, B, T)) is None:
            return None
        # one table of angles for each token, also if rows share them
        laid = {name: each and tuple([x.expand(B, -1, -1).contiguous() for x in each]) for name, each in angles.items()}
        turned = {name: (0, 0) if each is None else [x.data_ptr() for x in each] for name, each in laid.items()}
        memory_LM = places.memory([turned[name] for name in turned_by])
        state_SBT = None
        if self.states:
            state = {**tokens.state, **self._known(tokens)}
            state_SBT = torch.stack([state[name].expand(B, T) for name in self.states])
        ran = decode_stack.run(x_BTD, self.program, memory_LM, tokens.slot_BT, state_SBT, recorded)
        places.grow(ran.stored)
        if self.shares is not None and B * T == 1:
            self.shares.add(ran.stored)
        carry = {} if state_SBT is None else dict(zip(self.states, state_SBT, strict=True))
        carry = {name: state_BT for name, state_BT in carry.items() if name not in self.known}
        return ran.x_BTD, self._records(ran) if recorded else [{} for _ in self.blocks], carry

    def _reaches(self, tokens: Tokens) -> bool:
        """Return whether attention over stored keys in the order of slots is right: SDPA, behind earlier calls."""
        known = self.config._attn_implementation == "sdpa" and tokens.reach is not None
        return known and tokens.reach != tokens.length

    def _known(self, tokens: Tokens) -> dict[str, Tensor]:
        """Return 1 for the tokens that mechanisms keep by their ids and 0 for others, fp32 [B, T] by state's name."""
        return {str(name): self.gates[g].kept_by_ids(tokens).float() for name, g in self.known.items()}

    def _places(self, layers: Sequence[SkipstoneCacheLayer], rows: int, count: int) -> Places | None:
        """Return the addresses of the cache's entries after reserving room for `count` more tokens in each row.

        They are kept in the cache and reused while nothing else changes it. Return None if compiled code cannot extend
        the cache. layers: the cache layer of each block.
        """
        known = layers[0].scratch.get(PLACES)
        if isinstance(known, Places) and known.of is self and known.rows == rows and known.holds(count):
            return known
        kv = [layer.kv for layer in layers]
        sums = [
            None if x is None or x.decay is None else layer.store(x.name)
            for layer, x in zip(layers, self.mixes, strict=True)
        ]
        groups, size = self.program.sizes.groups, self.program.sizes.head_size
        entry = {"key": (groups, size), "value": (groups, size)}
        sum_of = [{} if mix is None else {"sum": (len(mix.context_bias) + 1,)} for mix in self.mixes]
        if not all(is_usual(x, entry, rows, KEPT_IN) for x in kv):
            return None
        if not all(x is None or is_usual(x, like, rows) for x, like in zip(sums, sum_of, strict=True)):
            return None
        for block, layer, store, more, like in zip(self.blocks, layers, kv, sums, sum_of, strict=True):
            layer.window = block.self_attn.window
            if not store.entries:
                layer.lazy_initialization(torch.empty(0, groups, 0, size), torch.empty(0, groups, 0, size))
            store.reserve(count, entry, rows, torch.float16 if block.self_attn.halves else torch.float32)
            if more is not None:
                more.reserve(count, like, rows)
        windows = [block.self_attn.window or 0 for block in self.blocks]
        found = layers[0].scratch[PLACES] = Places(self, kv, sums, windows)
        return found

    def _knows_gates(self) -> bool:
        """Update the tables of decisions from the modules that decide; return whether all still describe themselves.

        They are asked again only if a value held by one of their modules has been replaced, which is ten times as fast
        to check.
        """
        if not self.deciders or self.watched.unchanged():
            return True
        self.watched = Watched(self.deciders)
        described, choices = [gate.stream_gate() for gate in self.gates], [choice_of(block) for block in self.blocks]
        if any(gate is None for gate in described) or [x is None for x in choices] != [x is None for x in self.choices]:
            self.watched = Watched(())
            return False
        if any(a is not None and not _same(a, b) for a, b in zip(choices, self.choices, strict=True)):
            self.choices = choices
            table_LC = self.program.table_LC.clone()
            table_LC[:, -decode_stack.CHOICE :] = torch.tensor([choice_row(block) for block in self.blocks])
            self.program = self.program._replace(table_LC=table_LC)
        if not all(map(_same, described, self.described)):
            if not all(decode_step.takes(x) for gate in described for x in gate.tensors()):  # type: ignore[union-attr]
                self.watched = Watched(())
                return False
            gate_GC, number_GN = gate_tables(described)
            self.program = self.program._replace(gate_GC=gate_GC, number_GN=number_GN)
            self.described = described
        return True

    def _records(self, ran: decode_stack.Ran) -> list[Records]:
        """Return the records of each block by name, made from the results of a call."""
        assert ran.said_FGBT is not None
        assert ran.flag_2GBT is not None
        score, weight, loss, state = (x_GBT.unbind(0) for x_GBT in ran.said_FGBT.unbind(0))
        kept, reached = (x_GBT.unbind(0) for x_GBT in ran.flag_2GBT.unbind(0))
        made = []
        for g, gate in enumerate(self.described):
            assert gate is not None
            cost, own = None if gate.loss is None else loss[g], gate.state is not None and not gate.known
            carry = {str(gate.state): state[g]} if own else {}
            made.append(DepthRecord(score[g], kept[g], weight[g], reached[g], cost, carry))
        found: list[Records] = []
        for i, (names, mix) in enumerate(zip(self.names, self.mixes, strict=True)):
            records: Records = {name: made[g] if own else decisions_only(made[g]) for name, (g, own) in names.items()}
            if mix is not None:
                assert ran.logit_LBTA is not None
                assert ran.fed_LBT is not None
                records[mix.name] = ActivationRecord(ran.logit_LBTA[i], ran.fed_LBT[i])
            if (choice := self.choices[i]) is not None:
                records[choice.name] = self._chosen(ran, i, choice.size)
            found.append(records)
        return found

    def _chosen(self, ran: decode_stack.Ran, i: int, size: int) -> NeuronGroupsRecord:
        """Return the record of which neuron groups the MLP of block `i` kept, from the results of a call.

        size: the number of neurons per group.
        """
        assert ran.score_LN is not None
        assert ran.mark_2LN is not None
        assert ran.fed_LBT is not None
        reached_BT, shape = ran.fed_LBT[i], (*ran.fed_LBT.shape[1:], -1)
        count = reached_BT.numel() * self.program.sizes.neurons // size
        score_BTG, tried_BTG, kept_BTG = (x_N[:count].view(shape) for x_N in (ran.score_LN[i], *ran.mark_2LN[:, i]))
        score_BTG = score_BTG.masked_fill(~reached_BT[..., None], float("nan"))
        tried_BTG, kept_BTG = (on_BTG & reached_BT[..., None] for on_BTG in (tried_BTG, kept_BTG))
        record = NeuronGroupsRecord(score_BTG, kept_BTG, reached_BT, tried_BTG)
        mlp = cast("MagnitudeMLP", self.blocks[i].mlp)
        price_BT = mlp.router.price(score_BTG)  # scores are the magnitudes where there is a price
        return record if price_BT is None else record._replace(loss_BT=torch.where(reached_BT, price_BT, 0.0))


class Watched:
    """A snapshot of the values that modules hold besides other modules: options, numbers, parameters and buffers.

    modules: the modules to watch, with all their submodules. What a caller has derived from the values stays valid as
    long as `unchanged()` returns True. The contents of tensors may change, because every decoding step reads them.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        dicts = [
            (values, values.keys() - BARE)
            for module in modules
            for each in module.modules()
            for values in (vars(each), each._parameters, each._buffers)
        ]
        self.dicts = [values for values, names in dicts for _ in names]
        self.names = [name for _, names in dicts for name in names]
        self.values = [values[name] for values, names in dicts for name in names]
        self.sized, self.sizes = [values for values, _ in dicts], [len(values) for values, _ in dicts]
        self.any = bool(modules)

    def unchanged(self) -> bool:
        """Return whether the modules hold the very objects of the snapshot, and no others; False without modules.

        Compared are their attributes, parameters and buffers, by identity.
        """
        return (
            self.any
            and all(map(operator.is_, map(dict.get, self.dicts, self.names), self.values))
            and list(map(len, self.sized)) == self.sizes
        )


def _names(blocks: Sequence[Block]) -> list[dict[str, tuple[int, bool]]]:
    """Return for each block {record name: (g, own)}: the mechanism that makes the record, by its index in `gates_of`.

    own: True for a mechanism of the block itself, False for one around the segment to which the block belongs.
    """
    gates = list(enumerate(gates_of(blocks)))
    found: list[dict[str, tuple[int, bool]]] = []
    around: dict[str, tuple[int, bool]] = {}
    for i, block in enumerate(blocks):
        own = {gate.placement.name: (g, True) for g, (index, _, gate) in gates if index == i}
        if block.segment_start() is None:
            around = {name: (own[name][0], False) for name in block.sites[SEGMENT]}
        found.append({**around, **own} if block.sites[SEGMENT] else own)
    return found


def _same(one: StreamGate | Scorer | Any, other: StreamGate | Scorer | Any) -> bool:
    """Return whether two descriptions have equal values and the very same tensors."""
    for a, b in zip(one, other, strict=True):
        if a is b:
            continue
        if isinstance(a, tuple) and isinstance(b, tuple):
            if not _same(a, b):
                return False
        elif isinstance(a, Tensor) or isinstance(b, Tensor) or a != b:
            return False
    return True
