"""Text sampled from a checkpoint, to adapt it on where its training text is not available.

After LLM-QAT (Liu et al. 2023, arXiv 2305.17888), which trains a quantised model on text that the full model generated.
There the first tokens are taken greedily from every start; here everything is sampled at temperature 1, so that texts
occur as often as the model finds them likely.

Shape letters: B texts of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor

from skipstone.adapt.source import load_dense, tokenizer_of
from skipstone.core import checksums
from skipstone.core.atomic_write import complete
from skipstone.core.plain_text import check_text
from skipstone.generate import ends_of, generate
from skipstone.model.causal_lm import SkipstoneForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VALIDATION = 20  # of so many texts, one goes to validation.txt: the second, so that a few are enough


def write(
    source: str,
    out: Path,
    *,
    tokens: int = 300_000,
    length: int = 256,
    batch: int = 64,
    start: str | None = None,
    seed: int = 0,
    dtype: str | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> None:
    """Sample texts from a checkpoint and write them to `train.txt` and `validation.txt` in the new folder `out`.

    One text in 20 goes to validation.txt; empty lines separate texts. source: folder or Hub name of a dense checkpoint.
    tokens: stop once all texts together have at least this many tokens. length: largest number of tokens of a text.
    batch: number of texts generated at a time. start: text that precedes each of them and is not written; None means
    the tokenizer's token that begins a text, or else the one that ends it. seed: seed of the sampling. dtype: dtype of
    the weights; None means float32. report: called after each batch with the number of tokens of all texts so far.

    Raises FileNotFoundError or ValueError for a source that cannot be read or is not dense, FileExistsError if `out` is
    not empty, and ValueError for numbers out of range, for a batch larger than memory, for a source without a tokenizer
    or, with `start` None, without a token that begins or ends a text, and for one that generates only empty texts.
    """
    for name, value in (("tokens", tokens), ("length", length), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    model = load_dense(source, dtype or "float32")
    tokenizer = tokenizer_of(source, model)
    begun = begin(tokenizer, start, source)
    if len(begun) + length > model.config.max_position_embeddings:
        raise ValueError(
            f"length ({length}) and start ({len(begun)}) are longer than the source's context, "
            f"{model.config.max_position_embeddings} tokens"
        )
    _check_memory(model, batch, len(begun) + length)
    with complete(out) as partial:
        partial.mkdir(parents=True)
        texts = _batches(model, tokenizer, torch.tensor([begun] * batch, device=model.device), length, seed)
        _fill(partial, texts, tokens, report, f"{source}: it writes nothing after {tokenizer.decode(begun)!r}")
        checksums.record(partial)


def _check_memory(model: SkipstoneForCausalLM, batch: int, tokens: int) -> None:
    """Raise ValueError if the cache and logits of `batch` texts of `tokens` tokens exceed the machine's memory."""
    logits = 3 * 4 * model.config.vocab_size  # fp32: as they are, divided by the temperature, and as probabilities
    size = batch * (tokens * round(model.cost(tokens=tokens).kv_bytes_per_token) + logits)
    memory = psutil.virtual_memory().total
    if size > memory:
        raise ValueError(
            f"batch ({batch:,}) is too large: texts of {tokens:,} tokens take {size / 2**30:,.0f} GiB, this machine "
            f"has {memory / 2**30:,.0f} GiB of memory"
        )


def _fill(
    folder: Path, batches: Iterator[list[tuple[str, int]]], tokens: int, report: Callable[[int], None], empty: str
) -> None:
    """Append generated texts to the two files in `folder`, batch by batch, until there are enough tokens.

    batches: lists of texts with their numbers of tokens. tokens: how many tokens are enough. report: called after each
    batch with the number so far. empty: the message of the ValueError that is raised for a batch without texts.
    """
    done = number = 0
    for texts in batches:
        if not texts:
            raise ValueError(f"{empty}; name another start")
        for text, size in texts:
            name = "validation.txt" if number % VALIDATION == 1 else "train.txt"
            with (folder / name).open("a", encoding="utf-8") as file:
                file.write(f"{text}\n\n")
            done, number = done + size, number + 1
        report(done)
        if done >= tokens and number > 1:
            return


def begin(tokenizer: PreTrainedTokenizerBase, start: str | None, source: str) -> list[int]:
    """Return the ids of the tokens with which each sampled text begins.

    start: their text; None means the tokenizer's token that begins a text, or else the one that ends it. source: name
    of the checkpoint, for messages. Raises ValueError if there is no such token, or if `start` is empty or not valid
    Unicode.
    """
    if start is not None:
        check_text(start, "start")
        ids: list[int] = tokenizer(start, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"start must not be empty, got {start!r}; leave it out for the token that begins a text")
    else:
        ids = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None][:1]
    if not ids:
        raise ValueError(f"{source}: its tokenizer has no token that begins or ends a text; name a start")
    return ids


def _batches(
    model: SkipstoneForCausalLM, tokenizer: PreTrainedTokenizerBase, begun_BT: Tensor, length: int, seed: int
) -> Iterator[list[tuple[str, int]]]:
    """Yield, without end, batches of generated texts with their numbers of tokens; empty texts are left out.

    begun_BT: int64, the ids with which every text begins, one row for each text. length: largest number of tokens of a
    text. seed: seed from which the batches' seeds are drawn.
    """
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, *ends_of(model)} - {None}
    seeds = Random(seed)  # not seed + 1, + 2: the next seed would write the same texts
    while True:
        own = seeds.getrandbits(48)
        ids_BT = generate(model, begun_BT, max_new_tokens=length, temperature=1.0, seed=own, eos_token_id=sorted(ends))
        rows = [_until(row, ends) for row in ids_BT[:, begun_BT.shape[1] :].tolist()]
        texts = [(tokenizer.decode(row, skip_special_tokens=True).strip(), len(row)) for row in rows]
        yield [text for text in texts if text[0]]


def _until(row: list[int], ends: set[int]) -> list[int]:
    """Return the token ids of `row` before the first that is one of `ends`."""
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]
