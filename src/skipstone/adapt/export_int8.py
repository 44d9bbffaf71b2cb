"""Export of a model with int8 weights."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from skipstone.core.atomic_write import complete
from skipstone.core.checksums import but_cards, record
from skipstone.core.progress_bar import stages
from skipstone.model.card import write_card
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.loading import quiet
from skipstone.model.pretrained import load_pretrained, load_tokenizer
from skipstone.model.quantise import quantise
from skipstone.runs import CONFIG, Run


def export_int8(source: str | Path, out: Path) -> None:
    """Write the model at `source` with int8 weights to the folder `out`, with its tokenizer and a card.

    source: a run, a saved model or a dense checkpoint, as in `load_pretrained`. `out` appears only when it is complete.
    Raises what `load_pretrained` and `quantise` raise, and FileExistsError if something is at `out`.
    """
    folder = Path(source).expanduser()
    with stages("reading the model", "rounding its weights", "writing the model") as stage:
        next(stage)
        if (folder / CONFIG).is_file():
            run = Run(folder)
            model, tokenizer = run.load_model(), run.load_tokenizer()
        else:
            model, tokenizer = load_pretrained(source), load_tokenizer(source)
        next(stage)
        with quiet():
            small = quantise(model)
        next(stage)
        _write(small, tokenizer, Path(out), folder.resolve().name if folder.exists() else str(source))


def _write(model: SkipstoneForCausalLM, tokenizer: PreTrainedTokenizerBase | None, out: Path, source: str) -> None:
    with complete(out) as partial, quiet():
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        write_card(model, partial, title=out.name, source=source)
        record(partial, but_cards(partial))
