"""A loaded run or saved model: the model on its device, and rows to measure it on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from skipstone.data.config import DataConfig
from skipstone.data.prepare import PreparedData, prepare
from skipstone.measure.passes import Pass, passes_of
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.runs import Run


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedRun:
    """A run or saved model on its device, with data to measure it on.

    run: the `Run`, which reads its folder. model: its model, in evaluation mode. data: rows of one split; None for a
    saved model without a named corpus. passes: the kinds of forward pass that the model supports, by name: "oracle"
    (decides as in training), "causal" (without later tokens), "executed" (the same, skipping) and "forced" (keeps the
    tokens marked as needing depth). unavailable: why others are missing, by name.
    """

    run: Run
    model: SkipstoneForCausalLM
    data: PreparedData | None
    passes: dict[str, Pass]
    unavailable: dict[str, str]

    @property
    def primary(self) -> Pass:
        """The pass whose figures represent the model: executed (really skips), else oracle (as trained), or forced.

        Forced means that blocks keep the tokens that a synthetic corpus marks as needing depth. Raises ValueError for a
        model that needs the caller to decide which tokens to keep, on data that do not state it.
        """
        for name in ("executed", "oracle", "forced"):
            if name in self.passes:
                return self.passes[name]
        raise ValueError(
            f"{self.run.name}: decision 'forced' makes no decisions of its own, so it is measured on data of known "
            "difficulty only"
        )

    @property
    def context(self) -> int:
        """The number of tokens per row of the run's data, at most the model's maximum; without data, that maximum."""
        limit = self.model.config.max_position_embeddings
        return limit if self.data is None else min(self.data.config.context, limit)


def load_run(
    folder: Path, split: str = "validation", corpus: str | None = None, context: int | None = None
) -> LoadedRun:
    """Load a run or saved model with the rows of a split, ready to be measured.

    folder: the folder of the run or saved model. split: train, validation or test. corpus: name of the corpus, such as
    "enwik8"; None means that of the run's recipe; a saved model has no recipe, so its data are then None. context:
    tokens of a row; None means the number in the recipe, or for a saved model its maximum, but at most 1,024. The model
    is placed on the GPU if there is one. Raises FileNotFoundError for a folder or corpus that does not exist, and
    ValueError for a corpus with more token ids, or a context with more tokens, than the model has.
    """
    run = Run(folder)
    model = run.load_model().eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    data = _data(run, model, split, corpus, context)
    if data is not None:
        _check(run, model, data)
    was_forced = not run.is_saved_model and run.config()["train"].get("routing") == "difficulty"
    passes, unavailable = passes_of(model, None if data is None else data.config.corpus, was_forced)
    return LoadedRun(run=run, model=model, data=data, passes=passes, unavailable=unavailable)


def _data(
    run: Run, model: SkipstoneForCausalLM, split: str, corpus: str | None, context: int | None
) -> PreparedData | None:
    if corpus is None and run.is_saved_model:
        return None
    own = None if run.is_saved_model else run.data_config()
    if own is not None and corpus in (None, own.corpus):
        config = own if context is None else DataConfig(**{**vars(own), "context": context})
    else:
        usual = own.context if own is not None else min(model.config.max_position_embeddings, 1024)
        config = DataConfig(corpus=str(corpus), context=context or usual)
    return prepare(config, tokenizer=run.load_tokenizer(), train=False, split=split)


def _check(run: Run, model: SkipstoneForCausalLM, data: PreparedData) -> None:
    if data.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{run.name}: corpus {data.config.corpus!r} has {data.vocab_size} token ids, the model has "
            f"{model.config.vocab_size}; a saved model needs its tokenizer beside it"
        )
    if data.config.context > model.config.max_position_embeddings:
        raise ValueError(
            f"{run.name}: context {data.config.context} is longer than the model's "
            f"{model.config.max_position_embeddings}"
        )


def batches(
    data: PreparedData, batch_size: int, device: torch.device, rows: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """Yield the rows of `data.validation` in order, as batches on `device`.

    A batch is a dict of int64 tensors [rows, tokens] by name, such as "input_ids". batch_size: rows of a batch. rows:
    read only the first `rows` rows; None means all of them.
    """
    total = len(data.validation) if rows is None else min(rows, len(data.validation))
    for start in range(0, total, batch_size):
        items = data.validation.__getitems__(range(start, min(start + batch_size, total)))
        yield {name: x.to(device) for name, x in data.collate(items).items()}
