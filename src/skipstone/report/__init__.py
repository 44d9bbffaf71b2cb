"""Floor 4: one self-contained HTML page about runs.

palette.py   colours that the colour-blind can tell apart
svg.py       SVG elements as escaped strings
axes.py      scales, ticks, the frame of a chart
charts.py    lines, bars, stacked bars
layers.py    the tokens x layers picture and coloured text
anatomy.py   one causal pass over validation text, as plain numbers
mixing.py    what PolyGLU's neurons mix, of the same pass
mixes.py     its pictures
budgets.py   loss by budget, from files of `skipstone eval --budget --json`
page.py      runs -> what the template shows
run.py       `write_report`
"""
