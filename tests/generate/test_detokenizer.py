"""Streamed pieces are whole characters, and together equal the text decoded at once."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from skipstone.data.tokenizers import byte_tokenizer, char_tokenizer
from skipstone.generate.detokenizer import INCOMPLETE, Detokenizer


def word_tokenizer() -> PreTrainedTokenizerBase:
    """As Llama's: a word carries its space before it, which decoding takes from the first word."""
    words = {"<unk>": 0, "\u2581so": 1, "\u2581it": 2, "s": 3, "\u2581goes": 4}
    backend = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], prompt: list[int]) -> list[str]:
    text = Detokenizer(tokenizer, prompt)
    return [*(text.push(token) for token in ids), text.flush()]


def test_characters_come_whole() -> None:
    ids = list("né€🙂!".encode())
    got = pieces(byte_tokenizer(), ids, list(b"Say: "))
    assert got == ["n", "", "é", "", "", "€", "", "", "", "🙂", "!", ""]


@pytest.mark.parametrize(
    "raw", [b"\xff\xff\xffok", b"a\xe2\x82", b"\xf0\x9f\xff\xe2\x82\xac", b"\xe2\x82\xe2\x82\xac.", b"\x80" * 30]
)
def test_bytes_that_are_no_text_are_shown_and_lose_nothing(raw: bytes) -> None:
    got = pieces(byte_tokenizer(), [*raw], [*b"ab"])
    assert "".join(got) == raw.decode(errors="replace")
    assert got[-1] in ("", INCOMPLETE)  # never more than one character waits


def test_a_long_text_is_decoded_through_a_short_window() -> None:
    text = "Ein schöner Tag 🙂, 是的 — ça va? " * 5
    assert "".join(pieces(byte_tokenizer(), [*text.encode()], [*"früh ".encode()])) == text


def test_spaces_between_words_stay() -> None:
    tokenizer = word_tokenizer()
    assert pieces(tokenizer, [2, 3, 4, 4], [1]) == [" it", "s", " goes", " goes", ""]


def test_special_tokens_are_not_text() -> None:
    tokenizer = char_tokenizer({"a", "b"})
    assert tokenizer.eos_token_id is not None
    assert pieces(tokenizer, [0, tokenizer.eos_token_id, 1], [0]) == ["a", "", "b", ""]
