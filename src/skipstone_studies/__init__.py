"""The studies (experiments) behind all published tables; `skipstone reproduce NAME` runs one.

study.py       `Study` and `Column`: the definition of a study
catalogue.py   all studies by name
quality/       studies of losses, one file each (a folder for the many of one paper)
speed/         timings, one file each
isoflop/       grids at equal training FLOPs, with recipes and sizes chosen by the user
adapting.py    runs that adapt a checkpoint, on text that it may have generated itself
record.py      one JSON record per run
page.py        renders records as results/NAME.md
study_page.py  the same page as HTML, with pictures
column_chart.py  a column of a study's table as a picture
measure.py     measurements of a run in training, of a finished run, and of all runs of a seed together
timing.py      training steps and forward passes of several models, timed interleaved
gates.py       savings that soft gates claim and savings that hard passes realise
text_blocks.py losses by blocks of the validation text
intervals.py   confidence intervals of paired differences, and the smallest detectable difference
claims.py      published figures beside ours, and verdicts on claims by confidence intervals
protocol.py    models at equal training FLOPs: planning, tuning, training, measuring
protocol_page.py  sections of the pages of studies that follow the protocol
text_loss.py   losses of rows that are evenly spaced over a split
benefit.py     how much each block lowers each token's loss, and what a router could know of it
benefit_page.py  Markdown tables of what benefit.py measures
headroom.py    whether more depth lowers the loss, without which routing cannot be judged
charts.py      charts of loss against a quantity on a logarithmic axis
corpus.py      the first available of several corpora
session.py     runs what is missing of a study, and can be interrupted at any time
side_by_side.py  several arms at a time, each in a process of its own
ledger.py      costs and claims of all records; its page is ledger_page.py, its pictures ledger_charts.py
pace.py        messages with the remaining time
readme.py      a table inside a README, between two marks
run.py         `reproduce` and `describe`
"""
