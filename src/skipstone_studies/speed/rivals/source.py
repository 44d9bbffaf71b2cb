"""The checkpoint that is decoded (the source), and how far the predictions of a way to decode it are from its own.

The distance is KL(source || way) on several texts.
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
import tarfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipstone.core.strict import PlainDict
from skipstone.data.corpora import load_corpus
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.loading import quiet
from skipstone.model.pretrained import load_pretrained, load_tokenizer
from skipstone_studies.adapting import source_path
from skipstone_studies.study import Figures

Logits = Callable[[Tensor], Tensor]  # int64 [1, T] to [T, V]

ROWS, LENGTH = 4, 128  # of each text
CALIBRATION = ("wikitext-2", "validation")  # what thresholds are set by; no figure is of it


@cache
def source(name: str) -> SkipstoneForCausalLM:
    """Return the source model (the checkpoint that is decoded) in fp32, in evaluation mode, loaded once per process.

    Every call returns the same object, so callers copy it before they change it. name: its folder or NAME.gguf in the
    folder SKIPSTONE_DATA, else a name that is known on the Hub. Raises FileNotFoundError if neither exists.
    """
    with quiet():
        return load_pretrained(source_path(name), torch.float32).eval()


@cache
def tokenizer(name: str) -> Any:
    """Return the tokenizer of the source model (the checkpoint that is decoded); it is loaded only once per process.

    name: the model's folder or NAME.gguf in the folder SKIPSTONE_DATA, else a name that is known on the Hub. Raises
    FileNotFoundError if neither exists.
    """
    with quiet():
        return load_tokenizer(source_path(name))


def _texts() -> dict[str, str]:
    """Return three texts by title, on which no model was adapted: "plays", "manual" and "code".

    The last two are the manual of the Python language and code of its library.
    """
    code = [Path(str(module.__file__)).read_text(encoding="utf-8") for module in (tarfile, argparse)]
    return {
        "plays": "\n\n".join(load_corpus("tiny-shakespeare").documents("validation")),
        "manual": "\n\n".join(pydoc_data.topics.topics.values()),
        "code": "\n\n".join(code),
    }


@cache
def rows(name: str) -> Mapping[str, Tensor]:
    """Return the rows on which predictions of ways to decode are compared: {title of a text: token ids}.

    The texts are "plays", "manual" and "code"; ids are int64 [ROWS, LENGTH], 4 rows of 128 tokens, which begin at equal
    distances in the text. name: the name of the source model (the checkpoint that is decoded), whose tokenizer is used.
    """
    return {title: _drawn(name, text, ROWS) for title, text in _texts().items()}


@cache
def calibration(name: str, count: int = 4) -> Tensor:
    """Return token ids, int64 [count, LENGTH], of the text on which thresholds are set; no figure is measured on it.

    name: the name of the source model (the checkpoint that is decoded), whose tokenizer is used. count: number of rows,
    which begin at equal distances in the text. LENGTH is 128.
    """
    corpus, split = CALIBRATION
    return _drawn(name, "\n\n".join(load_corpus(corpus).documents(split)), count)


def _drawn(name: str, text: str, count: int) -> Tensor:
    ids = tokenizer(name)(text[: 400 * LENGTH * count], return_tensors="pt", verbose=False)["input_ids"][0]
    begin = ids[:1] if ids[0] == tokenizer(name).bos_token_id else ids[:0]  # some models need it in every row
    length = LENGTH - len(begin)
    step = (len(ids) - length) // count
    return torch.stack([torch.cat((begin, ids[len(begin) :][i * step : i * step + length])) for i in range(count)])


@cache
def hidden(name: str, title: str) -> Tensor:
    """Return the source model's last hidden states after the final norm, [ROWS, LENGTH, width], on one text.

    name: the name of the source model (the checkpoint that is decoded). title: the text, a key of `rows`, of which ROWS
    (4) rows of LENGTH (128) tokens are read.
    """
    with torch.inference_mode():
        return source(name).model(rows(name)[title]).last_hidden_state  # type: ignore[return-value]


@torch.inference_mode()
def distance(name: str, logits: Logits) -> Figures:
    """Return how far the predictions of one way to decode are from the source model's, by text.

    name: the name of the source model. logits: a function that computes the way's logits [T, V] after each of T token
    ids, int64 [1, T], for a vocabulary of V tokens. The result has for each text by title: `kl`, KL(source || way) in
    nats per token; `agreement`, the share of tokens after which both find the same token most likely; `perplexity` of
    the way; `increase`, this perplexity divided by that of the source, minus 1. Its key `worst` is the largest KL of
    all texts.
    """
    found: PlainDict = {title: _distance(name, title, ids, logits) for title, ids in rows(name).items()}
    return {**found, "worst": max(of["kl"] for of in found.values())}


def _distance(name: str, title: str, ids_RT: Tensor, logits: Logits) -> Figures:
    head, total = source(name).lm_head, {"kl": 0.0, "agreement": 0.0, "nats": 0.0, "source": 0.0}
    for ids_T, state_TD in zip(ids_RT, hidden(name, title), strict=True):
        theirs, ours = head(state_TD).log_softmax(-1), logits(ids_T[None]).float().log_softmax(-1)
        total["kl"] += float((theirs.exp() * (theirs - ours)).sum(-1).mean())
        total["agreement"] += float((theirs.argmax(-1) == ours.argmax(-1)).float().mean())
        for who, x in (("nats", ours), ("source", theirs)):
            total[who] -= float(x[:-1].gather(1, ids_T[1:, None]).mean())
    mean = {what: value / len(ids_RT) for what, value in total.items()}
    perplexity = {"perplexity": math.exp(mean["nats"]), "increase": math.exp(mean["nats"] - mean["source"]) - 1}
    return {"kl": mean["kl"], "agreement": mean["agreement"], **perplexity}
