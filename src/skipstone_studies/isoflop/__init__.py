"""IsoFLOP studies: recipes (arms) at several sizes and equal training FLOPs, compared by parabolas of loss.

A grid is all runs of such a study. A cell is one of its runs whatever the seed: arm, budget of training FLOPs, size and
learning rate. The base is the arm with which the others are compared.

    spec.py      `GridSpec` and `GridSize`: the specification of a grid; default grids by scale
    grid.py      the runs of a grid: recipes, steps, FLOPs; whether the corpus suffices
    estimate.py  FLOPs and hours of every run, before anything is trained
    curves.py    fits records by parabolas of loss over size; whether depth pays
    result.py    optima, shares of FLOPs and losses after equal times, with confidence intervals
    table.py     the tables and sentences of the result
    page.py      renders the result as Markdown and as one HTML page with charts
    run.py       `isoflop`: the stages of a grid; figures of one finished run
"""
