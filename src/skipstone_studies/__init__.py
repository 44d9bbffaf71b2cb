"""Floor 4.5: every table that is published, made by one command. Nothing is measured by a script of its own.

study.py       `Study` and `Column`: what a study is
catalogue.py   all studies by name
quality/       studies of what models lose and learn, a file each (a folder where there are many of one paper)
speed/         timings, a file each
isoflop/       grids at equal training FLOPs, whose recipes and sizes a user names
adapting.py    what makes a run of a checkpoint: adapting it, on text that it may have generated itself
record.py      one JSON record a run
page.py        records -> results/NAME.md, pure
measure.py     what is measured of one run, and of all runs of a seed together
timing.py      training steps and forward passes of several models, timed interleaved
gates.py       what soft gates claim as saved, what is really skipped, the same weights executed otherwise
text_blocks.py losses by blocks of the validation text
intervals.py   confidence intervals of paired differences, and the smallest difference that a study could have seen
claims.py      published figures beside ours; which claims hold, by the interval of what was measured
headroom.py    whether depth pays at all where routing is judged
charts.py      pictures of loss against a quantity on a logarithmic axis
corpus.py      the first of several corpora that can be had
session.py     what is still to do, done so that it can be stopped anywhere
ledger.py      what all records together took, and which claims they carry
pace.py        a line that tells what is left
readme.py      a table inside a README, between two marks
run.py         `reproduce` and `describe`
"""
