"""Builds the drafts (sources of guesses for speculative decoding) that users name."""

from __future__ import annotations

from typing import TypeAlias

from transformers import PreTrainedModel

from skipstone.budget import BudgetTable
from skipstone.core.strict import unknown
from skipstone.generate.drafts import Draft, FewerBits, FewerBlocks, Lookup, LowerBudget, OtherModel
from skipstone.generate.head_draft import head_draft
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.draft_head import DraftHead

LOOKUP, EXIT, SKIP, BUDGET, HEAD = "lookup", "exit", "skip", "budget", "head"
FEWER_BITS = {"int8": 8, "int4": 4}
Drafted: TypeAlias = str | PreTrainedModel | DraftHead


def build_draft(kind: Drafted, model: SkipstoneForCausalLM, table: BudgetTable | None, budget: float | None) -> Draft:
    """Return the draft (source of guesses at the next tokens) that a name, a model or a draft head stands for.

    kind: "lookup" (an earlier occurrence of the last tokens); "exit" or "exit:N" (the first half, or the first N, of
    the model's blocks); "skip" (every second block); "int8" or "int4" (a copy of the model with rounded weights);
    "budget:SHARE" (the model at this share of the dense FLOPs); "head" (the trained draft head in the model's folder);
    another model; or a draft head. model: the model that is to be sped up. table: its thresholds for every FLOP budget;
    None means those in its folder. budget: share of the dense FLOPs at which the model itself runs, which must exceed
    SHARE; None means as trained. Raises ValueError, with a message of one line, for other names and drafts that are
    impossible for the model, and FileNotFoundError for a head or a needed table that is not in the folder.
    """
    if isinstance(kind, PreTrainedModel):
        return OtherModel(kind, model)
    if isinstance(kind, DraftHead):
        return head_draft(model, kind)
    name, _, argument = kind.partition(":")
    total = model.config.num_hidden_layers
    if name == LOOKUP and not argument:
        return Lookup()
    if name == EXIT:
        return FewerBlocks(model, list(range(_whole(kind, argument, total, default=-(-total // 2)))))
    if name == SKIP and not argument:
        return FewerBlocks(model, [i for i in range(total) if i % 2 == 0])
    if kind in FEWER_BITS:
        return FewerBits(model, FEWER_BITS[kind], None if budget is None else _table(model, table), budget)
    if name == BUDGET:
        return LowerBudget(model, _table(model, table), _share(kind, argument, budget))
    if name == HEAD and not argument:
        return head_draft(model)
    raise ValueError(unknown("draft", kind, [LOOKUP, EXIT, f"{EXIT}:N", SKIP, *FEWER_BITS, f"{BUDGET}:SHARE", HEAD]))


def _whole(kind: str, argument: str, total: int, default: int) -> int:
    if not argument:
        return default
    if not argument.isdecimal() or not 1 <= int(argument) < total:
        raise ValueError(f"draft {kind!r}: the number of blocks must be in [1, {total - 1}], got {argument!r}")
    return int(argument)


def _table(model: SkipstoneForCausalLM, table: BudgetTable | None) -> BudgetTable:
    return BudgetTable.of(model) if table is None else table


def _share(kind: str, argument: str, budget: float | None) -> float:
    try:
        share = float(argument)
    except ValueError:
        raise ValueError(f"draft {kind!r}: name the share of the dense FLOPs, as in budget:0.5") from None
    if budget is not None and share >= budget:
        raise ValueError(f"draft {kind!r}: its budget must be below the model's, {budget:g}")
    return share
