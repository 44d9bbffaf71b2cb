"""Floor 4: measuring what a model does: quality, cost, speed.

run.py           `evaluate`: losses, accuracy, mechanisms and FLOPs of one run
harness.py       `evaluate_tasks`: lm-evaluation-harness on one run
compare.py       `compare`: runs beside each other; measurements.py what is measured of each, rows.py how it is written
budgets.py       what one model executes and loses at several budgets; `calibrate_run` measures its budget table
ways.py          oracle, causal, executed, forced: the ways to run a model, and which of them it has
opened.py        a run or a saved model, ready to be measured
losses.py        loss and accuracy of one way over all rows; accuracy.py bins of difficulty and headroom; kinds.py
                 loss and depth by kind of token
hard.py          the same for neurons that each use their strongest activation alone
statistics.py    what mechanisms did by layer, from records; layers.py the same as tables
counting.py      FLOPs counted beside the cost model's; flops.py the counter
speed.py         tokens per second, runs in turns; energy.py joules; memory.py the cache; overhead.py what routing costs
tables.py        sections as rich tables and Markdown
"""
