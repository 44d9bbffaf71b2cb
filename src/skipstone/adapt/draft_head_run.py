"""Training of a draft head, which guesses the next tokens, for a run or a saved model, and the report about it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor

from skipstone.adapt.draft_head import check_steps, rows_for, train_draft_head
from skipstone.adapt.self_generated import begin
from skipstone.core.progress_bar import advance, work
from skipstone.core.strict import PlainDict
from skipstone.evaluate.budget_curve import spread
from skipstone.evaluate.loaded_run import LoadedRun, load_run
from skipstone.evaluate.tables import OneTable, Section, percent, plain
from skipstone.generate import generate
from skipstone.model.draft_head_file import refuse_draft_head, save_draft_head
from skipstone.runs import Run

CONTEXT = 128  # tokens of a row
MOST_ROWS = 4096  # that are read or written at most
OWN_BATCH = 32  # rows that a model writes at a time
WRITING = 0.4  # of the minutes, at most, for writing them


@dataclass(frozen=True, kw_only=True)
class WrittenHead(OneTable):
    """The figures of a draft head (a block that guesses next tokens) that was trained and written.

    path: the file of its weights. text: a description of the text that it was trained on. steps: number of optimizer
    steps. rows: number of rows that it was trained on. tokens: tokens per row. right: on held-out rows, the share of
    positions at which the head guesses the model's most probable token one, two and three tokens ahead.
    """

    path: Path
    text: str
    steps: int
    rows: int
    tokens: int
    right: tuple[float, ...]

    def to_dict(self) -> PlainDict:
        """Return all fields by name as plain values for JSON."""
        return plain({**vars(self), "path": str(self.path)})

    def section(self) -> Section:
        return Section(
            title=str(self.path),
            columns=["tokens ahead", "likeliest tokens of the model that are guessed"],
            rows=[[str(ahead + 1), percent(share)] for ahead, share in enumerate(self.right)],
            notes=[f"{self.steps} steps on {self.rows} rows of {self.tokens} tokens of {self.text}; rows held out"],
        )


def draft_head_run(
    folder: Path,
    *,
    corpus: str | None = None,
    context: int | None = None,
    steps: int | None = None,
    minutes: float = 10.0,
    seed: int = 0,
) -> WrittenHead:
    """Train a draft head, which guesses a model's next tokens, for a run or saved model; write it beside the weights.

    folder: the folder of the run or saved model. corpus, context: name of the corpus and tokens per row; None means the
    run's own, with at most 128 tokens per row. A saved model without a corpus generates the text itself. steps:
    optimizer steps, each on 8 rows; None means as many as fit into `minutes`. minutes: time for text and training
    together; used only without `steps`. seed: seed of text, order and initial weights. Raises FileExistsError if there
    is a head already, FileNotFoundError or ValueError for a folder or corpus that cannot be read, and ValueError for
    numbers out of range, too little text, and a model that has neither a corpus nor a tokenizer.
    """
    refuse_draft_head(Run(folder).model_folder())
    if steps is not None:
        check_steps(steps)
    loaded, began = load_run(folder, "train", corpus, _context(folder, context)), monotonic()
    where = loaded.run.model_folder()
    if loaded.data is None:
        wanted = MOST_ROWS if steps is None else min(rows_for(steps), MOST_ROWS)
        seconds = math.inf if steps is not None else 60 * minutes * WRITING
        longest = loaded.model.config.max_position_embeddings
        if context is not None and context > longest:
            raise ValueError(f"{loaded.run.name}: context {context} is longer than the model's {longest}")
        ids_NT, text = _own_text(loaded, context or CONTEXT, seed, wanted, seconds), "text of its own"
    else:
        ids_NT, text = _rows(loaded, seed), f"{loaded.data.config.corpus}, train"
    left = max(minutes - (monotonic() - began) / 60, minutes * (1 - WRITING))
    found = train_draft_head(loaded.model, ids_NT, steps=steps, minutes=left, seed=seed)
    known = {"text": text, "steps": found.steps, "rows": found.rows, "tokens": found.tokens, "right": found.right}
    return WrittenHead(path=save_draft_head(found.head, where, known), **known)  # type: ignore[arg-type]


def _context(folder: Path, context: int | None) -> int:
    run = Run(folder)
    own = CONTEXT if run.is_saved_model else min(run.data_config().context, CONTEXT)
    return own if context is None else context


def _rows(loaded: LoadedRun, seed: int) -> Tensor:
    """Return rows of a run's training text, spread over all of it, in random order, int64 [N, T].

    loaded: the run with its data. seed: seed of the order.
    """
    batches = [batch["input_ids"] for batch in spread(loaded, "train", MOST_ROWS)]
    whole = [batch for batch in batches if batch.shape[1] == batches[0].shape[1]]
    ids_NT = torch.cat(whole)
    return ids_NT[torch.randperm(len(ids_NT), generator=torch.Generator().manual_seed(seed))]


def _own_text(loaded: LoadedRun, tokens: int, seed: int, rows: int, seconds: float) -> Tensor:
    """Return rows that the model writes at temperature 1, int64 [N, T], in batches until there are enough.

    loaded: the run or saved model. tokens: largest number of tokens per row. seed: seed of the draws. rows: how many
    rows are enough. seconds: time after which no further batch begins. Raises ValueError without a tokenizer.
    """
    model, tokenizer = loaded.model, loaded.run.load_tokenizer()
    if tokenizer is None:
        raise ValueError(f"{loaded.run.folder} has no tokenizer to begin a text with; name a corpus")
    batch = min(OWN_BATCH, rows)
    begun_BT = torch.tensor([begin(tokenizer, None, str(loaded.run.folder))] * batch, device=model.device)
    new, began = min(tokens, model.config.max_position_embeddings) - begun_BT.shape[1], monotonic()
    found: list[Tensor] = []
    with work(rows if seconds == math.inf else None, "rows written"):
        while len(found) * batch < rows and (not found or monotonic() - began < seconds):
            options = {"max_new_tokens": new, "temperature": 1.0, "seed": seed + len(found)}
            found.append(generate(model, begun_BT, eos_token_id=[], **options))  # type: ignore[arg-type]
            advance("rows written", batch)
    return torch.cat(found)
