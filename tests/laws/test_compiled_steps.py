"""Law 21: a compiled step equals the general way in logits, records and stores, and serves all that declares itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from laws.builders import CAUSAL, LAYERS, Case, assert_close, assert_same_records, ids, lively
from skipstone import SkipstoneForCausalLM
from skipstone.ops import decode_stack

pytest.importorskip("numba")

CALLS = (5, 1, 4, 1, -3, 1, 2, 1)  # a prompt, single tokens, drafts to be checked, and tokens that are taken back
ROWS = (4, 1, 1, "reorder", 1, -2, 1, 1)  # the same for several rows, one of which begins with padding
PADDED = 2
CLOSE = 1e-4


@torch.no_grad()
def decoded_rows(model: SkipstoneForCausalLM) -> tuple[list[Any], Any]:
    """The outputs of calls on three rows, and their cache."""
    cache, found, at = DynamicCache(config=model.config), [], 0
    given, mask = ids(rows=3, length=20), torch.ones(3, 20, dtype=torch.long)
    mask[1, :PADDED] = 0
    for count in ROWS:
        if count == "reorder":
            order = torch.tensor([2, 1, 1])
            cache.reorder_cache(order)
            given, mask = given[order], mask[order]
            continue
        if count < 0:
            cache.crop(at + count)
        else:
            more = given[:, at : at + count]
            named = {"attention_mask": mask[:, : at + count], "past_key_values": cache, "use_cache": True}
            found.append(model(more, **named, output_records=True))
        at += count
    return found, cache


@torch.no_grad()
def decoded(model: SkipstoneForCausalLM) -> tuple[list[Any], Any]:
    """The outputs of calls on one row, and its cache."""
    cache, found, at = DynamicCache(config=model.config), [], 0
    for count in CALLS:
        if count < 0:
            cache.crop(at + count)
        else:
            more = ids(rows=1, length=20)[:, at : at + count]
            found.append(model(more, past_key_values=cache, use_cache=True, output_records=True))
        at += count
    return found, cache


HISTORIES = {"decoded": decoded, "decoded_rows": decoded_rows}


def assert_same_caches(one: Any, other: Any) -> None:
    for mine, yours in zip(one.layers, other.layers, strict=True):
        assert mine.cumulative_length == yours.cumulative_length
        stores = {"kv": (mine.kv, yours.kv)} | {n: (mine.store(n), yours.store(n)) for n in mine.stores | yours.stores}
        for name, (a, b) in stores.items():
            assert (a.width, a.lengths) == (b.width, b.lengths), name
            for entry in a.entries.keys() & b.entries.keys():
                assert a.entries[entry].dtype == b.entries[entry].dtype
                assert_close(a.view(entry), b.view(entry), f"{name} {entry}", CLOSE)


def is_declared(model: SkipstoneForCausalLM, chosen: Case) -> bool:
    """Whether every mechanism and activation describes itself, in a decoder of the usual parts."""
    gates = [gate.stream_gate() for block in model.model.layers for gate in block.mechanisms.values()]
    mixes = [block.mlp.activation.stream_mix() for block in model.model.layers]
    routers = [block.mlp.router for block in model.model.layers if hasattr(block.mlp, "router")]
    choices = [router.stream_choice() if hasattr(router, "stream_choice") else None for router in routers]
    usual = all(name == "neuron_groups" for name, _ in chosen.more)
    return usual and None not in gates and None not in mixes and None not in choices


@pytest.mark.parametrize("calls", ["decoded", "decoded_rows"])
@pytest.mark.parametrize("chosen", CAUSAL, ids=str)
def test_it_equals_the_general_way(chosen: Case, calls: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, compiled = lively(chosen), []
    run = decode_stack.run

    def counting(x: torch.Tensor, program: Any, *rest: Any) -> Any:
        compiled.append(len(program.table_LC))
        return run(x, program, *rest)

    monkeypatch.setattr(decode_stack, "run", counting)
    got, mine = HISTORIES[calls](model)
    if is_declared(model, chosen):
        assert compiled == [LAYERS] * (len(got) - 1)
    monkeypatch.setattr(decode_stack, "MOST_TOKENS", 0)
    want, yours = HISTORIES[calls](model)
    for a, b in zip(got, want, strict=True):
        assert_close(a.logits, b.logits, "logits", CLOSE)
        assert_same_records(a.records, b.records, CLOSE)
    assert_same_caches(mine, yours)
