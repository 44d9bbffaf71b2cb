"""The settings of a routed decoder, and what it says of its last pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import skipstone
from in_place.test_route import MOD, routed


@torch.no_grad()
def test_the_kept_share_is_that_of_real_tokens(ids: Tensor, mask: Tensor) -> None:
    model, handle = routed("llama", [MOD])
    model(ids, attention_mask=mask, use_cache=False)
    kept = [records["mixture_of_depths"].kept_BT for records in handle.records]
    assert handle.kept_share() == pytest.approx(float(sum(k.sum() for k in kept) / (len(kept) * mask.sum())))
    handle.set_identity()
    model(ids, attention_mask=mask, use_cache=False)
    assert handle.kept_share() == 1


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("executor", "gatherd", "unknown executor 'gatherd'; did you mean 'gathered'"),
        ("routing", "forced", "unknown routing 'forced'"),
        ("training_routing", None, "unknown training_routing None"),
        ("forced", {0: torch.ones(2, 10).bool()}, "forced names block 0, which has no mechanism"),
        ("forced", {1: torch.ones(2, 5).bool()}, r"forced\[1\] must be a bool mask of shape \[2, 10\], got torch.bool"),
        ("forced", {1: torch.ones(2, 10)}, r"must be a bool mask of shape \[2, 10\], got torch.float32"),
    ],
)
def test_settings_that_are_none_are_refused(setting: str, value: Any, says: str, ids: Tensor) -> None:
    model, handle = routed("llama", [{**MOD, "layers": [1]}])
    setattr(handle, setting, value)
    with pytest.raises(ValueError, match=says):
        model(ids, use_cache=False)


def test_mechanisms_are_removed_once(ids: Tensor) -> None:
    model, handle = routed("llama", [MOD])
    handle.undo()
    with pytest.raises(ValueError, match="removed before"):
        handle.undo()
    other = skipstone.route(model, [MOD])
    with pytest.raises(ValueError, match="removed before"):
        handle.undo()
    other.undo()
