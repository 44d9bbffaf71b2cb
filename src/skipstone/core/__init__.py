"""The interface between blocks and mechanisms (tokens, selections, records), the caches, and file helpers.

No module here has parameters, and only `ops` is imported (floor 1 in docs/architecture.md).
"""
