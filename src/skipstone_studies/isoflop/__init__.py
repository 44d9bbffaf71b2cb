"""Equal training FLOPs: arms x budgets x sizes, the parabolas through their losses, and what follows from them.

spec.py      `GridSpec` and `GridSize`: what is asked for, read strictly; the grids by scale
grid.py      which runs that makes: recipes, steps, FLOPs; whether the corpus has text enough to be read once
estimate.py  every run with its FLOPs and hours, before anything is trained
measure.py   figures of one finished run
curves.py    records -> points of the grid -> the parabola of an arm at a budget, its optimum, where it crosses a level
result.py    points -> optima, shares of FLOPs, equal times, with their intervals
notes.py     result -> what a reader must know beside the tables
table.py     result -> Markdown
page.py      result -> pictures and one HTML page
run.py       `isoflop`: the stages of a grid, each a `Session`
"""
