"""A model of any mechanism that is loaded, offloaded to disk or cast has all tensors that it was built with."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import skipstone
from models import on_disk
from skipstone.mechanisms import DEPTH

MECHANISMS: dict[str, dict[str, Any]] = {
    "mixture_of_depths": {"capacity": 0.5, "skip": "low_rank", "skip_rank": 4, "kv": "full"},
    "segment": {"layers": "1:3", "capacity": 0.5, "decision": "boundary", "boundary": {"ids": [7, 90, 100]}},
    "dynamic_chunking": {"layers": "1:3", "share": 0.5},
    "predictor": {"name": "mixture_of_depths", "capacity": 0.5, "decision": "predictor"},
    **{name: {} for name in DEPTH if name not in ("mixture_of_depths", "segment", "dynamic_chunking")},
}
OTHERS: dict[str, dict[str, Any]] = {
    "polyglu": {"activation": {"name": "polyglu"}},
    "zeros": {"activation": "relu", "neuron_groups": {"decision": "zeros"}},
    "magnitude": {"neuron_groups": {"decision": "magnitude", "capacity": 0.5, "group_size": 1}},
    "groups": {"neuron_groups": {"capacity": 0.5, "group_size": 8}},
    "experts": {"mlp": "experts", "experts": {"count": 4, "top_k": 2}},
    "window": {"attention_window": 5, "window_rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
}
OPTIONS = {name: {"mechanisms": [{"name": name, **entry}]} for name, entry in MECHANISMS.items()} | OTHERS
GREEDY = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}


def net(name: str) -> skipstone.SkipstoneForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "initializer_range": 0.2}
    return skipstone.SkipstoneForCausalLM(skipstone.SkipstoneConfig(**sizes, **OPTIONS[name])).eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 290, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def filled() -> Iterator[None]:
    """Memory that nobody has written is NaN, and not by chance what was there before."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("name", OPTIONS)
def test_every_buffer_is_there_after_loading(name: str, tmp_path: Path) -> None:
    model = net(name)
    model.save_pretrained(tmp_path)
    loaded = dict(skipstone.SkipstoneForCausalLM.from_pretrained(tmp_path).named_buffers())
    for buffer, value in model.named_buffers():
        assert torch.equal(loaded[buffer], value), buffer


@pytest.mark.filterwarnings("ignore::UserWarning")  # accelerate's remarks on offloading
@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_weights_on_disk_compute_the_same(name: str, ids: Tensor, tmp_path: Path) -> None:
    model = net(name)
    spread = on_disk(model, tmp_path)
    torch.testing.assert_close(spread(ids).logits, model(ids).logits)
    assert torch.equal(spread.generate(ids, **GREEDY), model.generate(ids, **GREEDY))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["polyglu", "window"])
@torch.no_grad()
def test_positions_are_as_exact_after_a_cast_as_after_loading(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = net(name)
    model.save_pretrained(tmp_path)
    cast, loaded = copy.deepcopy(model).to(dtype), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    found = [[b for n, b in each.named_buffers() if "inverse_E2" in n] for each in (model, cast, loaded.eval())]
    assert all(len(each) == len(found[0]) > 0 for each in found)
    for plain, *others in zip(*found, strict=True):
        assert all(torch.equal(other, plain) for other in others)
    at = torch.arange(5000, 5012)[None]
    few = torch.randint(3, 290, (1, 12), generator=torch.Generator().manual_seed(1))
    exact = model(few, position_ids=at).logits
    assert (cast(few, position_ids=at).logits - exact).abs().max() < 0.05 * exact.abs().max()
