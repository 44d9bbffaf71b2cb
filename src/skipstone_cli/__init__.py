"""The `skipstone` command. Light on purpose: torch and transformers are imported inside a verb, never here."""

from __future__ import annotations

# Whether this process is the command. `main` sets it; `skipstone` then loads torch only when that is needed.
running = False
