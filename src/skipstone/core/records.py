"""Records: the decisions of mechanisms in one forward pass, returned to the caller as named tuples of tensors.

Shape letters: B rows, T tokens, A activations, X experts (no-ops included), G groups of neurons.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from skipstone.core.selection import Selection


class DepthRecord(NamedTuple):
    """The decisions of one depth mechanism in one block.

    score_BT: fp32 router logit, NaN for tokens that did not reach the mechanism. kept_BT: bool. weight_BT: fp32 factor
    on the update as decided by this mechanism, 0 where it skips (an outer one may skip more). reached_BT: bool, real
    tokens that reached the mechanism. loss_BT: fp32 auxiliary loss of each token, its coefficient included, 0 where not
    reached; None if there is none. carry: new values of the mechanism's tensors in `Tokens.state`.
    """

    score_BT: Tensor
    kept_BT: Tensor
    weight_BT: Tensor
    reached_BT: Tensor
    loss_BT: Tensor | None = None
    carry: Mapping[str, Tensor] = {}

    def lift(self, part: Selection, state: Mapping[str, Tensor]) -> DepthRecord:
        """Return the record in the coordinates of the tokens that `part` was selected from; other tokens keep their
        state.
        """
        carry = {name: part.merge(new, state[name]) for name, new in self.carry.items()}
        return DepthRecord(
            part.scatter(self.score_BT, float("nan")),
            part.scatter(self.kept_BT, False),
            part.scatter(self.weight_BT),
            part.scatter(self.reached_BT, False),
            None if self.loss_BT is None else part.scatter(self.loss_BT),
            carry,
        )


class ActivationRecord(NamedTuple):
    """The decisions of one activation mechanism in one block.

    logits_BTA: fp32 dynamic logits (without the neurons' static preference), NaN for tokens that did not reach the
    mechanism; [B, 1, A] if the whole row shares them. reached_BT: bool. loss_BT: as in `DepthRecord`.
    """

    logits_BTA: Tensor
    reached_BT: Tensor
    loss_BT: Tensor | None = None

    @property
    def carry(self) -> Mapping[str, Tensor]:
        """The tensors carried to later blocks: none."""
        return {}

    def lift(self, part: Selection, state: Mapping[str, Tensor]) -> ActivationRecord:
        """Return the record with a row and column for every outer token, of which `part` selected some."""
        logits = self.logits_BTA.expand(-1, part.width, -1)
        return ActivationRecord(
            part.scatter(logits, float("nan")),
            part.scatter(self.reached_BT, False),
            None if self.loss_BT is None else part.scatter(self.loss_BT),
        )


class ExpertsRecord(NamedTuple):
    """The decisions of a mixture of experts in one block.

    logits_BTX: fp32 router logits, NaN for tokens that did not reach the MLP. chosen_BTX: bool, the experts that a
    token chose, no-ops last. reached_BT, loss_BT: as in `DepthRecord`.
    """

    logits_BTX: Tensor
    chosen_BTX: Tensor
    reached_BT: Tensor
    loss_BT: Tensor | None = None

    @property
    def carry(self) -> Mapping[str, Tensor]:
        """The tensors carried to later blocks: none."""
        return {}

    def lift(self, part: Selection, state: Mapping[str, Tensor]) -> ExpertsRecord:
        """Return the record with a row and column for every outer token, of which `part` selected some."""
        return ExpertsRecord(
            part.scatter(self.logits_BTX, float("nan")),
            part.scatter(self.chosen_BTX, False),
            part.scatter(self.reached_BT, False),
            None if self.loss_BT is None else part.scatter(self.loss_BT),
        )


class NeuronGroupsRecord(NamedTuple):
    """The groups of neurons that are on in the MLP of one block.

    score_BTG: fp32 scores, NaN for tokens that did not reach the MLP. kept_BTG: bool. reached_BT: bool. tried_BTG:
    bool, groups whose products were computed to decide which are kept; equal to kept_BTG if no others were. loss_BT: as
    in `DepthRecord`.
    """

    score_BTG: Tensor
    kept_BTG: Tensor
    reached_BT: Tensor
    tried_BTG: Tensor
    loss_BT: Tensor | None = None

    @property
    def carry(self) -> Mapping[str, Tensor]:
        """The tensors carried to later blocks: none."""
        return {}

    def lift(self, part: Selection, state: Mapping[str, Tensor]) -> NeuronGroupsRecord:
        """Return the record with a row and column for every outer token, of which `part` selected some."""
        return NeuronGroupsRecord(
            part.scatter(self.score_BTG, float("nan")),
            part.scatter(self.kept_BTG, False),
            part.scatter(self.reached_BT, False),
            part.scatter(self.tried_BTG, False),
            None if self.loss_BT is None else part.scatter(self.loss_BT),
        )


AnyRecord = TypeVar("AnyRecord", DepthRecord, ActivationRecord, ExpertsRecord, NeuronGroupsRecord)

Record: TypeAlias = DepthRecord | ActivationRecord | ExpertsRecord | NeuronGroupsRecord
Records: TypeAlias = dict[str, Record]


def expect(record: Record, kind: type[AnyRecord]) -> AnyRecord:
    """Return the record unchanged after asserting that it is of this kind."""
    assert isinstance(record, kind), f"a {kind.__name__} is expected, got a {type(record).__name__}"
    return record


def find(records: Records, name: str, kind: type[AnyRecord]) -> AnyRecord | None:
    """Return the record with this name, which must be of this kind; None if there is none."""
    record = records.get(name)
    return None if record is None else expect(record, kind)


def lift(records: Records, part: Selection, state: Mapping[str, Tensor]) -> Records:
    """Return the records of an inner update in the coordinates of the outer tokens."""
    return records if part.is_all else {name: record.lift(part, state) for name, record in records.items()}


def of_kind(records: Records, kind: type[AnyRecord]) -> dict[str, AnyRecord]:
    """Return the records of one kind by mechanism name."""
    return {name: record for name, record in records.items() if isinstance(record, kind)}


def decisions_only(record: Record) -> DepthRecord:
    """Return the record of a depth mechanism without its loss and carried state."""
    return expect(record, DepthRecord)._replace(loss_BT=None, carry={})


def carried(records: Iterable[Record]) -> dict[str, Tensor]:
    """Return the new values of all tensors that are carried between blocks, by name."""
    return {name: value for record in records for name, value in record.carry.items()}


def auxiliary_loss(
    records: Iterable[Records],
    labelled_BT: Tensor | None,
    items: Tensor | int | None = None,
    over: Literal["labelled", "all"] | str = "labelled",
) -> Tensor | None:
    """Return the sum of the mechanisms' own losses, divided like a token loss; None where there are none.

    labelled_BT: bool, the tokens with a target; None: each loss is the mean over the tokens that reached its mechanism.
    items: the number to divide by, where it is not that of the labelled tokens. over: "labelled" sums over the labelled
    tokens, "all" takes means over the tokens that reached a mechanism.
    """
    decided = [record for layer in records for record in layer.values()]
    losses = [(r.loss_BT, r.reached_BT) for r in decided if r.loss_BT is not None]
    if not losses:
        return None
    if labelled_BT is not None and over == "labelled":
        labels = labelled_BT.sum().clamp(min=1)
        terms = [torch.where(labelled_BT, loss_BT, 0.0).sum() for loss_BT, _ in losses]
        return sum(terms) / (labels if items is None else items)  # type: ignore[return-value]
    means = [loss_BT.sum() / reached_BT.sum().clamp(min=1) for loss_BT, reached_BT in losses]
    if labelled_BT is None or items is None:
        return sum(means)  # type: ignore[return-value]
    return sum(means) * labelled_BT.sum().clamp(min=1) / items
