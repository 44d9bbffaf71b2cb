"""Loss and accuracy of one pass over all evaluation rows, by difficulty and kind of token where the data have them.

Shape letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from skipstone.core.progress_bar import advance
from skipstone.core.records import DepthRecord, Records, of_kind
from skipstone.core.strict import PlainDict
from skipstone.data.synthetic import BINS, accuracy_by_bin
from skipstone.measure.passes import Pass, known_to_need_depth, real_tokens, targets
from skipstone.measure.summaries import ACTIVATION_ROWS, Summaries
from skipstone.mechanisms.mix_figures import MixFigures
from skipstone.model.causal_lm import IGNORED, SkipstoneForCausalLM
from skipstone.model.wrapped import require_ours

OVERALL = "all operations"
MEASURED = (*BINS, OVERALL)
KINDS = ("operations", "fillers", "text")
NO_TEMPERATURE = 1e-30  # logits divided by this are still finite


@dataclass(frozen=True, kw_only=True)
class LossResult:
    """Losses of one pass over all rows, and what its mechanisms did.

    nats: summed over `predictions`, in double precision. right: predictions whose likeliest token is the label.
    accuracy: by bin of difficulty, and kinds: by kind of token (`TokenKinds`), None where the data do not tell them.
    """

    nats: float
    predictions: int
    right: int
    summaries: Summaries
    accuracy: dict[str, float] | None
    kinds: dict[str, PlainDict] | None

    @property
    def loss(self) -> float:
        """The cross-entropy per prediction, in nats."""
        return self.nats / self.predictions

    @property
    def perplexity(self) -> float:
        """The perplexity per prediction; an infinite one is capped at the largest double."""
        return math.exp(min(self.loss, 700.0))  # 700: the largest power that a double holds

    def bits_per_byte(self, num_bytes: int | None) -> float | None:
        """Return bits per byte of the text, or None where the rows are not text."""
        return None if not num_bytes else self.nats / math.log(2) / num_bytes


def measure_loss(
    model: SkipstoneForCausalLM, forward: Pass, batches: Iterable[Mapping[str, Tensor]], activations: bool = True
) -> LossResult:
    """Measure loss, accuracy and mechanisms in one kind of pass over `batches`.

    Apart from rounding, no figure depends on how rows are batched. activations: whether activation mechanisms are
    summarised, which takes as long as the pass. Raises ValueError for a model that is not ours (`require_ours`).
    """
    require_ours(model)
    nats, predictions, right = 0.0, 0, 0
    summaries = Summaries(model, activation_rows=ACTIVATION_ROWS if activations else 0)
    known: tuple[Accuracy, TokenKinds] | None = None
    for batch in batches:
        out = forward.run(model, batch, output_records=True)
        assert out.logits is not None
        assert out.records is not None
        target_BT = targets(batch)
        nats_BT = token_nats(out.logits, target_BT)
        nats += float(nats_BT.double().sum())
        predictions += int((target_BT != IGNORED).sum())
        right += int((out.logits.argmax(-1) == target_BT).sum())
        summaries.add(out.records, known_to_need_depth(batch))
        if "difficulty" in batch:
            accuracy, kinds = known = known or (Accuracy(), TokenKinds())
            accuracy.add(out.logits, target_BT, batch["difficulty"])
            kinds.add(nats_BT, target_BT, out.records, batch["difficulty"], real_tokens(batch))
        advance("rows", len(target_BT), f"{forward.name} pass  loss {nats / max(predictions, 1):.4f}")
    return LossResult(
        nats=nats,
        predictions=predictions,
        right=right,
        summaries=summaries,
        accuracy=None if known is None else known[0].by_bin(),
        kinds=None if known is None else known[1].result(),
    )


def token_nats(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    """Return the fp32 cross-entropy of each token in nats, [B, T]; 0 where nothing is to be predicted."""
    flat = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), target_BT.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view_as(target_BT)


class Accuracy:
    """Collects predictions of operations by difficulty; fillers, which a model only has to copy, are not counted."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, logits_BTV: Tensor, target_BT: Tensor, difficulty_BT: Tensor) -> None:
        """Add the predictions of one batch; difficulty_BT is negative for fillers."""
        operation_BT = difficulty_BT >= 0
        columns = logits_BTV.argmax(-1), target_BT, difficulty_BT
        guess, target, difficulty = (x[operation_BT].cpu() for x in columns)
        self._parts.append((guess, target, difficulty))

    def by_bin(self) -> dict[str, float]:
        """Return shares in [0, 1] of each bin and of all operations; nan for a bin without operations."""
        guess, target, difficulty = (torch.cat(column) for column in zip(*self._parts, strict=True))
        overall = float((guess == target).double().mean()) if len(guess) else math.nan
        return {**accuracy_by_bin(guess, target, difficulty), OVERALL: overall}


def headroom_captured(learned: float, dense: float, forced: float) -> float:
    """Return (learned - dense) / (forced - dense), of accuracies at equal executed FLOPs.

    1: the learned routing is as good as routing by the known difficulty; 0: as the dense model; nan where the two
    references do not differ, so that there is nothing to capture.
    """
    return math.nan if forced == dense else (learned - dense) / (forced - dense)


def headroom(learned: Mapping[str, float], dense: Mapping[str, float], forced: Mapping[str, float]) -> dict[str, float]:
    """Return the captured headroom (`headroom_captured`) of each bin and overall."""
    return {name: headroom_captured(learned[name], dense[name], forced[name]) for name in MEASURED}


class TokenKinds:
    """Loss and depth of each kind of token.

    `add` collects, `result` returns the figures so far. Operations are known to need depth (difficulty 0 and above),
    fillers are known not to (-1); for text it is unknown (below).
    """

    def __init__(self) -> None:
        self._sums = {kind: torch.zeros(4, dtype=torch.float64) for kind in KINDS}

    def add(
        self, nats_BT: Tensor, target_BT: Tensor, records: Sequence[Records], difficulty_BT: Tensor, real_BT: Tensor
    ) -> None:
        """Add the losses and depths of one batch.

        nats_BT: loss of each prediction, 0 where nothing is to be predicted. target_BT: token ids, -100 where nothing
        is to be predicted. difficulty_BT: as in the class. real_BT: bool, False for padding.
        """
        depth_BT, predicted_BT = depths(records, real_BT), target_BT != IGNORED
        masks = (difficulty_BT >= 0, difficulty_BT == -1, difficulty_BT < -1)
        for sums, mask_BT in zip(self._sums.values(), masks, strict=True):
            inside_BT = mask_BT & real_BT
            parts = (nats_BT[inside_BT], predicted_BT[inside_BT], depth_BT[inside_BT], inside_BT)
            sums += torch.stack([part.double().sum().cpu() for part in parts])

    def result(self) -> dict[str, PlainDict]:
        """Return for each kind that occurs `loss`, nats per prediction, and `depth`, blocks per token."""
        found = {}
        for kind, sums in self._sums.items():
            nats, predictions, depth, tokens = sums.tolist()
            if tokens:
                found[kind] = {"loss": nats / predictions if predictions else None, "depth": depth / tokens}
        return found


def depths(records: Sequence[Records], real_BT: Tensor) -> Tensor:
    """Return the number of blocks that update each token, int64 [B, T].

    A block of which only attention or MLP is kept does not count.
    """
    depth_BT = torch.zeros(real_BT.shape, dtype=torch.int64, device=real_BT.device)
    for decided in records:
        kept_BT = real_BT
        for record in of_kind(decided, DepthRecord).values():
            kept_BT = kept_BT & record.kept_BT
        depth_BT += kept_BT
    return depth_BT


def measure_hard_mix(
    model: SkipstoneForCausalLM, forward: Pass, batches: Iterable[Mapping[str, Tensor]]
) -> LossResult | None:
    """Measure the model with each neuron's strongest activation alone; None for one that does not mix activations."""
    if not mixes_activations(model):
        return None
    with hard_mix(model):
        return measure_loss(model, forward, batches, activations=False)


def mixes_activations(model: SkipstoneForCausalLM) -> bool:
    """Return whether the neurons of a model mix activations."""
    return bool(_temperatures(model))


@contextmanager
def hard_mix(model: SkipstoneForCausalLM) -> Iterator[None]:
    """Make activation mechanisms use only the strongest activation of each neuron inside a `with` block."""
    taus = _temperatures(model)
    before = [tau.clone() for tau in taus]
    try:
        for tau in taus:
            tau.fill_(max(NO_TEMPERATURE, torch.finfo(tau.dtype).tiny))
        yield
    finally:
        for tau, value in zip(taus, before, strict=True):
            tau.copy_(value)


def _temperatures(model: SkipstoneForCausalLM) -> list[Tensor]:
    return [mechanism.tau for mechanism in model.routing_modules() if isinstance(mechanism, MixFigures)]
