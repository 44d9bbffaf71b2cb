"""Studies (published experiments) that time or compare models without training them.

A new one is a file here and a line in `skipstone_studies/catalogue.py`.
"""
