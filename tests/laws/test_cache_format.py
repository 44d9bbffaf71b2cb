"""Law 22: with keys and values in fp16, a pass with a cache equals one that rounds all of them as it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from laws.builders import KINDS, LENGTH, Case, assert_close, case, entry, ids, lively
from models import tiny_model
from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.measure.speed import cache_bytes
from skipstone.nn.attention import Attention
from skipstone.ops.reference import to_half

CASES = [
    case(),
    case(attention_window=5),
    case(*map(entry, KINDS), activation="polyglu"),
    case(entry("mixture_of_depths", on="attention")),
]
CHUNKS = {"whole": [LENGTH], "steps": [6, *[1] * (LENGTH - 6)], "chunks": [4, 5, LENGTH - 9]}
CLOSE = 4e-4  # a number that lies between two of fp16 may be rounded up in one pass and down in the other
CACHES: dict[str, Any] = {
    "growing": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=LENGTH),
}


@contextmanager
def rounding_all() -> Iterator[None]:
    """Round keys and values in every attention, as the specification of the option."""
    plain = Attention._keys_and_values

    def rounded(self: Attention, *given: Any) -> Any:
        return tuple(to_half(x).to(x.dtype) for x in plain(self, *given))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attention, "_keys_and_values", rounded)
        yield


def in_halves(model: SkipstoneForCausalLM) -> SkipstoneForCausalLM:
    model.config.cache_format = "float16"
    return model


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("chosen", CASES, ids=str)
@torch.no_grad()
def test_logits_are_those_of_rounded_keys_and_values(chosen: Case, kind: str) -> None:
    model, mask = lively(chosen), torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, :3], mask[2, :7] = 0, 0
    plain = model(ids(), attention_mask=mask, use_cache=False).logits
    with rounding_all():
        want = model(ids(), attention_mask=mask, use_cache=False).logits
    in_halves(model)
    assert torch.equal(model(ids(), attention_mask=mask, use_cache=False).logits, plain)  # nothing is stored
    for name, counts in CHUNKS.items():
        cache, found, at = CACHES[kind](model.config), [], 0
        for count in counts:
            given = {"attention_mask": mask[:, : at + count], "past_key_values": cache}
            found.append(model(ids()[:, at : at + count], **given).logits)
            at += count
        real, logits = mask.bool(), torch.cat(found, 1)
        assert_close(logits[real], want[real], name, CLOSE)
        far, near = ((logits - other)[real].abs().mean() for other in (plain, want))
        assert near < far / 4
        assert all(layer.kv.entries[name].dtype == torch.float16 for layer in cache.layers for name in ("key", "value"))


@torch.no_grad()
def test_steps_of_one_row_equal_rounded_keys_and_values() -> None:
    """The compiled step, where it is installed: single tokens, drafts and tokens that are taken back."""
    model = lively(CASES[2])
    with rounding_all():
        want = model(ids()[:1], use_cache=False).logits
    cache, at = DynamicCache(config=in_halves(model).config), 0
    for count in (5, 1, 4, -3, 1, 2, 1, 1):
        if count < 0:
            cache.crop(count)
        else:
            logits = model(ids()[:1, at : at + count], past_key_values=cache).logits
            assert_close(logits, want[:, at : at + count], str(at), CLOSE)
        at += count


@pytest.mark.parametrize("more", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_generation(more: dict[str, Any]) -> None:
    model = lively(CASES[0])
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    beams = {key: value for key, value in more.items() if key == "num_beams"}
    with rounding_all():
        want = model.generate(ids(), use_cache=False, **options, **beams)
    assert torch.equal(in_halves(model).generate(ids(), **options, **more), want)


@torch.no_grad()
def test_bytes_are_told() -> None:
    model = tiny_model()
    prices = []
    for kind in ("float", "float16"):
        model.config.cache_format = kind
        price = model.cost(tokens=LENGTH).kv_bytes_per_token
        assert cache_bytes(model, ids(rows=1)).kv == price
        prices.append(price)
    slots = 8 * model.config.num_hidden_layers
    assert prices[1] - slots == (prices[0] - slots) / 2
    small = tiny_model(cache_format="float16").bfloat16()
    assert small.cost(tokens=LENGTH).kv_bytes_per_token == prices[1]
    cache = small(ids(), use_cache=True).past_key_values
    assert cache.layers[0].kv.entries["key"].dtype == torch.bfloat16  # 16 bits as it is


@torch.no_grad()
def test_what_fp16_cannot_hold_saturates() -> None:
    """Never infinity, which would make NaN of every later token."""
    model = in_halves(tiny_model(attention_bias=True))
    for block in model.model.layers:
        block.self_attn.v_proj.bias.data[3] = 1e6
    cache = DynamicCache(config=model.config)
    for part in ids().split([LENGTH - 2, 1, 1], 1):
        assert model(part, past_key_values=cache).logits.isfinite().all()
    assert cache.layers[0].kv.view("value").max() == 65504


def test_a_cache_keeps_its_format() -> None:
    """A cache that was begun in another format is continued in that one, and never mixed."""
    model = tiny_model()
    for before, after in (("float", "float16"), ("float16", "float")):
        model.config.cache_format = before
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            want = model(ids()[:1], use_cache=False).logits
            model(ids()[:1, :8], past_key_values=cache)
            held = cache.layers[0].kv.entries["key"].dtype
            model.config.cache_format = after
            got = [model(part, past_key_values=cache).logits for part in ids()[:1, 8:].split([1, 1, LENGTH - 10], 1)]
        assert cache.layers[0].kv.entries["key"].dtype == held
        assert_close(torch.cat(got, 1), want[:, 8:], before, 1e-2)


def test_training_is_as_before() -> None:
    """Without a cache nothing is rounded, and gradients pass through the rounding of one."""
    losses, gradients = [], []
    for kind in ("float", "float16"):
        model = tiny_model(cache_format=kind).train()
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    assert losses[0] == losses[1]
    assert torch.equal(*gradients)
    model = tiny_model(cache_format="float16")
    cache = DynamicCache(config=model.config)
    model(ids()[:, :9], past_key_values=cache)
    model(ids()[:, 9:], past_key_values=cache).logits.square().sum().backward()
    assert model.model.layers[0].self_attn.v_proj.weight.grad.abs().max() > 0


def test_it_is_saved_and_bad_values_are_refused(tmp_path: Path) -> None:
    tiny_model(cache_format="float16").save_pretrained(tmp_path)
    assert SkipstoneForCausalLM.from_pretrained(tmp_path).config.cache_format == "float16"
    assert SkipstoneConfig().cache_format == "float"
    with pytest.raises(ValueError, match="cache_format 'int8'"):
        SkipstoneConfig(cache_format="int8")
    model = tiny_model()
    model.config.cache_format = "fp16"
    with pytest.raises(ValueError, match=r"cache_format 'fp16'.*float16"), torch.no_grad():
        model(ids(), use_cache=True)
