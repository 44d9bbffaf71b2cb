"""Weights in the layouts in which papers released them, one file per layout: read strictly, and written back.

files.py          a .pt or .safetensors file as plain tensors, without executing anything in it
names.py          maps released names to ours; every name must be known
layout.py         `ReleasedLayout`: reader, writer and options of a layout
tsa.py            Token-Selective Attention
polychromatic.py  PolychromaticLM, whose feed-forward is PolyGLU
convert.py        the table of layouts; converts a file to a model folder and back
"""
