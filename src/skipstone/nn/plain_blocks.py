"""The blocks of a decoder as one compiled call for a few tokens of one row (`ops/decode_stack.py`).

This is possible where blocks are plain: no mechanism, a gated MLP with a fixed activation, root-mean-square norms, and
weights in fp32 or int8 in a CPU's memory. `PlainBlocks` knows when anything has changed since it noted where they lie.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils.hooks import RemovableHandle

from skipstone.core.cache import RaggedStore
from skipstone.core.tokens import Tokens
from skipstone.nn.attention import Attention
from skipstone.nn.block import Block
from skipstone.nn.int8 import Int8Linear
from skipstone.nn.linear import OutputLinear
from skipstone.nn.mlp import FixedActivation, GatedMLP
from skipstone.nn.norm import OffsetRMSNorm, RMSNorm
from skipstone.ops import decode_stack, decode_step
from skipstone.ops.int8 import GROUP

Angles = tuple[Tensor, Tensor] | None
LINEAR = (nn.Linear, OutputLinear, Int8Linear)
NORMS = (RMSNorm, OffsetRMSNorm)
FUNCTIONS = ("silu", "gelu_tanh", "relu")
HOOKS = ("_forward_hooks", "_forward_pre_hooks")

KNOWN = "_known_stacks"  # attribute of a first block
MOST_KNOWN = 4  # the whole decoder, and drafts that leave out blocks


def run(
    blocks: Sequence[nn.Module], x_BTD: Tensor, tokens: Tokens, angles: Sequence[Angles], stores: Sequence[Any]
) -> Tensor | None:
    """Return the stream after all blocks, or None if these blocks, tokens or stores need the general way.

    angles: cos and sin of each block. stores: the cache's keys and values of each block, of type RaggedStore.
    """
    if x_BTD.shape[0] != 1 or x_BTD.shape[1] > decode_stack.MOST_TOKENS or not decode_step.takes(x_BTD):
        return None
    if not _plain(tokens) or not _even(stores, x_BTD.shape[1]):
        return None
    stacks = vars(blocks[0]).setdefault(KNOWN, _Known())
    name = tuple(map(id, blocks))
    if (stack := stacks.get(name)) is None or not stack.holds(stores[0]):
        if len(stacks) >= MOST_KNOWN:
            stacks.clear()
        stack = stacks[name] = PlainBlocks(blocks)
    if stack.sizes is None or not stack.reaches(stores, tokens):
        return None
    return stack.run(x_BTD, tokens, angles, stores)


class _Registered:
    """Counts what any module of the process has been given: parameters and submodules, by torch's own calls."""

    count = 0
    listening = False

    @classmethod
    def listen(cls) -> None:
        if not cls.listening:
            register_module_parameter_registration_hook(cls.note)
            register_module_module_registration_hook(cls.note)
            cls.listening = True

    @classmethod
    def note(cls, module: nn.Module, name: str, given: object) -> None:
        cls.count += 1

    @classmethod
    def now(cls) -> tuple[int, int]:
        """Return a value that changes with every registration, also of a hook."""
        return cls.count, RemovableHandle.next_id


class _Known(dict[tuple[int, ...], Any]):
    """Stacks of blocks by the ids of the blocks, which are noted anew after a copy."""

    def __deepcopy__(self, memo: object) -> _Known:
        return _Known()

    def __reduce__(self) -> tuple[type[_Known], tuple[()]]:
        return _Known, ()


def _plain(tokens: Tokens) -> bool:
    given = (tokens.rows, tokens.real_BT, tokens.document_BT, tokens.gain_BT, tokens.unpadding, tokens.forced_BT)
    return tokens.queries.is_all and all(x is None for x in given)


def _even(stores: Sequence[Any], new: int) -> bool:
    """Return whether all blocks hold the same tokens of one row, few enough for the compiled attention."""
    width = stores[0].width
    if not 0 < width + new - 1 < decode_step.MOST_KEYS or width == 0:
        return False
    return all(
        type(kv) is RaggedStore and kv.width == width and kv.lengths is None and len(kv.entries) == 3 for kv in stores
    )


class PlainBlocks:
    """Where the weights of blocks lie in memory.

    sizes: None if the blocks are not plain.
    """

    sizes: decode_stack.Sizes | None = None
    last: Any = None  # a weak reference to the first store of the text that was continued last

    def __init__(self, blocks: Sequence[Any]) -> None:
        _Registered.listen()
        self.registered, self.blocks = _Registered.now(), list(blocks)
        self.modules = [module for block in blocks for module in block.modules()]
        self.types = [type(module) for module in self.modules]
        self.hooks = [getattr(module, name) for module in self.modules for name in HOOKS]
        self.dicts, self.keys, self.values = zip(*_parts(self.modules), strict=True)
        self.tensors = [x for x in self.values if isinstance(x, Tensor)]
        if (sizes := _common(blocks)) is not None and not any(self.hooks) and self._settle():
            self.sizes = sizes
            self.windows = [block.self_attn.window for block in blocks]
            rows = [_row(block) for block in blocks]
            self.table_LC = torch.tensor(rows)
            self.config: Any = blocks[0].self_attn.config
        self.places = list(map(Tensor.data_ptr, self.tensors))
        self.memory = [x.data for x in self.tensors]  # stays where it is read, even if a weight gets another one
        self.first = [next(block.mlp.parameters()) for block in self.blocks]
        self.first_places = list(map(Tensor.data_ptr, self.first))

    def _settle(self) -> bool:
        """Return whether every weight can be read, after moving int8 ones next to each other."""
        if not all(decode_step.takes(x) or _is_int8(x) for x in self.tensors):
            return False
        if not all(x.is_contiguous() for x in self.tensors):
            return False
        if any(_is_int8(x) for x in self.tensors):
            for x, lying in zip(self.tensors, decode_stack.gather([x.data for x in self.tensors]), strict=True):
                x.data = lying
        return True

    def holds(self, store: RaggedStore) -> bool:
        """Return whether modules, weights and their places are those of before.

        All are looked at when a text begins, and where a module has been given a parameter, a module or a hook. While a
        text continues, which its store tells, one weight of each block is: whatever moves or casts a model moves all.
        """
        if any(block.training for block in self.blocks):
            return self.sizes is None
        last, registered = self.last, _Registered.now()
        if last is None or last() is not store or registered != self.registered:
            if not self._hold():
                return False
            self.last, self.registered = ref(store), registered
        return list(map(Tensor.data_ptr, self.first)) == self.first_places

    def _hold(self) -> bool:
        """Return whether everything is as before; in about half a millisecond for 30 blocks."""
        return (
            all(map(operator.is_, map(dict.get, self.dicts, self.keys), self.values))
            and list(map(Tensor.data_ptr, self.tensors)) == self.places
            and list(map(type, self.modules)) == self.types
            and (self.sizes is None or not any(self.hooks))
        )

    def reaches(self, stores: Sequence[Any], tokens: Tokens) -> bool:
        """Return whether every query sees all that is stored, by the settings of this call."""
        end = stores[0].width + tokens.length
        if self.config._attn_implementation != "sdpa" or tokens.slot_BT.shape[0] != 1:
            return False
        return all(window is None or end <= window for window in self.windows) and not any(
            kv.forgotten or kv.entries["key"].dtype != torch.float32 or kv.entries["key"].requires_grad for kv in stores
        )

    def run(self, x_BTD: Tensor, tokens: Tokens, angles: Sequence[Angles], stores: Sequence[Any]) -> Tensor | None:
        """Store the tokens and return the stream after all blocks; None for angles of a part of each head."""
        assert self.sizes is not None
        if any(turn is not None and turn[0].shape != (1, tokens.length, self.sizes.head_size) for turn in angles):
            return None
        memory: list[int] = []
        for kv, turn in zip(stores, angles, strict=True):
            column = kv.new_columns(tokens.length)
            memory += [kv.entries[name].data_ptr() for name in ("key", "value", "slot")]
            memory += (0, 0) if turn is None else [x.data_ptr() for x in turn]
        return decode_stack.run(x_BTD, self.table_LC, memory, tokens.slot_BT, column, self.sizes)


def _parts(modules: Sequence[nn.Module]) -> Iterator[tuple[Any, str, Any]]:
    """Yield what must stay the same: submodules, parameters, and that no forward is replaced; as dict, key, value."""
    for module in modules:
        for name, child in module._modules.items():
            yield module._modules, name, child
        for name, parameter in module._parameters.items():
            yield module._parameters, name, parameter
        yield vars(module), "forward", None


def _is_int8(x: Tensor) -> bool:
    return type(x) is nn.Parameter and x.dtype == torch.int8 and x.is_cpu


def _common(blocks: Sequence[Any]) -> decode_stack.Sizes | None:
    """Return what the blocks have in common; None if they are not plain or not alike."""
    found = {_sizes(block) if _is_plain(block) else None for block in blocks}
    return found.pop() if len(found) == 1 else None


def _is_plain(block: nn.Module) -> bool:
    if type(block) is not Block or block.routing_modules() or block.parallel or block.shared_norm:
        return False
    attention, mlp = block.self_attn, block.mlp
    if type(attention) is not Attention or type(mlp) is not GatedMLP or block.residual_scale != 1:
        return False
    if attention.soft_cap is not None or attention.norm_over_all_heads or block.training:
        return False
    norms = [norm for norm in _norms(block) if norm is not None]
    matrices, activation = _matrices(block), mlp.activation
    if type(activation) is not FixedActivation or activation.name not in FUNCTIONS:
        return False
    if not all(type(norm) in NORMS for norm in norms) or not all(type(matrix) in LINEAR for matrix in matrices):
        return False
    return all(not isinstance(m, Int8Linear) or m.in_features % GROUP == 0 for m in matrices)


def _norms(block: Any) -> list[Any]:
    attention = block.self_attn
    return [
        block.input_layernorm,
        block.attention_output_layernorm,
        block.post_attention_layernorm,
        block.mlp_output_layernorm,
        attention.q_norm,
        attention.k_norm,
    ]


def _matrices(block: Any) -> list[Any]:
    attention, mlp = block.self_attn, block.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _sizes(block: Any) -> decode_stack.Sizes | None:
    norms = {(type(norm), norm.eps) for norm in _norms(block) if norm is not None}
    if len(norms) != 1:
        return None
    kind: Any
    kind, eps = norms.pop()
    attention, E = block.self_attn, block.self_attn.head_dim
    return decode_stack.Sizes(
        width=attention.q_proj.in_features,
        neurons=block.mlp.up_proj.out_features,
        heads=attention.q_proj.out_features // E,
        groups=attention.k_proj.out_features // E,
        head_size=E,
        function=block.mlp.activation.name,
        eps=eps,
        offset=kind.offset,
        scaling=attention.scaling,
    )


def _row(block: Any) -> list[int]:
    """Return the block's row of the table, as `ops/decode_stack_native.py` lists its columns."""
    row = [0 if norm is None else norm.weight.data_ptr() for norm in _norms(block)]
    for matrix in _matrices(block):
        scale = matrix.weight_scale if isinstance(matrix, Int8Linear) else None
        bias = 0 if matrix.bias is None else matrix.bias.data_ptr()
        scales = 1 if scale is None else scale.numel() // len(scale)
        row += [matrix.weight.data_ptr(), 0 if scale is None else scale.data_ptr(), bias, scales]
    return row
