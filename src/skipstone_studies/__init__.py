"""Floor 4.5: every table that is published, made by one command. Nothing is measured by a script of its own.

study.py       `Study` and `Column`: what a study is
quality/       the studies, a file each (a folder where there are many of one paper), and the table of them
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
run.py         `reproduce` and `describe`
"""
