"""Studies of what models lose and learn. A new one is a file here and a line in `catalogue.py`."""
