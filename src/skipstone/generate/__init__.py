"""Floor 4: generation. A small decode loop of our own that tells how much compute each token took.

engine.py   `generate` and `stream`: causal decisions, a cache, left-padded batches
compute.py  from records to the share of the blocks' work that a token got
text.py     token ids -> text as it comes, whole characters only
run.py      `stream` from a run folder or a saved model: what the command calls
"""

from __future__ import annotations

from skipstone.generate.engine import ends_of, generate, stream

__all__ = ["ends_of", "generate", "stream"]
