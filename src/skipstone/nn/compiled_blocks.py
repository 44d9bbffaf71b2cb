"""The blocks of a decoder as calls of compiled (numba) code for a few tokens (`ops/decode_stack.py`).

Consecutive blocks that the code can run (`nn/block_table.py`) share a call; the others run as usual. `CompiledBlocks`
notes the addresses of weights, and finds out in each step whether anything has changed since.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils.hooks import RemovableHandle

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.core.depth import DepthModule
from skipstone.core.ragged_store import RaggedStore
from skipstone.core.tokens import Tokens
from skipstone.core.weights import hooks_on_all_modules
from skipstone.nn.block import SEGMENT, Block
from skipstone.nn.block_table import layouts_of, sizes_of
from skipstone.nn.compiled_run import CompiledRun
from skipstone.nn.formats import is_stored
from skipstone.ops import decode_stack, decode_step

HOOKS = ("_forward_hooks", "_forward_pre_hooks")

KNOWN = "_known_stacks"  # attribute of a first block
MOST_KNOWN = 4  # the whole decoder, and drafts that leave out blocks
NOTING = threading.Lock()  # noting moves quantised weights, so threads take turns
# Attributes of modules that decide what a block computes, besides its weights and what mechanisms say of themselves.
SETTINGS = (
    "training", "forward", "eps", "scaling", "soft_cap", "window", "head_dim", "norm_over_all_heads", "name",
    "function", "functions", "sizes", "parallel", "shared_norm", "residual_scale", "layer_idx", "skips",
)  # fmt: skip


def runs_of(
    blocks: Sequence[Block],
    spans: Sequence[range],
    x_BTD: Tensor,
    tokens: Tokens,
    layers: Sequence[SkipstoneCacheLayer],
) -> list[tuple[range, CompiledRun | None]]:
    """Return consecutive ranges of blocks, each with the compiled call that computes it, or None if it runs uncompiled.

    blocks: the decoder's blocks. spans: ranges of blocks that must stay together: a segment (blocks that a mechanism
    skips as a whole) or one block. x_BTD: the residual stream before the first block; compiled code takes at most 16
    tokens, of one row or one of each row. tokens: the tokens of this call. layers: the cache layer of each block.
    """
    general: list[tuple[range, CompiledRun | None]] = [(range(len(blocks)), None)]
    B, T = x_BTD.shape[:2]
    if min(B, T) != 1 or B * T > decode_stack.MOST_TOKENS or not decode_step.takes(x_BTD):
        return general
    if not _plain(tokens) or type(store := getattr(layers[0], "kv", None)) is not RaggedStore:
        return general
    # A copied block may still write where the original does.
    if len(set(map(id, layers))) < len(layers) or hooks_on_all_modules():
        return general
    stack = _noted(blocks, spans, store)
    return stack.runs if stack.served else general


def _noted(blocks: Sequence[Block], spans: Sequence[range], store: RaggedStore) -> CompiledBlocks:
    """Return the `CompiledBlocks` of these blocks, built anew if modules, settings or addresses have changed.

    spans is as in `runs_of`. store: the first block's stored keys and values.
    """
    stacks, name = blocks[0].__dict__.setdefault(KNOWN, _Known()), tuple(map(id, blocks))
    stack: CompiledBlocks | None = stacks.get(name)
    if stack is not None and stack.holds(store):
        return stack
    with NOTING:
        stack = stacks.get(name)  # another thread may have noted them meanwhile
        if stack is None or not stack.holds(store):
            if len(stacks) >= MOST_KNOWN:
                stacks.clear()
            stack = stacks[name] = CompiledBlocks(blocks, spans)
    return stack


class _Registered:
    """A process-wide count of the parameters, buffers and modules that were registered on any torch module."""

    count = 0
    listening = False

    @classmethod
    def listen(cls) -> None:
        if not cls.listening:
            register_module_parameter_registration_hook(cls.note)
            register_module_buffer_registration_hook(cls.note)
            register_module_module_registration_hook(cls.note)
            cls.listening = True

    @classmethod
    def note(cls, module: nn.Module, name: str, given: object) -> None:
        cls.count += 1

    @classmethod
    def now(cls) -> tuple[int, int]:
        """Return two numbers that change whenever a parameter, buffer, module or hook is registered on any module."""
        return cls.count, RemovableHandle.next_id


class _Known(dict[tuple[int, ...], Any]):
    """The `CompiledBlocks` of lists of blocks, by the ids of the blocks; a copy or pickle of it is empty."""

    def __deepcopy__(self, memo: object) -> _Known:
        return _Known()

    def __reduce__(self) -> tuple[type[_Known], tuple[()]]:
        return _Known, ()


def _plain(tokens: Tokens) -> bool:
    given = (tokens.rows, tokens.real_BT, tokens.document_BT, tokens.gain_BT, tokens.unpadding, tokens.forced_BT)
    mode = tokens.mode
    if mode.routing != "causal" or mode.noise or mode.executor != "gathered" or mode.never_empty:
        return False
    return tokens.queries.is_all and all(x is None for x in given)


class CompiledBlocks:
    """Everything needed to run a decoder's blocks in compiled calls, such as their weights' addresses.

    blocks: the decoder's blocks. spans: ranges of blocks that must run together: a segment (blocks that mechanisms skip
    as a whole) or one block. runs: pairs of a range of blocks and the compiled call that computes it, or None if it
    runs uncompiled. served: whether any range is compiled. Building it moves quantised weights next to each other in
    memory.
    """

    served = False
    last: Any = None  # a weak reference to the first store of the text that was continued last

    def __init__(self, blocks: Sequence[Block], spans: Sequence[range]) -> None:
        _Registered.listen()
        self.registered, self.blocks = _Registered.now(), list(blocks)
        self.modules = [module for block in blocks for module in block.modules()]
        self.types = [type(module) for module in self.modules]
        self.hooks = [getattr(module, name) for module in self.modules for name in HOOKS]
        self.dicts, self.keys, self.values = zip(*_parts(self.modules), strict=True)
        ranges = list(_ranges(blocks, spans))
        served = [blocks[i] for part, sizes in ranges if sizes is not None for i in part]
        read = [x for block in served for x in block.parameters()]
        changed = any(self.hooks) or any("forward" in vars(module) for module in self.modules)
        if not changed and read and self._settle(list(dict.fromkeys(read)), layouts_of(served)):
            self.runs = [
                (part, None if sizes is None else CompiledRun(blocks[part.start : part.stop], sizes))
                for part, sizes in ranges
            ]
            self.served = True
        self.tensors = [x for x in self.values if isinstance(x, Tensor)]
        self.places = list(map(Tensor.data_ptr, self.tensors))
        self.memory = [x.data for x in self.tensors]  # stays where it is read, even if a weight gets another one

    def _settle(self, weights: Sequence[Tensor], layouts: Mapping[int, bool]) -> bool:
        """Move quantised weights next to each other in memory; return whether compiled code can read every weight.

        weights: the parameters of the blocks. layouts: what `layouts_of` returned for the blocks.
        """
        if not all(decode_step.takes(x) or (is_stored(x) and x.is_cpu) for x in weights):
            return False
        if not all(x.is_contiguous() or id(x) in layouts for x in weights):
            return False
        turned = [layouts.get(id(x), False) for x in weights]
        found = [decode_stack.lay(x.data, as_inputs) for x, as_inputs in zip(weights, turned, strict=True)]
        if any(is_stored(x) for x in weights):
            views = [x.t() if as_inputs else x for x, as_inputs in zip(found, turned, strict=True)]
            lying = zip(decode_stack.gather(views), turned, strict=True)
            found = [x.t() if as_inputs else x for x, as_inputs in lying]
        for x, lies in zip(weights, found, strict=True):
            if x.data_ptr() != lies.data_ptr():
                x.data = lies
        return True

    def holds(self, store: RaggedStore) -> bool:
        """Return whether modules, settings and the addresses of weights are as they were when this object was built.

        store: the first block's store of keys and values; if it is not the one of the last call, a new text begins.
        Classes and hooks are compared only when a text begins, and after a parameter, module or hook was registered on
        any module of the process. Everything else is compared in every call, which takes about 0.2 ms for 30 blocks.
        """
        last, registered = self.last, _Registered.now()
        if last is None or last() is not store or registered != self.registered:
            if list(map(type, self.modules)) != self.types or (self.served and any(self.hooks)):
                return False
            self.last, self.registered = ref(store), registered
        return (
            all(map(operator.is_, map(dict.get, self.dicts, self.keys), self.values))
            and list(map(Tensor.data_ptr, self.tensors)) == self.places
        )


def _ranges(blocks: Sequence[Block], spans: Sequence[range]) -> Iterator[tuple[range, decode_stack.Sizes | None]]:
    """Yield the longest ranges of consecutive spans whose blocks have the same sizes, each with these sizes.

    Sizes are None for a range that compiled code cannot run. spans is as in `runs_of`.
    """
    found = [(span, _sizes(blocks, span)) for span in spans]
    for sizes, group in groupby(found, key=lambda each: each[1]):
        parts = [span for span, _ in group]
        yield range(parts[0].start, parts[-1].stop), sizes


def _sizes(blocks: Sequence[Block], span: range) -> decode_stack.Sizes | None:
    first = blocks[span.start]
    if any(name not in first.mechanisms for name in first.sites[SEGMENT]):  # the first block of its segment is left out
        return None
    return sizes_of(blocks[span.start : span.stop])


def _parts(modules: Sequence[nn.Module]) -> Iterator[tuple[Any, str, Any]]:
    """Yield everything in these modules on which compiled code relies, as (dict, key, value).

    That is: submodules, parameters, buffers, and the attributes in `SETTINGS`; value is what the dict held under the
    key.
    """
    for module in modules:
        for name, child in module._modules.items():
            yield module._modules, name, child
        for name, parameter in module._parameters.items():
            yield module._parameters, name, parameter
        for name, buffer in module._buffers.items():
            yield module._buffers, name, buffer
        named = SETTINGS if isinstance(module, DepthModule) else (*SETTINGS, "config")  # mechanisms tell in every step
        for name in named:
            if name in vars(module) or name == "forward":
                yield vars(module), name, vars(module).get(name)
