"""Weights in the layouts in which papers released them, one file a layout: read strictly, and written back.

files.py          a .pt or .safetensors file as plain tensors, nothing in it executed
names.py          from released names to ours, every one of them accounted for
layout.py         what a layout is
tsa.py            Token-Selective Attention
polychromatic.py  PolychromaticLM, whose feed-forward is PolyGLU
convert.py        the table of layouts; file to model folder and back
"""
