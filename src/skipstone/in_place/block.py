"""A decoder block of another library wrapped in depth mechanisms.

The block itself is called with the kept tokens only. Keys and values of skipped tokens are computed by a run that ends
in the block's attention (see `keys`), so that the model's own cache and masks can be used. Gates scale the whole update
of a block, because its sub-layers are not known.

Shape letters: B rows, T tokens of the call, L tokens that reach the block, K tokens of a selection, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from skipstone.core.depth import DepthModules
from skipstone.core.records import Records
from skipstone.core.seam import wrap
from skipstone.core.selection import InPlace, Selection, WholeRows
from skipstone.core.strict import PlainDict
from skipstone.core.tokens import Tokens
from skipstone.in_place.arguments import Signature, Subset, causal_mask, for_tokens, masks_of
from skipstone.in_place.keys import Catching, Joining, Pair, keys_of
from skipstone.nn.routed import without_keys
from skipstone.ops.reference import wide

TOLERANCE, LOW_TOLERANCE = 1e-4, 0.05  # errors relative to the largest update


class Owner(Protocol):
    """The interface of the object that holds all routed blocks (`RoutedDecoder`), as a `RoutedBlock` uses it.

    verifying: whether each block compares its result with the result of computing all tokens. tokens_at: returns the
    tokens of a block's call. note: stores the records of a block, which say what its mechanisms decided.
    """

    @property
    def verifying(self) -> bool: ...
    def tokens_at(self, routed: RoutedBlock, x_BTD: Tensor, cache: Any) -> Tokens: ...
    def note(self, layer: int, records: Records) -> None: ...


class RoutedBlock:
    """A replacement for the `forward` of another library's decoder block that runs the block inside depth mechanisms.

    decoder: the object that holds all routed blocks. layer: the block's index. block: the module, whose `forward` is
    replaced. signature: the signature of its original forward. mechanisms: the depth mechanisms, the first outermost,
    which become the block's child module "mechanisms".
    """

    def __init__(
        self, decoder: Owner, layer: int, block: nn.Module, signature: Signature, mechanisms: DepthModules
    ) -> None:
        self.decoder, self.layer, self.block = decoder, layer, block
        self.signature = signature
        self.rest: tuple[object, ...] | None = None  # what the block returns besides the stream
        self._before = block.__dict__.get("forward")  # set by a hook, for example
        block.add_module("mechanisms", mechanisms)
        block.forward = self.forward  # type: ignore[method-assign]

    @property
    def mechanisms(self) -> DepthModules:
        """The depth mechanisms of the block, by name."""
        found = self.block.mechanisms
        assert isinstance(found, DepthModules)
        return found

    @property
    def _original(self) -> Callable[..., Any]:
        """The block's own forward, looked up anew: a pickled bound method would become the one that replaced it."""
        return MethodType(type(self.block).forward, self.block) if self._before is None else self._before

    def undo(self) -> None:
        """Restore the block's original forward and remove the mechanisms.

        Raises ValueError if other code has replaced the block's `forward` since.
        """
        if getattr(self.block.__dict__.get("forward"), "__self__", None) is not self:
            raise ValueError(f"block {self.layer} was wrapped after it was routed; undo that first")
        del self.block._modules["mechanisms"]
        del self.block.__dict__["forward"]
        if self._before is not None:
            self.block.forward = self._before

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the block inside its mechanisms, and return what the block itself would return.

        hidden_states: [B, T, D]. args, kwargs: the block's other arguments. Raises ValueError for alibi biases, for
        reentrant activation checkpointing, and if the mechanisms skip keys that the model's own cache needs.
        """
        arguments = self.signature.named(self.block, hidden_states, args, kwargs)
        cache = arguments.pop(self.signature.cache_name, None)
        if arguments.get("alibi") is not None:
            raise ValueError("alibi is not supported: its bias is for whole rows and cannot be gathered by token")
        tokens = self.decoder.tokens_at(self, hidden_states, cache)
        if getattr(self.block, "gradient_checkpointing", False) and self.block.training:
            run = partial(self._recomputed, tokens, arguments)
            checkpoint: Any = self.block._gradient_checkpointing_func
            if getattr(checkpoint, "keywords", {}).get("use_reentrant", False):
                raise ValueError("use_reentrant=True loses the losses of routed blocks; use use_reentrant=False")
            stream, rest, records = checkpoint(run, hidden_states)
        else:
            stream, rest, records = self._run(tokens, arguments, hidden_states, cache)
        self.decoder.note(self.layer, records)
        return stream if rest is None else (stream, *rest)

    def _recomputed(self, tokens: Tokens, arguments: PlainDict, x_BTD: Tensor) -> Any:
        """Run the block inside its mechanisms as one activation checkpoint, with the block's own checkpointing off.

        The block's own would leave out the run that computes keys and values of skipped tokens. Returns what `_run`
        returns.
        """
        self.block.gradient_checkpointing = False  # type: ignore[assignment]
        try:
            return self._run(tokens, arguments, x_BTD, None)
        finally:
            self.block.gradient_checkpointing = True  # type: ignore[assignment]

    def _run(
        self, tokens: Tokens, arguments: PlainDict, x_BTD: Tensor, cache: Any
    ) -> tuple[Tensor, tuple[object, ...] | None, Records]:
        twin = copy.deepcopy(cache) if self.decoder.verifying else None
        delta_BTD, records = self._inside(tokens, arguments, x_BTD, cache)
        if self.decoder.verifying:
            all_computed = tokens.replace(mode=replace(tokens.mode, executor="masked"))
            self._compare(delta_BTD, self._inside(all_computed, arguments, x_BTD, twin)[0])
        return (x_BTD + delta_BTD).to(x_BTD.dtype), self.rest, records

    def _inside(self, tokens: Tokens, arguments: PlainDict, x_BTD: Tensor, cache: Any) -> tuple[Tensor, Records]:
        """Return the block's update inside its mechanisms, [B, T, D], and the records by name.

        arguments: the block's arguments by name, without hidden states and cache. Raises ValueError if the cache did
        not get the keys of all tokens.
        """
        call = BlockCall(self, tokens, arguments, cache, x_BTD.shape[:2])
        result = wrap(call.update, self.mechanisms.values())(x_BTD, tokens)
        if cache is not None and not call.stored:
            raise ValueError(
                f"block {self.layer}: kv 'kept' leaves no keys of skipped tokens, which the model's own cache cannot "
                "express; use kv 'full', or pass use_cache=False"
            )
        return result

    def _compare(self, delta_BTD: Tensor, expected_BTD: Tensor) -> None:
        """Raise ValueError if an update computed with skipping differs from `expected_BTD`, computed for all tokens.

        The largest error may be 1e-4 of the largest update, or .05 of it for blocks in less than 32 bits.
        """
        low = torch.finfo(self._dtype).bits < 32
        error, size = (delta_BTD - expected_BTD).abs().max(), expected_BTD.abs().max()
        if not error <= (LOW_TOLERANCE if low else TOLERANCE) * size:
            raise ValueError(
                f"block {self.layer} ({type(self.block).__name__}) computes something else for some of its tokens than "
                f"for all (by {float(error / size):.1e} of its update), so it cannot be routed exactly"
            )

    @property
    def _dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.block.parameters() if p.is_floating_point())

    def call(self, x: Tensor, arguments: PlainDict, cache: Any) -> Tensor:
        """Call the original block without mechanisms, and return the residual stream, shaped as x.

        x: hidden states of some tokens. arguments: the other arguments by name. cache: the key-value cache, or None.
        Raises ValueError if the block does not return hidden states of the shape of x, alone or first in a tuple.
        """
        out = self._original(x, **arguments, **{self.signature.cache_name: cache})
        if isinstance(out, tuple):
            out, self.rest = out[0], tuple(None if isinstance(v, Tensor) else v for v in out[1:])
        if not isinstance(out, Tensor) or out.shape != x.shape:
            got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"block {self.layer} ({type(self.block).__name__}) must return a stream of its input's shape "
                f"{list(x.shape)}, got {got}"
            )
        return out


class BlockCall:
    """One call of a routed block; its method `update` is what the mechanisms wrap.

    routed: the block. tokens: all tokens of the call, stored in the attribute `whole`. arguments: the block's arguments
    by name, without hidden states and cache. cache: the model's key-value cache, or None. shape: (B, T). stored:
    whether keys and values of all tokens have been put into the cache.
    """

    def __init__(
        self, routed: RoutedBlock, tokens: Tokens, arguments: PlainDict, cache: Any, shape: torch.Size
    ) -> None:
        self.routed, self.whole, self.arguments, self.cache, self.shape = routed, tokens, arguments, cache, shape
        self.stored = False  # whether keys and values of all tokens were stored in the cache

    def update(self, x_BLD: Tensor, tokens: Tokens) -> tuple[Tensor, Records]:
        """Return what the block adds to the residual stream, [B, L, D], and an empty dict, as it decides nothing.

        x_BLD: hidden states of the L tokens per row that reach the block. tokens: these tokens; the update is computed
        for `tokens.queries` and multiplied by `tokens.gain_BT`, and 0 for all others.
        """
        narrowed = tokens.slot_BT is not self.whole.slot_BT
        arguments, part = self._reaching(tokens) if narrowed else self.arguments, tokens.queries
        if (
            tokens.real_BT is not None and tokens.real_BT is not self.whole.real_BT
        ):  # other tokens must not serve as keys
            close = partial(self._closed, tokens.real_BT, x_BLD)
            arguments = masks_of(arguments, close)
        if narrowed or arguments is not self.arguments:  # the model's cache needs keys of all tokens
            cache = None
        else:
            cache, self.stored = self.cache, True
        if part.is_all or isinstance(part, InPlace):
            out = self.routed.call(x_BLD, arguments, cache)
            delta = part.scatter(wide(out) - wide(x_BLD))
        elif tokens.no_queries:
            if cache is not None:
                found = self._keys(x_BLD, arguments)
                cache.update(*found.caught, *found.handed[0], **found.handed[1])
            delta = torch.zeros_like(wide(x_BLD))
        else:
            delta = part.scatter(self._gathered(x_BLD, tokens, arguments, part))
        if tokens.gain_BT is not None:
            delta = delta * tokens.gain_BT[..., None].to(delta.dtype)
        return delta, {}

    def _reaching(self, tokens: Tokens) -> PlainDict:
        """Return the block's arguments for `tokens`, those that an outer mechanism kept; others are not keys either."""
        index_BK = (tokens.slot_BT - self.whole.slot_BT[:, :1]).expand(self.shape[0], -1)
        return for_tokens(self.arguments, Subset(self.shape, index_BK=index_BK), keys_too=True)

    def _closed(self, real_BL: Tensor, x_BLD: Tensor, mask: Tensor | None) -> Tensor | None:
        if mask is None and self.whole.mode.executor == "gathered" and x_BLD.shape[1] < self.shape[1]:
            return None  # padding comes last in a row, after every query
        return without_keys(causal_mask(mask, x_BLD.shape[1], x_BLD.device), real_BL.expand(x_BLD.shape[:2]))

    def _keys(self, x: Tensor, arguments: PlainDict) -> Catching:
        """Return a `Catching` cache with the keys and values of these tokens.

        x: their hidden states. arguments: the block's arguments by name, for these tokens.
        """
        given = {**arguments, "attention_mask": None}
        return keys_of(self.routed.block, f"block {self.routed.layer}", partial(self._hand_over, x, given), self.cache)

    def _hand_over(self, x: Tensor, arguments: PlainDict, catching: Catching) -> None:
        self.routed.call(x, arguments, catching)

    def _gathered(self, x_BLD: Tensor, tokens: Tokens, arguments: PlainDict, part: Selection) -> Tensor:
        """Return the update of the tokens of `part`, [B, K, D], or for whole rows [R, L, D]; others are keys only.

        arguments: the block's arguments by name, for the L tokens of x_BLD.
        """
        shape = x_BLD.shape[:2]
        others = _rest_of(part, tokens)
        subset = partial(Subset.of, shape=shape, device=x_BLD.device)
        kept = arguments if isinstance(part, WholeRows) else masks_of(arguments, self._square(shape[1], x_BLD.device))
        given = for_tokens(kept, subset(part))
        caught = self._keys(others.gather(x_BLD), for_tokens(arguments, subset(others))).caught

        def join(pair: Pair) -> Pair:
            key, value = (_joined(part, mine, others, theirs) for mine, theirs in zip(pair, caught, strict=True))
            return key, value

        rows = part.rows.gather if isinstance(part, WholeRows) else _unchanged
        if rows is _unchanged and arguments.get("attention_mask") is None:  # nothing is cached yet, whatever its size
            rows = partial(_first, length=shape[1])
        joining = Joining(self.cache, join, rows)
        chosen = part.gather(x_BLD)
        delta = wide(self.routed.call(chosen, given, joining)) - wide(chosen)
        if joining.calls != 1:
            raise ValueError(
                f"block {self.routed.layer} ({type(self.routed.block).__name__}) hands keys and values to its cache "
                f"{joining.calls} times a call, so its tokens cannot be skipped"
            )
        return delta

    def _square(self, length: int, device: torch.device) -> Callable[[Tensor | None], Tensor | None]:
        """Return a function that replaces a missing attention mask (None) by a causal one of `length` tokens.

        The block would otherwise assume that queries and keys are the same tokens, which is wrong if some are keys
        only.
        """
        return lambda mask: causal_mask(mask, length, device)


def _rest_of(part: Selection, tokens: Tokens) -> Selection:
    """Return the selection of the tokens that `part` leaves out."""
    left_BL = ~part.mask()
    exact = part.valid_BK is None and not isinstance(part, WholeRows)
    return tokens.select_kept(left_BL, tokens.length - part.width if exact else None, exact)


def _joined(part: Selection, mine: Tensor, others: Selection, theirs: Tensor) -> Tensor:
    """Return the keys (or values) of all tokens, [B, H, L, E], in the tokens' order.

    mine: keys of the tokens that `part` selects. theirs: keys of those that `others` selects.
    """
    return (part.scatter(mine.transpose(1, 2)) + others.scatter(theirs.transpose(1, 2))).transpose(1, 2)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _first(x: Tensor, length: int) -> Tensor:
    """Return the first `length` keys (or values) of x [B, H, S, E]; a cache of fixed size returns empty columns too."""
    return x[:, :, :length]
