"""Tokenizers: round trips, saved files, and fast encoding equal to the tokenizer's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from skipstone.data import encode, tokenizers
from skipstone.data.corpus import Corpus
from skipstone.data.encode import encode_documents, encode_each, text_bytes
from skipstone.data.tokenizers import bpe_tokenizer, build_tokenizer, byte_alphabet, byte_tokenizer, char_tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
KNOWN = set("abcdefghijklmnopqrstuvwxyz <>/,.'\n\té€😀")
BYTE = byte_tokenizer()
CHAR = char_tokenizer(KNOWN)
VERSE = "To be, or not to be: that is the question. "
BPE = bpe_tokenizer([VERSE * 3], 280)


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def corpus(train: tuple[str, ...], validation: tuple[str, ...] = ("x",)) -> Corpus:
    return Corpus(
        name="made", description="", licence="", readers={"train": lambda: train, "validation": lambda: validation}
    )


@given(TEXT)
@example("<eos><pad> a  b , . don't\r\n\0\x7f\x85\u2028\u200d e\u0301 é \ufeff")
def test_bytes_round_trip_any_text_and_are_the_bytes(text: str) -> None:
    found = ids(BYTE, text)
    assert found == list(text.encode())
    assert BYTE.decode(found) == text


@given(st.text(st.sampled_from(sorted(KNOWN)), max_size=60))
@example("<eos><pad><unk> a  b , . don't\n")
def test_known_characters_round_trip(text: str) -> None:
    found = ids(CHAR, text)
    assert len(found) == len(text)
    assert CHAR.decode(found) == text


@given(TEXT, st.lists(TEXT, max_size=3))
@example("<eos>", ["<unk>", ""])
def test_the_fast_way_equals_the_tokenizer(text: str, more: list[str]) -> None:
    for tokenizer in (BYTE, CHAR):
        assert encode._simple(tokenizer)[0] in ("byte", "char")
        fast = encode_each(tokenizer, [text, *more], np.dtype(np.uint32))
        slow = encode._call(tokenizer, [text, *more], np.dtype(np.uint32))
        assert [x.tolist() for x in fast] == [x.tolist() for x in slow]


def test_long_text_is_looked_up_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "CHUNK", 7)
    text = "the quick brown fox é€😀 Z" * 5
    assert next(iter(encode_each(CHAR, [text], np.dtype(np.uint16)))).tolist() == ids(CHAR, text)


def test_ids_are_what_the_docstring_says() -> None:
    assert BYTE.convert_tokens_to_ids(["<eos>", "<pad>"]) == [256, 257]
    assert len(BYTE) == 258
    assert ids(CHAR, "".join(sorted(KNOWN))) == list(range(len(KNOWN)))
    n = len(KNOWN)
    assert (CHAR.unk_token_id, CHAR.eos_token_id, CHAR.pad_token_id, len(CHAR)) == (n, n + 1, n + 2, n + 3)
    assert ids(CHAR, "aZZ") == [ids(CHAR, "a")[0], n, n]
    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())


def test_a_prompt_may_ask_for_special_tokens_and_a_corpus_never_does() -> None:
    for tokenizer in (BYTE, CHAR):
        assert tokenizer("a<eos>")["input_ids"][-1] == tokenizer.eos_token_id
        encoded = encode_documents(tokenizer, ["a<eos>", "<eos>b<pad>"])
        assert (encoded.ids == tokenizer.eos_token_id).sum() == 1
        assert encoded.ids[6] == tokenizer.eos_token_id
        assert tokenizer.pad_token_id not in encoded.ids
        assert tokenizer("a<eos>")["input_ids"][-1] == tokenizer.eos_token_id  # encoding left no mark


@pytest.mark.parametrize("tokenizer", [BYTE, CHAR, BPE], ids=["byte", "char", "bpe"])
def test_saved_files_are_all_that_auto_tokenizer_needs(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "a <eos> it 's , . \n\té€😀"
    assert ids(loaded, text) == ids(tokenizer, text)
    assert loaded.decode(ids(loaded, text)) == text
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert len(loaded) == len(tokenizer)
    assert encode._simple(loaded)[0] == encode._simple(tokenizer)[0]
    batch = loaded(["a", "abc"], padding=True)
    assert sorted(batch) == ["attention_mask", "input_ids"]
    assert batch["attention_mask"][0] == [0, 0, 1]
    again = build_tokenizer(f"pretrained:{tmp_path}", corpus(("a",)))
    assert ids(again, text) == ids(tokenizer, text)


def test_char_knows_train_and_validation() -> None:
    tokenizer = build_tokenizer("char", corpus(("ab",), ("bc",)))
    assert ids(tokenizer, "abcd") == [0, 1, 2, tokenizer.unk_token_id]


@given(TEXT)
@example("<eos><pad> a  b , . don't\r\n\0\x7f\x85\u2028\u200d e\u0301 é \ufeff")
def test_byte_pairs_round_trip_any_text(text: str) -> None:
    assert BPE.decode(ids(BPE, text)) == text


def test_byte_pairs_are_those_of_the_train_text_and_the_same_every_time() -> None:
    assert len(BPE) == 280
    assert BPE.convert_ids_to_tokens([278, 279]) == ["<eos>", "<pad>"]
    assert [BPE.decode([i]) for i in ids(BPE, "not to be")][-2:] == [" to", " be"]
    made = [build_tokenizer("bpe:280", corpus((VERSE * 2, VERSE), ("zzzzzzzz",))) for _ in range(2)]
    assert made[0].get_vocab() == made[1].get_vocab() == BPE.get_vocab()
    assert len(build_tokenizer("bpe:4096", corpus(("ab",)))) == 258  # no pair stands there twice


def test_merges_are_learnt_from_the_beginning_of_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "TRAINED_ON", 2 * len(VERSE))
    documents = iter([VERSE, VERSE + "zzzz" * 9, "never read"])
    assert bpe_tokenizer(documents, 280).get_vocab() == BPE.get_vocab()
    assert list(documents) == ["never read"]


@pytest.mark.parametrize("spec", ["chars", "pretrained:", "pretrained", "", "bpe"])
def test_an_unknown_tokenizer_names_what_is_allowed(spec: str) -> None:
    with pytest.raises(ValueError, match=r"unknown tokenizer .*allowed: bpe:SIZE, byte, char, pretrained:NAME_OR_PATH"):
        build_tokenizer(spec, corpus(("a",)))


@pytest.mark.parametrize("spec", ["bpe:", "bpe:257", "bpe:65537", "bpe:1e3", "bpe:٣٠٠", "bpe:-300"])
def test_a_size_out_of_range_is_one_clear_line(spec: str) -> None:
    with pytest.raises(ValueError, match=rf"a size from 258 to 65,536, such as bpe:1024, got '{spec}'"):
        build_tokenizer(spec, corpus(("a",)))


def test_a_pretrained_tokenizer_that_is_not_here_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer pretrained:.*could not be loaded") as caught:
        build_tokenizer(f"pretrained:{tmp_path / 'none'}", corpus(("a",)))
    assert "\n" not in str(caught.value)


def word_tokenizer(eos: str | None = "[E]") -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"to": 0, "be": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)


def test_other_tokenizers_are_called() -> None:
    assert encode._simple(word_tokenizer()) == ("", None)
    encoded = encode_documents(word_tokenizer(), ["to be", "", "be"])
    assert encoded.ids.tolist() == [0, 1, 3, 3, 1]
    assert encoded.document_starts.tolist() == [0, 3, 4]
    assert encoded.document_bytes.tolist() == [5, 0, 2]


def test_a_text_is_encoded_once_for_tokenizers_of_one_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, call = [], encode._call
    monkeypatch.setattr(encode, "_call", lambda *given: calls.append(given[1]) or call(*given))
    texts = ("to be", "be ?")
    found = [encode_documents(word_tokenizer(), texts).ids.tolist() for _ in range(2)]
    assert found == [[0, 1, 3, 1, 2]] * 2
    assert calls == [texts]
    assert encode_documents(word_tokenizer("[O]"), ("to be", "to")).ids.tolist() == [0, 1, 3, 0]
    assert calls == [texts, ("to be", "to")]
    monkeypatch.setattr(encode, "REMEMBERED", 3)  # a longer text is not kept
    assert encode_documents(word_tokenizer(), texts).ids.tolist() == found[0]
    assert len(calls) == 3


def test_several_documents_need_an_eos() -> None:
    assert encode_documents(word_tokenizer(None), ["to"]).ids.tolist() == [0]
    with pytest.raises(ValueError, match="no eos token"):
        encode_documents(word_tokenizer(None), ["to", "be"])


def test_ids_are_as_narrow_as_the_vocabulary_allows() -> None:
    assert encode_documents(BYTE, ["a"]).ids.dtype == np.uint16
    wide = char_tokenizer({chr(i) for i in range(0x4E00, 0x4E00 + 70_000) if not 0xD800 <= i < 0xE000})
    encoded = encode_documents(wide, ["一丁"])
    assert (encoded.ids.dtype, encoded.ids.tolist()) == (np.uint32, [0, 1])


@given(st.lists(TEXT, min_size=1, max_size=4), st.data())
def test_bytes_of_a_prefix(documents: list[str], data: st.DataObject) -> None:
    encoded = encode_documents(BYTE, documents)
    tokens = data.draw(st.integers(0, len(encoded.ids)))
    assert text_bytes(BYTE, encoded, tokens) == int((encoded.ids[:tokens] < 256).sum())


def test_bytes_of_a_prefix_of_characters() -> None:
    encoded = encode_documents(CHAR, ["aé", "€Zb"])  # a é eos € ? b
    assert [text_bytes(CHAR, encoded, n) for n in range(7)] == [0, 1, 3, 3, 6, 6, 8]
