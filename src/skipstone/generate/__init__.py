"""Floor 4: generation. A small decode loop of our own that tells how much compute each token took.

engine.py           `generate` and `stream`: causal decisions, a cache, left-padded batches
text_generation.py  `stream_text`: text from a run folder or a saved model, what the command calls
drafts.py           what guesses several tokens: lookup, fewer blocks, a lower budget, another model
speculation.py      how many to guess, and which guesses stand
detokenizer.py      token ids -> text as it comes, whole characters only
"""

from __future__ import annotations

from skipstone.generate.engine import ends_of, generate, stream
from skipstone.generate.text_generation import stream_text

__all__ = ["ends_of", "generate", "stream", "stream_text"]
