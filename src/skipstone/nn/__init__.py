"""Parts of the decoder, with the parameter names of Hugging Face Llama; they know no mechanism.

They may import `ops` and `core` only (floor 2 in docs/architecture.md).
"""
