"""Studies of the paper on Token-Selective Attention (arXiv 2605.05222), with additional controls.

published.py   the paper's figures                recipes.py      its model and training, at two scales
text.py        what the studies on text share judged.py       which claims hold
shakespeare.py its table, its sweep, controls     large.py        enwik8, and budgets on a corpus as large
copy_sort.py   its synthetic tasks                known_depth.py  tasks whose needed depth is known
mixed.py       text with such tasks in it         equal_flops.py  arms and rivals at equal FLOPs
"""
