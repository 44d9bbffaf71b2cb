"""Floor 3.4: everything that turns a model and rows into numbers. Nothing here needs a run folder.

passes.py        oracle, causal, executed, forced: the passes of a model; inputs, masks and targets of a batch
summaries.py     what mechanisms did, by layer: one reader for each kind of record
record_meter.py  the same as numbers to log while training
losses.py        loss and accuracy of one pass over all rows, by difficulty and kind of token where the data tell them
flops.py         FLOPs and host syncs, counted while a pass runs, beside the cost model's
share.py         the share of the dense FLOPs that the decisions of causal passes need
compute.py       the share of the blocks' work that a token got
trace.py         what each layer did to each token of a sample
depth_map.py     the decision of each depth mechanism for each token of a text, and the loss of its prediction
model_view.py    what a report shows of a model
token_trace.py   both as plain numbers that JSON keeps, without torch
speed.py         tokens per second of models timed in turns, joules, bytes of the cache
overhead.py      the share of a training step that routing takes
"""
