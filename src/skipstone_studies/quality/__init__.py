"""Studies of losses. A new one is a file here and a line in `catalogue.py`."""
