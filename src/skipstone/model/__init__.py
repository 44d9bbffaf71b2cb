"""The configuration of a model, its construction, the decoder, and the Hugging Face model classes.

This package joins blocks (`nn`) and mechanisms (floor 3 in docs/architecture.md).
"""
