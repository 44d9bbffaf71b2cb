"""Timings, which make no run. A new one is a file here and a line in `catalogue.py`."""
