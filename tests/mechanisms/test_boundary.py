"""Decision `boundary`: which tokens it keeps, from ids alone, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from models import tiny_model
from skipstone import SkipstoneForCausalLM
from skipstone.data.tokenizers import byte_tokenizer, char_tokenizer
from skipstone.mechanisms.decisions.boundary import (
    Boundaries,
    as_ranges,
    boundary_ids,
    byte_boundaries,
    listed_ids,
    with_boundary_ids,
)
from skipstone.train.setup import model_config

TEXT = "Hello, world! foo  bar\n    x = 1 \u00e9t\u00e9"


def model(**options: Any) -> SkipstoneForCausalLM:
    entry = {"name": "mixture_of_depths", "layers": [1], "decision": "boundary", **options}
    return tiny_model(mechanisms=[entry], vocab_size=258, intermediate_size=48)


def shown(kept: torch.Tensor, text: bytes) -> str:
    return "".join(chr(byte) if keep else "." for byte, keep in zip(text, kept.tolist(), strict=True))


def kept_in(text: str, **options: Any) -> str:
    data = text.encode()
    out = model(**options)(torch.tensor([list(data)]), output_records=True)
    return shown(out.records[1]["mixture_of_depths"].kept_BT[0], data)


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ("first", "H....,......!.... ....\n..... ... "),
        ("every", "H...., .....! ...  ...\n    . = . "),
        ("after", "H......w......f....b.......x...1."),
    ],
)
def test_the_rules(at: str, expected: str) -> None:
    text = TEXT[: TEXT.index("\u00e9")]
    assert kept_in(text, boundary={"at": at}) == expected


def test_bytes_of_one_character_are_one_boundary() -> None:
    """The lead byte of a character beyond ASCII is a boundary, its continuation bytes are none (SpaceByte, 2.1)."""
    boundaries = {*byte_boundaries()}
    assert [byte in boundaries for byte in "\u00e9".encode()] == [True, False]
    assert {*b"azAZ09"} & boundaries == set()
    assert {*b" \n,.(_", 256} <= boundaries


@torch.no_grad()
def test_padding_documents_and_the_cache_see_the_same_neighbours() -> None:
    chosen, row = model(), torch.tensor([list(b"ab, cd ef")])
    alone = chosen(row, output_records=True)
    kept = alone.records[1]["mixture_of_depths"].kept_BT
    padded = torch.cat((torch.full((1, 3), 32), row), 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    found = chosen(padded, attention_mask=mask, output_records=True).records[1]["mixture_of_depths"].kept_BT
    assert torch.equal(found[:, 3:], kept)
    assert not found[:, :3].any()
    packed = torch.cat((torch.tensor([list(b"x ")]), row), 1)  # the space before it belongs to another document
    documents = torch.tensor([[0] * 2 + [1] * 9])
    found = chosen(packed, document_ids=documents, output_records=True).records[1]["mixture_of_depths"].kept_BT
    assert torch.equal(found[:, 2:], kept)
    for cuts in ([3], [1, 2, 3, 4], [5, 6]):
        cache = DynamicCache(config=chosen.config)
        parts = [chosen(part, past_key_values=cache).logits for part in row.tensor_split(cuts, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), alone.logits, rtol=0, atol=2e-6)
    cache.crop(3)  # the last token that is left is the comma
    again = chosen(row[:, 3:], past_key_values=cache, output_records=True)
    assert torch.equal(again.records[1]["mixture_of_depths"].kept_BT, kept[:, 3:])


def test_a_warm_up_keeps_fewer_and_fewer_other_tokens() -> None:
    chosen, row = model(capacity_warmup=0.5), torch.tensor([list(b"a" * 200)])
    counts = []
    for progress in (0.0, 0.1, 0.3, 0.5, 1.0):
        for mechanism in chosen.routing_modules():
            mechanism.advance(progress, None)
        out = chosen(row, output_records=True, routing="oracle")
        counts.append(int(out.records[1]["mixture_of_depths"].kept_BT.sum()))
    assert counts[0] == 200
    assert counts == sorted(counts, reverse=True)
    assert counts[-2:] == [1, 1]


def test_ids_are_read_from_a_tokenizer() -> None:
    ids, at = boundary_ids(byte_tokenizer())
    assert at == "first"
    plain = [i for i in byte_boundaries() if i < 128]
    assert [i for i in listed_ids(ids) if i < 128] == plain
    tokenizer = char_tokenizer(set("ab ,"))
    found, at = boundary_ids(tokenizer)
    assert at == "first"
    assert {tokenizer.convert_ids_to_tokens(i) for i in listed_ids(found)} >= {" ", ",", "<eos>"}
    assert not {tokenizer.convert_tokens_to_ids(c) for c in "ab"} & {*listed_ids(found)}


def test_a_training_replaces_the_word_tokenizer() -> None:
    entry = {"name": "mixture_of_depths", "decision": "boundary", "boundary": {"ids": "tokenizer"}}
    tokenizer = char_tokenizer(set("ab ,"))
    config = model_config({"mechanisms": [entry]}, 16, {"vocab_size": 7, "tokenizer": tokenizer})
    assert config.to_dict()["mechanisms"][0]["boundary"] == {"at": "first", "ids": boundary_ids(tokenizer)[0]}
    assert with_boundary_ids([{"name": "early_exit"}], tokenizer) == [{"name": "early_exit"}]
    with pytest.raises(ValueError, match="boundary\\.ids 'tokenizer' is replaced by ids when a training begins"):
        model(boundary={"ids": "tokenizer"})(torch.tensor([[1, 2]]))


def test_ranges() -> None:
    ids = [1, 2, 3, 7, 9, 10]
    assert as_ranges(ids) == ["1-3", 7, "9-10"]
    assert listed_ids(as_ranges(ids)) == ids
    assert Boundaries(ids=[5, "5-6"]).resolved() == [5, 6]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"boundary": {"ids": []}}, "boundary: ids lists no boundary token"),
        ({"boundary": {"ids": ["9-3"]}}, "got '9-3'"),
        ({"boundary": {"ids": ["x"]}}, "got 'x'"),
        ({"boundary": {"ids": [True]}}, "must be"),
        ({"boundary": {"at": "last"}}, "unknown mechanisms.0..boundary.at 'last'"),
        ({"boundary": {"ids": [3]}, "decision": "random"}, "which decision 'random' does not read"),
        ({"guidance": True}, "guidance trains scores, which decision 'boundary' does not read"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as found:
        model(**options)
    assert "\n" not in str(found.value)


def test_embeddings_have_no_ids() -> None:
    chosen = model()
    embedded = chosen.model.embed_tokens(torch.tensor([[1, 2]])).detach()
    with pytest.raises(ValueError, match="reads input_ids, but this call gives inputs_embeds"):
        chosen(inputs_embeds=embedded)


def test_it_has_no_router_unless_a_weight_reads_scores() -> None:
    assert not list(next(iter(model().routing_modules())).parameters())
    assert list(next(iter(model(weight="tanh").routing_modules())).parameters())
