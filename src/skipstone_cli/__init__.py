"""The `skipstone` command. It imports torch and transformers only inside verbs, so that it starts quickly."""

from __future__ import annotations
