"""Ways to decode a checkpoint with less work, ours and others', measured beside the checkpoint itself (the source)."""
