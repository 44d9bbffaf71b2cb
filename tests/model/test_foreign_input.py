"""Masks, ids, caches and flags as other tools pass them are computed correctly or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import skipstone
from models import tiny_model

MECHANISMS: dict[str, list[dict[str, Any]]] = {
    "dense": [],
    "mod": [{"name": "mixture_of_depths", "capacity": 0.5, "decision": "threshold"}],
    "tsa": [{"name": "token_selective"}],
    "exit": [{"name": "early_exit"}],
}


def net(name: str = "dense", **options: Any) -> skipstone.SkipstoneForCausalLM:
    sizes = {"vocab_size": 300, "num_hidden_layers": 4, "num_attention_heads": 4, "initializer_range": 0.2}
    return tiny_model(**{**sizes, **options}, mechanisms=MECHANISMS[name])


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 290, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("values", [[2, 1, 0], [1, -1, 1], [0.5, 3.0, 0.0]], ids=["packing", "negative", "float"])
def test_a_mask_of_other_numbers_is_refused(name: str, values: list[float], ids: Tensor) -> None:
    mask = torch.tensor([values]).repeat(2, 4)
    with pytest.raises(ValueError, match=r"attention_mask must hold 1 for tokens and 0 .*, got .*document_ids"):
        net(name)(ids, attention_mask=mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_a_mask_of_any_type_counts_alike(dtype: torch.dtype, ids: Tensor) -> None:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    model = net("mod")
    right = model(ids, attention_mask=mask).logits
    assert torch.equal(model(ids, attention_mask=mask.to(dtype)).logits, right)


@pytest.mark.parametrize("wrong", [300, -1])
def test_ids_outside_of_the_vocabulary_are_one_line(wrong: int, ids: Tensor) -> None:
    ids[1, 4] = wrong
    with pytest.raises(ValueError, match=rf"input_ids must lie in 0 to 299 \(vocab_size - 1\), got {wrong}"):
        net()(ids)


def test_hidden_states_by_the_configuration(ids: Tensor, tmp_path: Path) -> None:
    net().save_pretrained(tmp_path)
    model = skipstone.SkipstoneForCausalLM.from_pretrained(tmp_path, output_hidden_states=True).eval()
    assert len(model(ids).hidden_states) == 5
    assert model(ids, output_hidden_states=False).hidden_states is None
    assert len(net()(ids, output_hidden_states=True).hidden_states) == 5


def test_generation_returns_hidden_states_and_refuses_attentions(ids: Tensor) -> None:
    options: dict[str, Any] = {
        "max_new_tokens": 3,
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }
    out = net("mod").generate(ids, output_hidden_states=True, output_scores=True, **options)
    assert len(out.hidden_states) == len(out.scores) == 3
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        net().generate(ids, output_attentions=True, **options)


def foreign_caches() -> dict[str, Any]:
    """Caches that a model of four blocks cannot go on from, by the words that say why."""
    few = DynamicCache(config=net(num_hidden_layers=2).config)
    plain = DynamicCache()
    plain.layers.append(DynamicLayer())
    mixed = DynamicCache(config=net().config)
    mixed.layers[2] = DynamicLayer()
    return {
        "got tuple": ((torch.zeros(2, 4, 1, 8), torch.zeros(2, 4, 1, 8)),) * 4,
        "got DynamicCache;": DynamicCache(),
        "got DynamicCache of DynamicLayer;": plain,
        "past_key_values must be a DynamicCache": mixed,
        "has 2 layers, but the model has 4 blocks": few,
        "has 6 layers, but the model has 4 blocks": DynamicCache(config=net(num_hidden_layers=6).config),
    }


@pytest.mark.parametrize("name", MECHANISMS)
def test_caches_of_another_model_are_one_line(name: str, ids: Tensor) -> None:
    model = net(name)
    for why, cache in foreign_caches().items():
        with pytest.raises(ValueError, match=why):
            model(ids, past_key_values=cache)


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_cache_of_other_rows_is_one_line_and_stays_as_it_is(name: str, ids: Tensor) -> None:
    model = net(name)
    cache = model(ids, use_cache=True).past_key_values
    right = model(ids[:, :1], past_key_values=model(ids, use_cache=True).past_key_values).logits
    for rows in (ids[:1, :1], ids[:1, :1].expand(3, -1)):
        with pytest.raises(ValueError, match=r"past_key_values holds 2 rows, but the call has \d"):
            model(rows, past_key_values=cache)
    assert torch.equal(model(ids[:, :1], past_key_values=cache).logits, right)


def test_prefix_tuning_is_refused_in_training_too(ids: Tensor) -> None:
    with pytest.raises(ValueError, match="prefix tuning"):
        net("mod").train()(ids, past_key_values=foreign_caches()["got DynamicCache of DynamicLayer;"])


@pytest.mark.parametrize(
    ("rope", "says"),
    [
        ({"rope_type": "yarn"}, "rope_parameters.factor must be a number with rope_type 'yarn', got none"),
        ({"rope_type": "linear", "factor": "2"}, "rope_parameters.factor must be a number, got '2'"),
        ({"rope_type": "default", "rope_theta": None}, "rope_parameters.rope_theta must be a number, got None"),
    ],
)
def test_rope_without_its_numbers_is_one_line(rope: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        net(rope_parameters=rope)


LABELS = {
    "int32": (lambda ids: ids.int(), None),
    "another length": (
        lambda ids: ids[:, :5],
        r"labels must have the shape of .*, \[2, 12\], got \[2, 5\]",
    ),
    "one row": (lambda ids: ids[:1], r"labels must have the shape of the predictions, \[2, 12\], got \[1, 12\]"),
    "no rows": (lambda ids: ids[0], r"labels must have shape \[rows, tokens\], got \[12\]"),
    "fractions": (lambda ids: ids.float(), "labels must be whole numbers, got torch.float32"),
    "beyond the vocabulary": (lambda ids: ids + 300, r"labels must lie in 0 to 299 \(vocab_size - 1\) or be -100, got"),
    "padding as -1": (lambda ids: ids.where(ids > 99, -1), "labels must lie in 0 to 299 .*or be -100, got -1"),
}


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("what", LABELS)
def test_labels_are_tokens_or_one_line(what: str, chunk: int, ids: Tensor) -> None:
    change, why = LABELS[what]
    model = net()
    if why is None:
        assert torch.equal(model(ids, labels=change(ids), loss_chunk=chunk).loss, model(ids, labels=ids).loss) or chunk
        return
    with pytest.raises(ValueError, match=why):
        model(ids, labels=change(ids), loss_chunk=chunk)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"input_ids": torch.arange(9)}, r"input_ids must be whole numbers of shape .*, got torch.int64 \[9\]"),
        ({"input_ids": torch.ones(2, 9)}, "input_ids must be whole numbers .*, got torch.float32"),
        ({"input_ids": [[1, 2]]}, "input_ids must be a tensor .*, got list"),
        ({"inputs_embeds": torch.ones(2, 9, 31)}, r"inputs_embeds must have shape \[rows, tokens, 32\]"),
        ({"inputs_embeds": torch.ones(9, 32)}, r"inputs_embeds must have shape .*, got \[9, 32\]"),
        ({"input_ids": torch.ones(2, 9, dtype=torch.uint8)}, "input_ids must be int64 or int32, got torch.uint8"),
        ({"input_ids": torch.ones(2, 0).long()}, r"a call needs at least one row and one token, got shape \[2, 0\]"),
        ({"input_ids": torch.ones(0, 9).long()}, "a call needs at least one row and one token"),
        ({"inputs_embeds": torch.ones(2, 0, 32)}, "a call needs at least one row and one token"),
        ({"inputs_embeds": [[0.0] * 32]}, "inputs_embeds must be a tensor, got list"),
        ({}, "give exactly one of input_ids and inputs_embeds"),
    ],
    ids=str,
)
def test_inputs_of_another_form_are_one_line(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        net()(**given)


@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "document_ids", "labels"])
@pytest.mark.parametrize("value", [[[1] * 12] * 2, {"full_attention": None}], ids=["list", "dict"])
def test_what_is_no_tensor_is_one_line(name: str, value: Any, ids: Tensor) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be a tensor of shape \[rows, tokens\], got (list|dict)"):
        net("mod")(ids, **{name: value})


def test_another_ignored_label_is_refused(ids: Tensor) -> None:
    """transformers hands it on to the loss; here -100 marks tokens without a target, also for auxiliary losses."""
    model = net()
    assert torch.equal(model(ids, labels=ids, ignore_index=-100).loss, model(ids, labels=ids).loss)
    with pytest.raises(ValueError, match="ignore_index must be -100, got 0"):
        model(ids, labels=ids, ignore_index=0)


def test_learned_positions_below_0_are_one_line(ids: Tensor) -> None:
    model = net(positions="learned", max_position_embeddings=16)
    for shift, why in ((-3, "position_ids must be at least 0, got -3"), (9, "longer than the model's context of 16")):
        with pytest.raises(ValueError, match=why):
            model(ids, position_ids=torch.arange(12)[None] + shift)


@pytest.mark.parametrize("other", [{"num_key_value_heads": 1}, {"head_dim": 16}])
@pytest.mark.parametrize("theirs", [True, False])
def test_a_cache_of_other_heads_is_one_line(other: dict[str, Any], theirs: bool, ids: Tensor) -> None:
    """Entries of one head were spread over four silently."""
    models = net(**other), net()
    made, used = models if theirs else models[::-1]
    cache = made(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"past_key_values holds keys of \d heads of size \d+, but the model has \d"):
        used(ids[:, :1], past_key_values=cache)


def test_a_configuration_that_wants_tuples_gets_them(ids: Tensor) -> None:
    model = net("mod")
    right = model(ids, labels=ids)
    model.config.return_dict = False
    loss, logits, *_ = model(ids, labels=ids)
    assert torch.equal(loss, right.loss)
    assert torch.equal(logits, right.logits)
    assert isinstance(model.model(ids), tuple)
