"""Studies of the paper on Token-Selective Attention (arXiv 2605.05222), with additional controls.

published.py    the paper's figures
recipes.py      the paper's model and training, at two scales
text.py         what the studies on text share: figures of a run, sections of a page
judged.py       which claims hold
overfitting.py  losses of runs that read their text many times
shakespeare.py  the paper's table and sweep over lambda on Tiny-Shakespeare, and controls
large.py        enwik8, and several FLOP budgets on a corpus as large
copy_sort.py    the paper's synthetic tasks
known_depth.py  a task in which it is known which tokens need depth
mixed.py        text with spans of such a task
equal_flops.py  compared models and their rivals at equal FLOPs
"""
