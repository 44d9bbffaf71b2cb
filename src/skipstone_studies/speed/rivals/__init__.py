"""Ways to decode a checkpoint with less work, ours and others', for the study `decode_rivals`.

The checkpoint itself is called the source.
"""
