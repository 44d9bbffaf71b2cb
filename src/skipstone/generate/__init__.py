"""Generation, by a small decode loop that also returns the share of the blocks' compute spent on each token.

engine.py           `generate` and `stream`: causal decisions, a cache, left-padded batches
text_generation.py  `stream_text`: text from a run folder or a saved model, as the command prints it
prompt.py           checks of the prompt, its mask, and the ids that pad and end a text
drafts.py           sources of guesses for speculative decoding: lookup, the model made cheaper, another model
head_draft.py       drafts by a trained draft head, which reads the model's hidden states
build_draft.py      drafts from the names that users write
speculation.py      the number of tokens to draft, and the acceptance of drafted tokens
detokenizer.py      streaming decoding of token ids, in whole characters
"""

from __future__ import annotations

from skipstone.generate.engine import generate, stream
from skipstone.generate.prompt import ends_of
from skipstone.generate.text_generation import stream_text

__all__ = ["ends_of", "generate", "stream", "stream_text"]
