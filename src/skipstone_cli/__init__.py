"""The `skipstone` command, which imports torch and transformers only inside its verbs, so that it starts quickly."""

from __future__ import annotations
