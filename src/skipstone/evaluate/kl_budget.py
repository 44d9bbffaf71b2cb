"""A budget of KL divergence: the settings with which a model reads the fewest bytes and still predicts nearly the same.

Two things can be set: the routing thresholds of a model that has some, to one of the operating points of its budget
table; and, of a model whose output head computes exact logits for a few candidate tokens only (chosen by a preview of
all logits), the number of these candidates. Thresholds are set first, while the whole head is computed. The source is
the reference whose predictions the model should keep: by default the same model as trained. The divergence is

    KL(source || model with the setting), in nats per token, over calibration rows

Shape letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from skipstone.budget import BudgetTable
from skipstone.budget.handles import find_handles
from skipstone.core import checksums
from skipstone.core.atomic_write import write_whole
from skipstone.core.plain_text import read_object
from skipstone.core.strict import PlainDict
from skipstone.evaluate.budget_curve import ROWS, calibrate_run, spread
from skipstone.evaluate.loaded_run import load_run
from skipstone.evaluate.tables import OneTable, Section, amount, number, plain
from skipstone.measure.bytes_read import of_step
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.cost import cost, kept_from_records
from skipstone.model.pretrained import load_pretrained
from skipstone.runs import CONFIG

LEAST = 256  # candidates tried
MOST_POINTS = 10  # of a budget table
NOTHING = (
    "has nothing that a KL budget sets: no thresholds, and no head by candidates (skipstone quantise --head-candidates)"
)
Settings = Sequence[tuple[str, Callable[[], AbstractContextManager[None]], bool]]


@dataclass(frozen=True, kw_only=True)
class AtSetting:
    """Figures of a model with one setting of its thresholds, or of how many exact logits its output head computes.

    setting: its name, such as "budget 0.75" or "512 candidates" (tokens with exact logits). bytes: bytes of weights
    that decoding reads for a token. flops: forward FLOPs per token. kl: the mean over tokens of KL(source || model with
    this setting), in nats, where the source is a reference model.
    """

    setting: str
    bytes: float
    flops: float
    kl: float


@dataclass(frozen=True, kw_only=True)
class KlBudget(OneTable):
    """The settings of a model that were measured for a KL budget, which of them were chosen, and what was written.

    A setting is a set of routing thresholds, or the number of candidate tokens whose exact logits an output head
    computes, if approximate ones choose them. limit: the largest allowed KL(source || model) in nats per token, where
    the source is a reference model. settings: all settings that were tried. chosen: names of the chosen settings.
    written: a sentence that names the written files. text: a description of the text on which the divergence was
    measured.
    """

    limit: float
    settings: tuple[AtSetting, ...]
    chosen: tuple[str, ...]
    written: str
    text: str

    def to_dict(self) -> PlainDict:
        """Return plain values for JSON: "limit", "settings", "chosen", "written" and "text".

        They are the fields. "settings" is a list of dicts with the keys "setting" (its name), "bytes" (of weights that
        decoding a token reads), "flops" (of a token) and "kl" (nats per token); "chosen" lists names of settings.
        """
        return plain({**vars(self), "settings": [vars(s) for s in self.settings]})

    def section(self) -> Section:
        return Section(
            title=f"KL budget of {self.limit:g} nats a token",
            columns=["setting", "bytes of weights a token", "FLOPs a token", "KL (nats)", ""],
            rows=[
                [
                    s.setting,
                    amount(s.bytes),
                    amount(s.flops),
                    number(s.kl),
                    "chosen" if s.setting in self.chosen else "",
                ]
                for s in self.settings
            ],
            notes=[f"KL of the source to each setting, on {self.text}", self.written],
        )


def kl_run(
    folder: Path,
    limit: float,
    *,
    source: str | None = None,
    corpus: str | None = None,
    context: int | None = None,
    rows: int = ROWS,
) -> KlBudget:
    """Choose the thresholds and head candidates that read the fewest bytes with KL(source || model) <= limit.

    Of a budget table (written to budget.json unless there is one), a budget is chosen and named in `written` of the
    result; the number of tokens that get exact logits (head candidates) is written to config.json. folder: the run or
    saved model. limit: nats per token, above 0. source: folder or Hub name of the reference model; None means the model
    itself as trained. corpus, context: the corpus to measure on and tokens per row; None means the run's own (a saved
    model has no corpus). rows: number of training rows to measure on. Raises ValueError without a corpus, for a model
    with nothing to set, a limit that no setting meets, and a source with another vocabulary.
    """
    if not 0 < limit < float("inf"):
        raise ValueError(f"kl must be a number above 0, nats a token, got {limit:g}")
    loaded = load_run(folder, "train", corpus, context)
    if loaded.data is None:
        raise ValueError(f"{folder} is a saved model without a recipe; name the corpus to calibrate on")
    model, where = loaded.model, loaded.run.model_folder()
    handles, preview = bool(find_handles(model)), model.head_preview
    if not handles and preview is None:
        raise ValueError(f"{folder} {NOTHING}")
    other = model if source is None else load_pretrained(source, torch.float32).eval().to(model.device)
    if other.config.vocab_size != model.config.vocab_size:
        raise ValueError(f"source {source!r} has {other.config.vocab_size} tokens, {folder} {model.config.vocab_size}")
    batches = [batch["input_ids"] for batch in spread(loaded, "train", rows)]
    ids = [row[None] for batch in batches for row in batch]
    found: list[AtSetting] = []
    chosen: list[str] = []
    written: list[str] = []
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    if handles:
        if BudgetTable.find(where) is None:
            calibrate_run(folder, corpus=corpus, context=context, rows=rows)
        table = BudgetTable.load(where)
        shares = _shares(table)
        tried = [(f"budget {share:g}", _at(table, model, share), False) for share in shares]
        found += _measured(model, other, ids, tried)
        best = _best(found, limit)
        share = shares[found.index(best)]
        around = _at(table, model, share)
        chosen.append(best.setting)
        written.append(f"budget.json; decode with --{best.setting}")
    if preview is not None:
        counts = _counts(model.config.vocab_size)
        inside = [(f"{m:,} candidates", _with_candidates(model, m, around), True) for m in counts]
        of_head = _measured(model, other, ids, inside)
        best = _best(of_head, limit)
        found += of_head
        chosen.append(best.setting)
        written.append(_write(where, counts[of_head.index(best)]))
    text = f"{len(ids)} rows of {ids[0].shape[1]} tokens of {loaded.data.config.corpus}"
    return KlBudget(
        limit=limit, settings=tuple(found), chosen=tuple(chosen), written="written: " + "; ".join(written), text=text
    )


def _best(found: Sequence[AtSetting], limit: float) -> AtSetting:
    """Return the setting that reads the fewest bytes, of those whose KL divergence is at most `limit`.

    found: the settings that were measured. Raises ValueError if none is within the limit.
    """
    within = [one for one in found if one.kl <= limit]
    if not within:
        nearest = min(found, key=lambda one: one.kl)
        raise ValueError(
            f"kl {limit:g} cannot be met: the smallest that this model reaches is {nearest.kl:.2g} nats a token, with "
            f"{nearest.setting}"
        )
    return min(within, key=lambda one: one.bytes)


def _shares(table: BudgetTable) -> list[float]:
    low, high = table.range
    points = [min(max(point.share, low), high) for point in table.points]
    count = min(MOST_POINTS, len(points))
    return sorted({points[round(i * (len(points) - 1) / max(count - 1, 1))] for i in range(count)})


def _counts(vocabulary: int) -> list[int]:
    """Return the numbers of head candidates that are tried: powers of two times `LEAST`, and the whole vocabulary."""
    counts = []
    count = min(LEAST, vocabulary)
    while count < vocabulary:
        counts.append(count)
        count *= 2
    return [*counts, vocabulary]


def _at(table: BudgetTable, model: SkipstoneForCausalLM, share: float) -> Callable[[], AbstractContextManager[None]]:
    return lambda: table.at(model, share)


def _with_candidates(
    model: SkipstoneForCausalLM, count: int, around: Callable[[], AbstractContextManager[None]]
) -> Callable[[], AbstractContextManager[None]]:
    @contextmanager
    def inside() -> Iterator[None]:
        preview = model.head_preview
        assert preview is not None
        before, preview.candidates = preview.candidates, count
        try:
            with around():
                yield
        finally:
            preview.candidates = before

    return inside


@torch.inference_mode()
def _measured(
    model: SkipstoneForCausalLM, source: SkipstoneForCausalLM, ids: Sequence[Tensor], settings: Settings
) -> list[AtSetting]:
    """Return the bytes, FLOPs and KL divergence of the model with each of `settings`.

    source: the model from which the divergence is measured; each row is computed once by it. ids: rows of token ids,
    int64 [1, T]. settings: name, context that makes the setting, and whether the head is to compute its candidates
    only.
    """
    total = [0.0] * len(settings)
    works: list[tuple[float, float]] = []
    for row_1T in ids:
        theirs_TV = _logits(source, row_1T, steps=False).log_softmax(-1)
        for i, (_, setting, steps) in enumerate(settings):
            with setting():
                ours_TV = _logits(model, row_1T, steps).log_softmax(-1)
                total[i] += float((theirs_TV.exp() * (theirs_TV - ours_TV)).sum(-1).mean())
                if len(works) <= i:
                    works.append(_work(model, row_1T, steps))
    return [
        AtSetting(setting=name, bytes=work[0], flops=work[1], kl=max(sum_of / len(ids), 0.0))
        for (name, _, _), work, sum_of in zip(settings, works, total, strict=True)
    ]


def _logits(model: SkipstoneForCausalLM, ids_1T: Tensor, steps: bool) -> Tensor:
    """Return the logits of all tokens, fp32 [T, V], with decisions that look at no later token.

    ids_1T: token ids. steps: whether to compute them as decoding steps do, with exact logits for the head's candidates
    only.
    """
    hidden_TD = model.to_head(model.model(ids_1T, use_cache=False, routing="causal").last_hidden_state)[0]
    if steps and model.head_preview is not None:
        logits_TV = model.head_preview.plain(hidden_TD, model.lm_head)
    else:
        logits_TV = model.lm_head(hidden_TD).float()
    cap = model.config.logit_soft_cap
    return logits_TV if cap is None else (logits_TV / cap).tanh() * cap


def _work(model: SkipstoneForCausalLM, ids_1T: Tensor, steps: bool) -> tuple[float, float]:
    """Return the bytes of weights that decoding one token reads, and its FLOPs, for the decisions on this row.

    ids_1T: token ids. steps: whether the head computes exact logits for its candidates only.
    """
    records = model(ids_1T, use_cache=False, routing="causal", output_records=True).records or ()
    kept = kept_from_records(model, records, rows="mean")
    flops = cost(model, tokens=ids_1T.shape[1], kept=kept).forward_per_token
    preview = model.head_preview if steps else None
    head = flops.head if preview is None else preview.flops()
    return of_step(model, flops, by_candidates=preview is not None), flops.total - flops.head + head


def _write(folder: Path, candidates: int) -> str:
    """Write the number of head candidates to the model's configuration and update its checksums; return a note of it.

    folder: the model folder. candidates: the number.
    """
    path = folder / CONFIG if (folder / CONFIG).is_file() else folder / "config.json"
    values = read_object(path)
    values["head_candidates"] = candidates
    write_whole(path, json.dumps(values, indent=2) + "\n")
    if (folder / checksums.FILES).is_file():
        checksums.record(folder, checksums.all_but_model_cards(folder))
    return f"head_candidates {candidates} in {path.name}"
