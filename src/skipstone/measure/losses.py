"""Loss and accuracy of one pass over all evaluation rows; on synthetic data also by difficulty and token kind.

Difficulty is the number of operations since the last reset of the task's state, on all of which a token depends; kinds
of token are operations, fillers and text.

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
    """The losses of one kind of forward pass over all rows, and what the model's mechanisms did in it.

    nats: cross-entropy summed over all predictions, in double precision. predictions: number of tokens that have a
    label. right: number of predictions whose most probable token is the label. summaries: the figures of the
    mechanisms; `summaries.layers()` returns them by layer. accuracy: share of correct predictions by bin of difficulty
    ("0-3", "4-7", "8-15" and "16+" operations since the last reset) and over "all operations". kinds: for each of
    "operations", "fillers" and "text" that occurs, "loss" in nats and "depth", the mean number of blocks that update a
    token. accuracy and kinds are None unless the data state each token's difficulty.

    Raises ValueError if there is no prediction, because then there is no mean loss.
    """

    nats: float
    predictions: int
    right: int
    summaries: Summaries
    accuracy: dict[str, float] | None
    kinds: dict[str, PlainDict] | None

    def __post_init__(self) -> None:
        if self.predictions < 1:
            raise ValueError("there is nothing to predict: no row has a token with a label")

    @property
    def loss(self) -> float:
        """The mean cross-entropy per prediction, in nats."""
        return self.nats / self.predictions

    @property
    def perplexity(self) -> float:
        """The perplexity, exp(loss); for a loss above 700 it is exp(700), because a double holds little more."""
        return math.exp(min(self.loss, 700.0))  # 700: the largest power that a double holds

    def bits_per_byte(self, num_bytes: int | None) -> float | None:
        """Return the loss in bits per byte of the text.

        num_bytes: length in bytes of the text of all rows; for None or 0 (the rows are not text), the result is None.
        """
        return None if not num_bytes else self.nats / math.log(2) / num_bytes


def measure_loss(
    model: SkipstoneForCausalLM, forward: Pass, batches: Iterable[Mapping[str, Tensor]], activations: bool = True
) -> LossResult:
    """Measure loss, accuracy and the figures of mechanisms in one kind of forward pass.

    model: should be in evaluation mode. forward: the kind of pass, which says how the model decides and executes.
    batches: dicts of tensors on the model's device, with `input_ids` and `labels` or `shift_labels`, and on synthetic
    data `difficulty`, int64 [B, T], the number of operations since the last reset, negative for tokens that are no
    operation. Apart from rounding, no figure depends on how rows are batched. activations: whether the result has
    figures of mixed activation functions (PolyGLU). Taking them costs about as much time as the pass itself, so they
    are taken from the first 64 rows only. Raises ValueError for a model that is not a Skipstone model, and if no token
    has a label.
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
    """Return the cross-entropy of each token in nats, fp32 [B, T] (rows, tokens).

    logits_BTV: [B, T, V] over the vocabulary. target_BT: int64 [B, T], the token to predict; -100 where there is none,
    and the loss there is 0.
    """
    flat = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), target_BT.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view_as(target_BT)


class Accuracy:
    """Collects the accuracy of predicted operations by difficulty, on synthetic data that state it for each token.

    Difficulty is the number of operations since the last reset of the state. Only tokens that are operations are
    counted; fillers, which a model only copies, are not.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, logits_BTV: Tensor, target_BT: Tensor, difficulty_BT: Tensor) -> None:
        """Add the predictions of one batch.

        logits_BTV: [B, T, V], whose argmax is the prediction. target_BT: int64 [B, T], the token that the logits at the
        same place should predict. difficulty_BT: int64 [B, T], negative for tokens that are not operations.
        """
        operation_BT = difficulty_BT >= 0
        columns = logits_BTV.argmax(-1), target_BT, difficulty_BT
        guess, target, difficulty = (x[operation_BT].cpu() for x in columns)
        self._parts.append((guess, target, difficulty))

    def by_bin(self) -> dict[str, float]:
        """Return the share of correct predictions by bin of difficulty, and over all bins as "all operations".

        The bins are "0-3", "4-7", "8-15" and "16+" operations since the last reset; the share of a bin without
        operations is nan. Raises ValueError if no batch has been added.
        """
        if not self._parts:
            raise ValueError("no batch has been added: there is no accuracy to return")
        guess, target, difficulty = (torch.cat(column) for column in zip(*self._parts, strict=True))
        overall = float((guess == target).double().mean()) if len(guess) else math.nan
        return {**accuracy_by_bin(guess, target, difficulty), OVERALL: overall}


def headroom_captured(learned: float, dense: float, forced: float) -> float:
    """Return (learned - dense) / (forced - dense), where all three are accuracies at equal executed FLOPs.

    learned: accuracy with the model's own router. dense: accuracy of a dense model. forced: accuracy if blocks keep the
    tokens that the synthetic corpus marks as needing depth. 1 means that the router is as good as these marks, 0 that
    it gains nothing over the dense model. nan if dense and forced are equal, so that there is nothing to gain.
    """
    return math.nan if forced == dense else (learned - dense) / (forced - dense)


def headroom(learned: Mapping[str, float], dense: Mapping[str, float], forced: Mapping[str, float]) -> dict[str, float]:
    """Return (learned - dense) / (forced - dense) for each bin of difficulty.

    Difficulty is the number of operations since the last reset in a synthetic task. 1 means that the model's router is
    as good as the corpus's marks, 0 that it gains nothing over a dense model, nan that dense and forced are equal.
    learned: accuracies with the model's own router. dense: accuracies of a dense model. forced: accuracies if blocks
    keep the tokens marked as operations. These three and the result are dicts with the keys "0-3", "4-7", "8-15", "16+"
    and "all operations".
    """
    return {name: headroom_captured(learned[name], dense[name], forced[name]) for name in MEASURED}


class TokenKinds:
    """Collects the loss and the depth (number of blocks that update a token) by kind of token.

    The kind follows from the difficulty that the data state: 0 and above mark operations, which are known to need
    depth; -1 marks fillers, which are known not to need it; lower values mark text, for which it is unknown.
    """

    def __init__(self) -> None:
        self._sums = {kind: torch.zeros(4, dtype=torch.float64) for kind in KINDS}

    def add(
        self, nats_BT: Tensor, target_BT: Tensor, records: Sequence[Records], difficulty_BT: Tensor, real_BT: Tensor
    ) -> None:
        """Add the losses and records of one batch. Tensors are [B, T] (rows, tokens) on one device.

        nats_BT: loss of each prediction, 0 where there is no target. target_BT: token ids, -100 where there is no
        target. records: decisions of the pass, a dict by mechanism name for each block. difficulty_BT: int64, at least
        0 for operations, -1 for fillers, lower for text. real_BT: bool, False for padding.
        """
        depth_BT, predicted_BT = depths(records, real_BT), target_BT != IGNORED
        masks = (difficulty_BT >= 0, difficulty_BT == -1, difficulty_BT < -1)
        for sums, mask_BT in zip(self._sums.values(), masks, strict=True):
            inside_BT = mask_BT & real_BT
            parts = (nats_BT[inside_BT], predicted_BT[inside_BT], depth_BT[inside_BT], inside_BT)
            sums += torch.stack([part.double().sum().cpu() for part in parts])

    def result(self) -> dict[str, PlainDict]:
        """Return loss and depth of each of the kinds "operations", "fillers" and "text" that occurs, by kind.

        The values are dicts: "loss" is the cross-entropy in nats per prediction, None without predictions; "depth" is
        the mean number of blocks that update a token.
        """
        found = {}
        for kind, sums in self._sums.items():
            nats, predictions, depth, tokens = sums.tolist()
            if tokens:
                found[kind] = {"loss": nats / predictions if predictions else None, "depth": depth / tokens}
        return found


def depths(records: Sequence[Records], real_BT: Tensor) -> Tensor:
    """Return the number of blocks that update each token, int64 [B, T] (rows, tokens); 0 for padding.

    records: decisions of a pass, a dict by mechanism name for each block. real_BT: bool, False for padding. A block
    counts only if all of its depth mechanisms keep the token; if only its attention or only its MLP is skipped, it does
    not count.
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
    """Measure the loss with each neuron's strongest activation alone, instead of its learned mix of activations.

    forward: the kind of pass, which says how the model decides and executes. batches: dicts of tensors on the model's
    device, with `input_ids` and `labels` or `shift_labels`. The result has no figures of activation mechanisms; it is
    None for a model that does not mix activations. The temperatures of the mixes, which are lowered meanwhile, are
    restored.
    """
    if not mixes_activations(model):
        return None
    with hard_mix(model):
        return measure_loss(model, forward, batches, activations=False)


def mixes_activations(model: SkipstoneForCausalLM) -> bool:
    """Return whether the model's MLP neurons mix several activation functions (as PolyGLU does)."""
    return bool(_temperatures(model))


@contextmanager
def hard_mix(model: SkipstoneForCausalLM) -> Iterator[None]:
    """Make every MLP neuron use only its strongest activation function inside a `with` block.

    The temperatures of the mixes are lowered almost to 0 and restored at the end. Nothing changes for a model that does
    not mix activations.
    """
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
