"""Studies (published experiments) that train models and compare their losses.

A new one is a file here and a line in `skipstone_studies/catalogue.py`.
"""
