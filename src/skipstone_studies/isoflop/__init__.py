"""Equal training FLOPs: arms x budgets x sizes, the parabolas through their losses, and what follows from them.

spec.py     `Spec` and `Size`: what is asked for, read strictly; the grids by scale
grid.py     which runs that makes: their recipes, steps and FLOPs
corpus.py   how much text there is, and that none of it is read twice
clock.py    how fast this machine trains each model, measured within seconds
plan.py     the estimate: every run with its FLOPs and hours, before anything is trained
measure.py  figures of one finished run
session.py  the runs, one line each; stopped anywhere, gone on with
points.py   records -> points of the grid
fit.py      the parabola, its optimum, where it crosses a level
curves.py   an arm at a budget: points, parabola, forward FLOPs by size
times.py    the same seconds instead of the same FLOPs
findings.py points -> optima, shares of FLOPs, with their spread
table.py    findings -> Markdown
charts.py   findings -> SVG
page.py     all of it on one page
run.py      `isoflop`
"""
