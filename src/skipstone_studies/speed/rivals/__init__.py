"""Implementations of the ways to decode a checkpoint that `decode_rivals` and `decode_batches` time, ours and others'.

The checkpoint itself is called the source.
"""
