"""`export_quantised`: write a model folder with weights in 16, 8 or 4 bits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from skipstone.adapt.self_generated import begin
from skipstone.core.atomic_write import complete
from skipstone.core.checksums import all_but_model_cards, record
from skipstone.core.plain_text import read_text
from skipstone.core.progress_bar import stages
from skipstone.generate import generate
from skipstone.model.card import write_card
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.fields import cache_format_of
from skipstone.model.head_preview import config_with_candidates, with_head_candidates
from skipstone.model.loading import quiet
from skipstone.model.pretrained import four_bit_rows, load_pretrained, load_tokenizer
from skipstone.model.quantise import quantise, stored_exactly
from skipstone.ops.head_preview import GROUP
from skipstone.runs import CONFIG, Run

EXACT = "all weights have the values of the original"
ROUNDED = {
    "bfloat16": "weights are rounded to 8 significant bits",
    "float16": "weights are rounded to 11 significant bits",
    "int8": "weights are rounded to 8 bits, in groups of {group} inputs",
    "int4": "most weights have 4 bits, in groups of 32 inputs; token embedding and head have 8",
}
USUAL_DIRECTIONS = 256


@dataclass(frozen=True, kw_only=True)
class HeadCandidates:
    """Options for decoding steps that compute exact logits for the most promising tokens only.

    candidates: number of tokens (rows of the output head) whose logits are computed exactly; a cheap 4-bit preview
    chooses them. directions: number of directions of the hidden states that the preview uses, a multiple of 64; None
    means 256, or as many as a narrower model has. text: a file of text similar to what will be decoded, on which the
    preview is fitted; with None, the model generates the text itself. rows, tokens: number of rows of that text, and
    tokens per row.
    """

    candidates: int
    directions: int | None = None
    text: Path | None = None
    rows: int = 32
    tokens: int = 256


def export_quantised(
    source: str | Path, out: Path, head: HeadCandidates | None = None, bits: int = 8, cache_bits: int | None = None
) -> str:
    """Write the model at `source` with quantised weights to the folder `out`, with its tokenizer and a model card.

    source: folder of a run, a saved model or a dense checkpoint, a Hub name, or a .gguf file. head: limits the logits
    that decoding steps compute exactly; None means that all are computed. bits: 8 for int8; 16 for bf16 or fp16; 4 for
    most weights in 4 bits, where four-bit blocks of a GGUF file are taken over as they are. cache_bits: 16 if the model
    is to cache keys and values in fp16, 32 if as it computes them; None means as at `source`. `out` appears only when
    it is complete. Returns a line that names the format and says whether weights were rounded. Raises FileExistsError
    if `out` is not empty, ValueError or FileNotFoundError for a source that cannot be read, and ValueError for other
    bits, a model that is quantised already, and options of the head that do not fit.
    """
    cache_format = None if cache_bits is None else cache_format_of(cache_bits)
    folder = Path(source).expanduser()
    with stages("reading the model", "rounding its weights", "writing the model") as stage:
        next(stage)
        if (folder / CONFIG).is_file():
            run = Run(folder)
            model, tokenizer = run.load_model(), run.load_tokenizer()
        else:
            model, tokenizer = load_pretrained(source), load_tokenizer(source)
        if head is not None:  # before minutes of rounding
            config_with_candidates(model, head.candidates, _directions(head, model))
            ids_BT = _calibration(model, tokenizer, head, str(source))
        next(stage)
        with quiet():
            small = quantise(model, bits, four_bit_rows(source) if bits == 4 else None)
            kept = stored_exactly(model, small)
            if head is not None:
                small = with_head_candidates(small, ids_BT, head.candidates, _directions(head, small))
        small.config.cache_format = cache_format or small.config.cache_format
        next(stage)
        _write(small, tokenizer, Path(out), folder.resolve().name if folder.exists() else str(source))
    kind = small.config.weight_format
    cached = "; keys and values are cached in fp16" if small.config.cache_format == "float16" else ""
    return f"{kind}: {EXACT if kept else ROUNDED[kind].format(group=small.config.weight_group)}{cached}"


def _write(model: SkipstoneForCausalLM, tokenizer: PreTrainedTokenizerBase | None, out: Path, source: str) -> None:
    with complete(out) as partial, quiet():
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        write_card(model, partial, title=out.name, source=source)
        record(partial, all_but_model_cards(partial))


def _directions(head: HeadCandidates, model: SkipstoneForCausalLM) -> int:
    """Return the number of directions of a preview: that of `head`, or else 256 or what the model's width allows."""
    most = model.config.hidden_size // GROUP * GROUP
    return min(USUAL_DIRECTIONS, most) if head.directions is None else head.directions


def _calibration(model: SkipstoneForCausalLM, tokenizer: Any, head: HeadCandidates, source: str) -> Tensor:
    """Return rows of token ids on which a preview is fitted, int64 [rows, tokens].

    They are evenly spread over the text of `head`, or written by the model if it names none. tokenizer: the model's, or
    None. source: the model's name, for errors. Raises ValueError without a tokenizer, and for a text that is shorter
    than one row.
    """
    tokens = min(head.tokens, model.config.max_position_embeddings)
    if head.text is None:
        if tokenizer is None:
            raise ValueError(f"{source}: without a tokenizer, head candidates need a text; name one")
        begun_BT = torch.tensor([begin(tokenizer, None, source)] * head.rows, device=model.device)
        new = tokens - begun_BT.shape[1]
        return generate(model, begun_BT, max_new_tokens=new, temperature=1.0, seed=0, eos_token_id=[])
    if tokenizer is None:
        raise ValueError(f"{source}: without a tokenizer, no text can be read for the head candidates")
    text = read_text(head.text)[: 32 * tokens * head.rows]
    ids_N = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    if len(ids_N) < tokens:
        raise ValueError(f"{str(head.text)!r} has {len(ids_N)} tokens; head candidates need at least {tokens}")
    starts = torch.linspace(0, len(ids_N) - tokens, head.rows).long()
    return torch.stack([ids_N[start : start + tokens] for start in starts.tolist()])
