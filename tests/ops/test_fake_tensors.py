"""Models whose operations are compiled by numba run where torch computes shapes alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import skipstone
from skipstone.model.head_preview import with_head_candidates
from skipstone.model.quantise import quantise

MAGNITUDE = {"neuron_groups": {"decision": "magnitude", "capacity": 0.5}, "intermediate_size": 128}


def model(**options: Any) -> skipstone.SkipstoneForCausalLM:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 61}
    return skipstone.SkipstoneForCausalLM(skipstone.SkipstoneConfig(**sizes, **options)).eval()


def ids(tokens: int) -> torch.Tensor:
    return torch.randint(0, 61, (1, tokens), generator=torch.Generator().manual_seed(0))


@cache
def made(kind: str) -> skipstone.SkipstoneForCausalLM:
    plain = model(**(MAGNITUDE if kind == "magnitude" else {}))
    if kind == "candidates":
        return with_head_candidates(plain, ids(32), 16, 64)
    return quantise(plain, int(kind)) if kind.isdigit() else plain


@pytest.mark.parametrize("tokens", [1, 4, 12])
@pytest.mark.parametrize("kind", ["plain", "16", "8", "4", "magnitude", "candidates"])
@torch.no_grad()
def test_shapes_and_dtypes_are_those_of_the_pass(kind: str, tokens: int) -> None:
    real = made(kind)(ids(tokens), use_cache=False).logits
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = made(kind)(mode.from_tensor(ids(tokens)), use_cache=False).logits
    assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)
