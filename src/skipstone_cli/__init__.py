"""The `skipstone` command. Light on purpose: torch and transformers are imported inside a verb, never here."""
