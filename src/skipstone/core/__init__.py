"""The interface between blocks and mechanisms (tokens, selections, records of decisions), the caches, and file helpers.

No module here has parameters, and only `ops` is imported (floor 1 in docs/architecture.md).
"""
