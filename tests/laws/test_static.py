"""Law 18: a static cache gives the same results as a growing one; it never moves, waits or is compiled twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from transformers import CompileConfig, DynamicCache, StaticCache

from laws.builders import (
    DECIDED,
    LENGTH,
    NESTED,
    ORDERS,
    Case,
    assert_close,
    assert_same_records,
    case,
    entry,
    ids,
    lively,
)
from laws.test_generation import plain_loop
from skipstone import SkipstoneForCausalLM
from skipstone.generate.engine import generate
from skipstone.measure.flops import count_host_syncs

MOD = case(entry("mixture_of_depths", decision="predictor"))
MIXED = case(*map(entry, ("mixture_of_depths", "token_selective", "early_exit")), activation="polyglu")
SOME = [c for c in [*ORDERS, *DECIDED] if len(c.mechanisms) < 2 and not c.oracle_only] + [MIXED, *NESTED]
PARTS = [(0, 5), (5, 6), (6, 9), *((i, i + 1) for i in range(9, LENGTH))]
EXACT, NEW = 1e-5, 5


def fixed(model: SkipstoneForCausalLM, length: int = LENGTH + NEW) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=length)


def both(model: SkipstoneForCausalLM) -> list[Any]:
    return [DynamicCache(config=model.config), fixed(model)]


@pytest.mark.parametrize("chosen", SOME, ids=str)
@torch.no_grad()
def test_chunks_and_steps_equal_the_growing_cache(chosen: Case) -> None:
    model = lively(chosen)
    grows, holds = both(model)
    for a, b in PARTS:
        expected, got = (model(ids()[:, a:b], past_key_values=c, output_records=True) for c in (grows, holds))
        assert_close(got.logits, expected.logits, f"{a}:{b}", EXACT)
        assert_same_records(got.records, expected.records)
    for mine, yours in zip(holds.layers, grows.layers, strict=True):
        assert mine.kv.stored() == yours.kv.stored()


@pytest.mark.parametrize("chosen", SOME, ids=str)
@torch.no_grad()
def test_crop_and_reorder_equal_the_growing_cache(chosen: Case) -> None:
    model, said = lively(chosen), []
    for cache in both(model):
        model(ids()[:, :9], past_key_values=cache)
        model(ids()[:, 9:10], past_key_values=cache)
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        logits = [model(ids(seed=2)[:, :1], past_key_values=cache).logits]
        cache.crop(-4)
        logits.append(model(ids(seed=3)[:, :3], past_key_values=cache).logits)
        logits.append(model(ids(seed=4)[:, :1], past_key_values=cache).logits)
        said.append(torch.cat(logits, 1))
    assert_close(said[1], said[0], tolerance=EXACT)


@pytest.mark.parametrize("chosen", [case(), MOD, MIXED], ids=str)
@torch.no_grad()
def test_memory_stays_where_it_is(chosen: Case) -> None:
    model, cache = lively(chosen), fixed(lively(chosen))

    def places() -> list[int]:
        stores = [store for layer in cache.layers for store in (layer.kv, *layer.stores.values())]
        tensors = [x for store in stores for x in (*store.entries.values(), store.lengths_B)]
        return [x.data_ptr() for x in (*tensors, *(layer.cumulative_length for layer in cache.layers))]

    whole = model(ids(), use_cache=False).logits
    first = model(ids()[:, :6], past_key_values=cache).logits
    before = places()
    for t in range(6, LENGTH):
        model(ids()[:, t : t + 1], past_key_values=cache)
    cache.crop(3)
    cache.reorder_cache(torch.tensor([1, 2, 0]))
    cache.reset()
    assert cache.get_seq_length() == sum(layer.kv.stored() for layer in cache.layers) == 0
    assert torch.equal(model(ids()[:, :6], past_key_values=cache).logits, first)
    assert_close(model(ids()[:, 6:], past_key_values=cache).logits, whole[:, 6:], tolerance=EXACT)
    assert places() == before


@pytest.mark.parametrize("chosen", [case(), MOD, MIXED], ids=str)
@torch.no_grad()
def test_a_step_never_waits(chosen: Case) -> None:
    model, cache = lively(chosen), fixed(lively(chosen))
    model(ids()[:, :6], past_key_values=cache)
    more = {"attention_mask": torch.ones(3, 1), "position_ids": torch.full((3, 1), 6)}
    assert not count_host_syncs(lambda: model(ids()[:, 6:7], past_key_values=cache))
    assert not count_host_syncs(lambda: model(ids()[:, 7:8], past_key_values=cache, **more))


@pytest.mark.parametrize("chosen", [MOD, MIXED], ids=str)
@torch.no_grad()
def test_a_prompt_of_which_nobody_is_kept_takes_its_memory(chosen: Case) -> None:
    """Otherwise it would be taken in the first compiled step."""
    model, masks, said = lively(chosen), {i: torch.zeros(3, 6, dtype=torch.bool) for i in (1, 2)}, []
    for cache in both(model):
        logits = model(ids()[:, :6], routing=masks, past_key_values=cache).logits
        said.append(torch.cat((logits, model(ids()[:, 6:7], past_key_values=cache).logits), 1))
    assert_close(said[1], said[0], tolerance=EXACT)
    fresh = fixed(model)
    model(ids()[:, :6], routing=masks, past_key_values=fresh)
    assert {layer.kv.width for layer in fresh.layers} == {LENGTH + NEW}
    if chosen is MIXED:
        assert {layer.stores["polyglu"].width for layer in fresh.layers} == {LENGTH + NEW}


def compiled_steps(chosen: Case, backend: str = "aot_eager") -> tuple[Tensor, Tensor, int]:
    """Logits of a plain pass and of compiled steps, and how many graphs were made."""
    model = lively(chosen)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    step, cache = torch.compile(model, backend=counter, fullgraph=True), fixed(model)
    with torch.no_grad():
        logits = [model(ids()[:, :4], past_key_values=cache).logits]
        logits += [step(ids()[:, t : t + 1], past_key_values=cache).logits for t in range(4, LENGTH)]
        return model(ids(), use_cache=False).logits, torch.cat(logits, 1), counter.frame_count


@pytest.mark.slow
def test_steps_are_one_graph() -> None:
    whole, got, graphs = compiled_steps(MOD)
    assert_close(got, whole, tolerance=EXACT)
    assert graphs == 1


@pytest.mark.slow
@pytest.mark.parametrize("chosen", SOME, ids=str)
def test_steps_of_every_mechanism_are_one_graph(chosen: Case) -> None:
    whole, got, graphs = compiled_steps(chosen)
    assert_close(got, whole, tolerance=EXACT)
    assert graphs == 1


@pytest.mark.parametrize("chosen", SOME, ids=str)
def test_generate_with_a_cache_of_fixed_size(chosen: Case) -> None:
    model = lively(chosen)
    options = {"max_new_tokens": NEW, "do_sample": False, "cache_implementation": "static"}
    expected = plain_loop(model, ids())
    assert torch.equal(model.generate(ids(), **options), expected)
    assert torch.equal(model.generate(ids(), prefill_chunk_size=4, **options), expected)
    mask = torch.ones_like(ids())
    mask[0, :7], mask[2, :12] = 0, 0
    got = model.generate(ids(), attention_mask=mask, pad_token_id=0, **options)
    for row, start in enumerate((7, 0, 12)):
        assert torch.equal(got[row, start:], plain_loop(model, ids()[row : row + 1, start:])[0])


@pytest.mark.parametrize("chosen", [MOD, MIXED], ids=str)
def test_searches_and_documents_with_a_cache_of_fixed_size(chosen: Case) -> None:
    model, ways = lively(chosen), ("dynamic", "static")
    document = torch.tensor([[0] * 6 + [1] * 9] * 3)
    for options in (
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
        {"do_sample": False, "document_ids": document},
    ):
        said = []
        for way in ways:
            torch.manual_seed(1)
            said.append(model.generate(ids(), max_new_tokens=4, cache_implementation=way, **options))
        assert torch.equal(said[0], said[1]), options


def test_a_conversation_goes_on_in_the_same_memory() -> None:
    model = lively(MIXED)
    cache = fixed(model, 40)
    first = model.generate(ids(), max_new_tokens=NEW, do_sample=False, past_key_values=cache)
    longer = torch.cat((first, ids(seed=3)[:, :4]), 1)
    second = model.generate(longer, max_new_tokens=NEW, do_sample=False, past_key_values=cache)
    assert torch.equal(second, plain_loop(model, longer))


@pytest.mark.slow
def test_transformers_compiles_the_steps_of_generate() -> None:
    model, graphs = lively(MOD), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    config = CompileConfig(backend=backend, mode=None, fullgraph=True)
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config, "do_sample": False}
    for new, more in ((NEW, {}), (3, {}), (4, {"prefill_chunk_size": 4})):
        assert torch.equal(model.generate(ids(), max_new_tokens=new, **options, **more), plain_loop(model, ids(), new))
        assert len(graphs) == 1, "compiled again"


@pytest.mark.parametrize("chosen", SOME, ids=str)
def test_our_engine_with_a_cache_of_fixed_size(chosen: Case) -> None:
    model, mask = lively(chosen), torch.ones_like(ids())
    mask[0, :7], mask[2, :12] = 0, 0
    for given in (None, mask):
        said = [generate(model, ids(), given, max_new_tokens=NEW, cache=cache) for cache in ("dynamic", "static")]
        assert torch.equal(said[0], said[1])
    with pytest.raises(ValueError, match=r"'statik'.*did you mean 'static'"):
        generate(model, ids(), max_new_tokens=1, cache="statik")


def test_what_a_cache_of_fixed_size_refuses() -> None:
    model = lively(MOD)
    with pytest.raises(ValueError, match="a static cache is written in place and cannot be differentiated through"):
        model(ids(), past_key_values=fixed(model))
    with torch.no_grad():
        cache = fixed(model, 8)
        model(ids()[:, :6], past_key_values=cache)
        with pytest.raises(ValueError, match="past_key_values holds 3 rows, but the call has 2"):
            model(ids()[:2, 6:7], past_key_values=cache)
        with pytest.raises(ValueError, match="a row of the cache holds 8 tokens and the call brings more"):
            model(ids()[:, 6:9], past_key_values=cache)
        cache.offloading = True
        with pytest.raises(ValueError, match="past_key_values must not be offloaded"):
            model(ids()[:, 6:7], past_key_values=cache)
