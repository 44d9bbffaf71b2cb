"""Measurements of a model on rows of data, for which no run folder is needed.

A record is what a mechanism decided in one forward pass, as tensors (`core/records.py`).

    passes.py        oracle, causal, executed, forced: the passes of a model; inputs, masks and targets of a batch
    summaries.py     figures of mechanisms by layer: one reader for each kind of record
    record_meter.py  these figures as means over training passes, for the log
    router_health.py whether routers decide anything, for warnings while training
    losses.py        loss and accuracy of one pass over all rows, by difficulty and kind of token where they are known
    flops.py         FLOPs and host syncs, counted while a pass runs, and the cost model's prediction
    bytes_read.py    bytes of weights that a decoding step reads
    share.py         the share of the dense FLOPs that the decisions of causal passes need
    compute.py       the share of the blocks' matrix FLOPs executed for each token
    trace.py         the decisions of each layer for each token of a sample
    allocation.py    the compute of groups of tokens, and whether it follows difficulty
    depth_map.py     the decision of each depth mechanism for each token of a text, and the loss of its prediction
    model_view.py    the part of a report about the model itself
    token_trace.py   what trace.py and model_view.py return: plain values for JSON, without torch
    speed.py         tokens per second of models timed in turns, joules, bytes of the cache
    overhead.py      the share of a training step that routing takes
"""
