"""Floor 1: the interface between blocks and mechanisms (tokens, selections, records), the caches, and file helpers.

No module here has parameters.
"""
