"""Common code of `harden` (one activation per neuron) and `prune` (unused neurons removed).

They open a model, change it by measurements on training rows, and write it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path

from torch import Tensor

from skipstone.core import checksums
from skipstone.core.atomic_write import complete
from skipstone.core.progress_bar import stages
from skipstone.evaluate.loaded_run import batches, load_run
from skipstone.measure.passes import Pass
from skipstone.model.card import write_card
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.loading import named_dtype, quiet

BATCH, BATCHES = 8, 8  # rows to calibrate on
Rows = Iterable[Mapping[str, Tensor]]
Change = Callable[[SkipstoneForCausalLM, Pass, Rows], SkipstoneForCausalLM]


def export(
    folder: str | Path,
    out: Path,
    dtype: str | None,
    corpus: str | None,
    *,
    require: Callable[[SkipstoneForCausalLM], None],
    change: Change,
) -> SkipstoneForCausalLM:
    """Apply `change` to a run or saved model, write the new model to the folder `out`, and return it.

    folder: the folder of the run or saved model. dtype: dtype of the written weights; None keeps the dtype as loaded.
    corpus: name of the corpus to measure on, such as "enwik8"; None means the run's own (a saved model has none).
    require: called with the model; raises ValueError if it cannot be changed. change: a function of the model, of the
    kind of pass in which to run it (`measure.passes.Pass`), and of up to 64 training rows in batches of 8; it returns
    the new model. Raises ValueError without a corpus, and FileExistsError if `out` is not empty.
    """
    with stages("reading the run and its text", "measuring on training rows", "writing the model") as stage:
        next(stage)
        loaded = load_run(Path(folder), "train", corpus)
        require(loaded.model)
        if loaded.data is None:
            raise ValueError(f"{str(folder)!r} is a saved model without a recipe; name the corpus to calibrate on")
        rows = islice(batches(loaded.data, BATCH, loaded.model.device), BATCHES)
        next(stage)
        with complete(Path(out)) as partial, quiet():
            changed = change(loaded.model, loaded.primary, rows)
            changed = changed.to(named_dtype(dtype, loaded.model.dtype))  # type: ignore[arg-type]
            next(stage)
            changed.save_pretrained(partial)
            write_card(changed, partial, title=Path(out).name, source=Path(folder).name)
            tokenizer = loaded.run.load_tokenizer()
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            checksums.record(partial, checksums.all_but_model_cards(partial))
    return changed
