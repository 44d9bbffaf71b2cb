"""Streaming decoding of token ids to text, in whole characters.

Token ids cannot be decoded one by one: a character may extend over several tokens, and some tokenizers write a word's
space only if another token precedes it. So the last few ids are decoded together, and only new, complete text is
returned. The pieces joined equal the text decoded at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 8  # ids decoded before the new ones; more than the four bytes of the longest UTF-8 character
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are no character, or not one yet


class Detokenizer:
    """A streaming decoder that turns token ids into text, in whole characters.

    The pieces that `push` and `flush` return, joined, are the decoded text of all new ids. tokenizer: the model's
    tokenizer. prompt: ids before the first new one, on which the text of the new ones may depend; their own text is not
    returned.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)[-CONTEXT:]
        self._done = len(self._decoded())  # characters of the window that are handed out
        self.waiting = False  # whether the last character lacks bytes

    def push(self, token: int) -> str:
        """Add a token id and return the text that it completes; empty while a character lacks some of its bytes."""
        self._ids.append(token)
        text = self._decoded()
        self.waiting = text.endswith(INCOMPLETE)
        # Everything before a last incomplete character is final, including bytes that are no text.
        new = self._take(text[:-1] if self.waiting else text)
        if not self.waiting:
            self._ids = self._ids[-CONTEXT:]
            self._done = len(self._decoded())
        return new

    def flush(self) -> str:
        """Return the text of the remaining bytes, which never became a whole character (replacement characters)."""
        return self._take(self._decoded())

    def _take(self, text: str) -> str:
        new, self._done = text[self._done :], max(self._done, len(text))
        return new

    def _decoded(self) -> str:
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)
