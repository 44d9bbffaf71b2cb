"""Floor 0: tensor functions without parameters. `reference` is the specification; fast backends stand beside it."""
