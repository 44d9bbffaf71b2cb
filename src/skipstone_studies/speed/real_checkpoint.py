"""A real checkpoint beside transformers: logits, greedy text and perplexity of one text, by both.

    python -m skipstone_studies.speed.real_checkpoint SOURCE TEXT_FILE

SOURCE is a folder, a hub name or a .gguf file with a tokenizer.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from skipstone.core.strict import PlainDict
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.loading import quiet
from skipstone.model.pretrained import load_pretrained, load_tokenizer
from skipstone_studies.speed import parity

START, WINDOW = 2000, 512  # bytes of the text that are left out, tokens of one window
PROMPT, NEW = 24, 40  # tokens


@torch.no_grad()
def logits_of(model: SkipstoneForCausalLM | PreTrainedModel, windows: list[Tensor]) -> list[Tensor]:
    """Return the logits that `model` gives for each window of tokens, in fp32, each [1, T, V].

    windows: token ids, int64 [1, T] each, for T tokens. V is the size of the vocabulary.
    """
    return [model(window, use_cache=False).logits.float() for window in windows]


def perplexity(logits: list[Tensor], windows: list[Tensor]) -> float:
    """Return exp of the mean cross-entropy of all tokens but the first of each window.

    logits: for each window a tensor [1, T, V], for T tokens and V entries of the vocabulary. windows: token ids, int64
    [1, T] each.
    """
    nats = [
        torch.nn.functional.cross_entropy(found[0, :-1], window[0, 1:], reduction="sum")
        for found, window in zip(logits, windows, strict=True)
    ]
    return math.exp(float(sum(nats)) / sum(window.shape[1] - 1 for window in windows))


def measure(source: str | Path, text: str, windows: int = 1) -> PlainDict:
    """Compare our model of a checkpoint with transformers' on one text: logits, greedy text and perplexity.

    source: folder, Hub name or .gguf file with a tokenizer. text: the text; its first 2,000 bytes are left out.
    windows: number of windows of 512 tokens that are read after them. Keys of the result: "parameters", "tokens"
    (number evaluated), "max relative error" (of the logits), "greedy text equal", "text" (our greedy continuation),
    "perplexity, ours" and "perplexity, theirs". Raises ValueError without a tokenizer.
    """
    with quiet():
        tokenizer = load_tokenizer(source)
        if tokenizer is None:
            raise ValueError(f"{source}: it has no tokenizer beside it")
        ids: Tensor = tokenizer(text.encode()[START:].decode(errors="ignore"), return_tensors="pt").input_ids
        pieces = [ids[:, i * WINDOW : (i + 1) * WINDOW] for i in range(windows)]
        found: dict[str, list[Tensor]] = {}
        texts: dict[str, list[list[int]]] = {}
        parameters = 0
        for name, load in (("ours", load_pretrained), ("theirs", parity.theirs)):  # one after the other: one at a time
            model = load(source, torch.float32)
            parameters = model.num_parameters()
            found[name] = logits_of(model, pieces)
            texts[name] = parity.greedy(model, ids[:, :PROMPT], NEW)
            del model
    errors = [parity.relative_error(a, b) for a, b in zip(found["ours"], found["theirs"], strict=True)]
    return {
        "parameters": parameters,
        "tokens": sum(piece.shape[1] for piece in pieces),
        "max relative error": max(errors),
        "greedy text equal": texts["ours"] == texts["theirs"],
        "text": tokenizer.decode(texts["ours"][0]),
        **{f"perplexity, {name}": perplexity(logits, pieces) for name, logits in found.items()},
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]).read_text(encoding="utf-8")), indent=1))  # noqa: T201
