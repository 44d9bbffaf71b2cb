"""The `skipstone` command. It imports torch and transformers only inside verbs, so that it starts quickly."""

from __future__ import annotations

# Whether this process is the command, set by `main`; `skipstone` then loads torch only when it is needed.
running = False
