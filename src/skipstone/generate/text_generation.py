"""Streaming text generation by the model in the folder of a training run, or a saved model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from skipstone.budget import BudgetTable
from skipstone.core.plain_text import check_text
from skipstone.generate.build_draft import HEAD
from skipstone.generate.detokenizer import Detokenizer
from skipstone.generate.engine import Step
from skipstone.generate.engine import stream as stream_steps
from skipstone.generate.prompt import check_length, ends_of
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.draft_head_file import require_draft_head
from skipstone.model.fields import cache_format_of
from skipstone.runs import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEW_TOKENS = 128  # by default, unless the context is shorter
TEMPERATURE = 0.8


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A piece of generated text.

    text: one or more whole characters. compute: the executed share (0 to 1) of the blocks' computation, as the mean
    over the tokens of the piece.
    """

    text: str
    compute: float


def stream_text(
    run: Path,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    greedy: bool = False,
    budget: float | None = None,
    draft: str | None = None,
    cache_bits: int | None = None,
) -> Iterator[Piece]:
    """Continue a prompt by the model of a training run or a saved model, yielding pieces of text.

    run: folder of a training run or a saved model. prompt: at least one character. max_new_tokens: None means 128, or
    what fits the context. temperature: None means 0.8. top_k: draw among this many of the most probable tokens; None
    means all. seed: seed of the draws; None means a random seed. greedy: always choose the most probable token. budget:
    share of the dense FLOPs to execute, by the thresholds stored beside the weights; None means as trained. draft:
    source of guesses that the model checks several at a time: "lookup", "exit", "exit:N", "skip", "int8", "int4",
    "budget:SHARE", "head" or the folder of another model; None means no drafts. cache_bits: 32 or 16, the bits of
    cached keys and values; None means as the model's config says. Raises ValueError or FileNotFoundError, with a
    message of one line and before the first piece, for a folder without a model or a tokenizer, a prompt that is empty
    or exceeds the context, a model that cannot decide without later tokens, a budget that has no table or is outside
    its range, draft "head" without a draft head, and other cache_bits.
    """
    opened = Run(run)
    if draft == HEAD:
        require_draft_head(opened.model_folder())
    model, tokenizer = opened.load_model(), opened.load_tokenizer()
    if cache_bits is not None:
        model.config.cache_format = cache_format_of(cache_bits)
    if tokenizer is None:
        raise ValueError(
            f"{run} has no tokenizer and so no text to continue: it was trained on a synthetic task, or converted from "
            "a checkpoint without one"
        )
    ids = encode(tokenizer, prompt)
    if max_new_tokens is None:
        check_length(model, len(ids), 1)
        max_new_tokens = min(NEW_TOKENS, model.config.max_position_embeddings - len(ids))
    needed = budget is not None or (draft or "").startswith("budget:")
    table = BudgetTable.load(opened.model_folder()) if needed else None
    steps = stream_steps(
        model.eval(),
        torch.tensor([ids], device=model.device),
        max_new_tokens=max_new_tokens,
        temperature=0.0 if greedy else TEMPERATURE if temperature is None else temperature,
        top_k=top_k,
        seed=seed,
        eos_token_id=ends(model, tokenizer),
        budget=budget,
        budget_table=table,
        draft=_draft(draft),
    )
    return _pieces(steps, Detokenizer(tokenizer, ids))


def _draft(draft: str | None) -> str | SkipstoneForCausalLM | None:
    """Return the model in a folder, or the name of a draft unchanged."""
    if draft is None or not Path(draft).is_dir():
        return draft
    return Run(Path(draft)).load_model()


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the token ids of a prompt; warn of characters that the tokenizer does not know.

    Raises ValueError for an empty prompt and for one that is not valid Unicode.
    """
    if not prompt:
        raise ValueError("the prompt is empty: generation needs at least one character")
    check_text(prompt, "the prompt")
    ids: list[int] = tokenizer(prompt)["input_ids"]
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in ids:
        warnings.warn("the prompt has characters that this model's tokenizer does not know", stacklevel=3)
    return ids


def ends(model: SkipstoneForCausalLM, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of tokens that end a text, as a list, which may be empty.

    They are those of the model's generation_config, or, if it has none, the tokenizer's.
    """
    own = ends_of(model) or [tokenizer.eos_token_id]
    return [i for i in own if i is not None]


def _pieces(steps: Iterator[Step], text: Detokenizer) -> Iterator[Piece]:
    pending: list[float] = []  # of tokens whose text is not all out yet
    for step in steps:
        pending.append(float(step.compute_B[0]))
        piece, rest = text.push(int(step.token_B[0])), pending[-1:] if text.waiting else []
        if piece:
            yield _piece(piece, pending[: len(pending) - len(rest)] or pending)
            pending = rest
    if piece := text.flush():
        yield _piece(piece, pending)


def _piece(text: str, compute: Sequence[float]) -> Piece:
    return Piece(text=text, compute=sum(compute) / len(compute))
