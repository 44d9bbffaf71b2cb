"""The cache of one block, by the methods that transformers calls."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from skipstone import SkipstoneConfig
from skipstone.core.cache import SkipstoneCacheLayer


def filled(tokens: int = 4, rows: int = 2) -> SkipstoneCacheLayer:
    layer = SkipstoneCacheLayer()
    key = torch.arange(rows * tokens).float().view(rows, 1, tokens, 1)
    layer.update(key, -key, slot_BT=torch.arange(tokens)[None])
    layer.store("x").append(torch.arange(tokens)[None], None, sum=key[:, 0])
    layer.advance(tokens)
    return layer


def test_a_dynamic_cache_of_our_config_holds_our_layers() -> None:
    cache = DynamicCache(config=SkipstoneConfig(num_hidden_layers=3))
    assert len(cache.layers) == 3
    assert all(type(layer) is SkipstoneCacheLayer for layer in cache.layers)
    assert cache.get_seq_length() == 0
    assert cache.get_mask_sizes(5, 0) == (5, 0)
    assert cache.is_croppable


def test_a_skipped_call_still_counts_its_tokens() -> None:
    layer = filled()
    layer.advance(3)
    assert layer.get_seq_length() == 7
    assert layer.kv.width == 4
    assert layer.get_mask_sizes(2) == (9, 0)


@pytest.mark.parametrize(("argument", "left"), [(0, 4), (-1, 3), (-4, 0), (-9, 0), (3, 3), (9, 4)])
def test_crop_speaks_both_dialects(argument: int, left: int) -> None:
    """Newer transformers: how many to remove, as a negative number. Older ones: how many to leave."""
    layer = filled()
    layer.crop(argument)
    assert layer.get_seq_length() == layer.kv.width == layer.store("x").width == left


def test_rows_move_together() -> None:
    layer = filled()
    layer.reorder_cache(torch.tensor([1, 1]))
    assert layer.kv.view("key")[..., 0, 0].tolist() == [[4, 5, 6, 7], [4, 5, 6, 7]]
    assert layer.store("x").view("sum")[:, 0, 0].tolist() == [4, 4]
    layer.batch_repeat_interleave(2)
    assert layer.kv.view("key").shape[0] == layer.store("x").view("sum").shape[0] == 4
    layer.batch_select_indices(torch.tensor([3]))
    assert layer.kv.view("key").shape[0] == 1
    assert layer.get_seq_length() == 4


def test_reset_forgets_everything() -> None:
    layer = filled()
    layer.reset()
    assert layer.get_seq_length() == layer.kv.width == 0
    assert not layer.stores
    assert not layer.is_initialized


@pytest.mark.parametrize("first", [True, False])
def test_documents_in_every_call_or_in_none(first: bool) -> None:
    layer, key = SkipstoneCacheLayer(), torch.zeros(1, 1, 2, 1)
    document = torch.zeros(1, 2, dtype=torch.long)
    layer.update(key, key, slot_BT=torch.arange(2)[None], document_BT=document if first else None)
    with pytest.raises(ValueError, match="document_ids must be given in every call that shares a cache, or in none"):
        layer.update(key, key, slot_BT=torch.arange(2)[None] + 2, document_BT=None if first else document)
