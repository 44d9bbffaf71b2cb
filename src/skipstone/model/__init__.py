"""The configuration of a model, its construction, the decoder, and the Hugging Face model classes.

Here blocks (`nn`) and mechanisms are joined (floor 3 in docs/architecture.md).
"""
