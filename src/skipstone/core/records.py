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
    """The decisions of one depth mechanism in one block for B rows of T tokens.

    score_BT: fp32 router logits; NaN for tokens that did not reach the mechanism (padding, or skipped by an outer one).
    kept_BT: bool, tokens that get the block's update. weight_BT: fp32 factor on the update by this mechanism alone; 0
    where it skips. reached_BT: bool, the tokens that it decided about. loss_BT: fp32 auxiliary loss of each token,
    multiplied by its coefficient, 0 where not reached; None means that the mechanism has none. carry: new values of its
    tensors in `Tokens.state`, [B, T] by name.
    """

    score_BT: Tensor
    kept_BT: Tensor
    weight_BT: Tensor
    reached_BT: Tensor
    loss_BT: Tensor | None = None
    carry: Mapping[str, Tensor] = {}

    def lift(self, part: Selection, state: Mapping[str, Tensor]) -> DepthRecord:
        """Convert decisions about some selected tokens into a record for all tokens that they were selected from.

        In the result, tokens that were not selected have NaN scores, False in masks, and 0 in weights and losses. part:
        the selection. state: `Tokens.state` of all tokens, tensors by name; in the result's `carry`, tokens that were
        not selected keep their values from it.
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
    """The decisions of one activation mechanism, which mixes A activation functions per neuron, in one block.

    logits_BTA: fp32 logits of the functions that depend on the input (the neurons' own preferences are not included);
    NaN for tokens that did not reach the mechanism; [B, 1, A] if all tokens of a row share them. reached_BT: bool,
    tokens that reached it. loss_BT: fp32 auxiliary loss of each token; None means that there is none.
    """

    logits_BTA: Tensor
    reached_BT: Tensor
    loss_BT: Tensor | None = None

    @property
    def carry(self) -> Mapping[str, Tensor]:
        """The tensors that the mechanism carries to later blocks, by name: always empty."""
        return {}

    def lift(self, part: Selection, state: Mapping[str, Tensor]) -> ActivationRecord:
        """Convert decisions about some selected tokens into a record for all tokens that they were selected from.

        In the result, tokens that were not selected have NaN logits, False in `reached_BT`, and a loss of 0. part: the
        selection. state: not used.
        """
        logits = self.logits_BTA.expand(-1, part.width, -1)
        return ActivationRecord(
            part.scatter(logits, float("nan")),
            part.scatter(self.reached_BT, False),
            None if self.loss_BT is None else part.scatter(self.loss_BT),
        )


class ExpertsRecord(NamedTuple):
    """The decisions of a mixture of X experts in one block; no-op experts, which compute nothing, are the last of them.

    logits_BTX: fp32 router logits, NaN for tokens that did not reach the MLP. chosen_BTX: bool, the experts that a
    token chose, no-ops among them. reached_BT: bool, tokens that reached the MLP. loss_BT: fp32 auxiliary loss of each
    token; None means that there is none.
    """

    logits_BTX: Tensor
    chosen_BTX: Tensor
    reached_BT: Tensor
    loss_BT: Tensor | None = None

    @property
    def carry(self) -> Mapping[str, Tensor]:
        """The tensors that the mechanism carries to later blocks, by name: always empty."""
        return {}

    def lift(self, part: Selection, state: Mapping[str, Tensor]) -> ExpertsRecord:
        """Convert decisions about some selected tokens into a record for all tokens that they were selected from.

        In the result, tokens that were not selected have NaN logits, False in `chosen_BTX` and `reached_BT`, and a loss
        of 0. part: the selection. state: not used.
        """
        return ExpertsRecord(
            part.scatter(self.logits_BTX, float("nan")),
            part.scatter(self.chosen_BTX, False),
            part.scatter(self.reached_BT, False),
            None if self.loss_BT is None else part.scatter(self.loss_BT),
        )


class NeuronGroupsRecord(NamedTuple):
    """The decisions about G groups of neurons in the MLP of one block: which groups compute for which token.

    score_BTG: fp32 scores, NaN for tokens that did not reach the MLP. kept_BTG: bool, the groups that contribute to the
    output. reached_BT: bool, tokens that reached the MLP. tried_BTG: bool, groups whose products were computed to
    decide which to keep; equal to kept_BTG if the router needs no such trial. loss_BT: fp32 auxiliary loss of each
    token; None means that there is none.
    """

    score_BTG: Tensor
    kept_BTG: Tensor
    reached_BT: Tensor
    tried_BTG: Tensor
    loss_BT: Tensor | None = None

    @property
    def carry(self) -> Mapping[str, Tensor]:
        """The tensors that the mechanism carries to later blocks, by name: always empty."""
        return {}

    def lift(self, part: Selection, state: Mapping[str, Tensor]) -> NeuronGroupsRecord:
        """Convert decisions about some selected tokens into a record for all tokens that they were selected from.

        In the result, tokens that were not selected have NaN scores, False in the three masks (`kept_BTG`,
        `reached_BT`, `tried_BTG`), and a loss of 0. part: the selection. state: not used.
        """
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
    """Return `record`, one mechanism's decisions, typed as `kind`. Raises AssertionError if it is of another class."""
    assert isinstance(record, kind), f"a {kind.__name__} is expected, got a {type(record).__name__}"
    return record


def find(records: Records, name: str, kind: type[AnyRecord]) -> AnyRecord | None:
    """Return what the mechanism `name` decided, its entry of `records`, typed as `kind`; None if it has no entry.

    records: the decisions of a pass in one block, by mechanism name. kind: the class that the entry must have, such as
    `DepthRecord`; raises AssertionError if it is of another.
    """
    record = records.get(name)
    return None if record is None else expect(record, kind)


def lift(records: Records, part: Selection, state: Mapping[str, Tensor]) -> Records:
    """Convert decisions about some selected tokens into records for all tokens that they were selected from.

    In the result, tokens that were not selected have NaN scores, False in masks, and 0 in weights and losses. records:
    the decisions, one record of tensors for each mechanism, by name. part: the selection. state: `Tokens.state` of all
    tokens; in the tensors that a record carries to the next block, tokens that were not selected keep their values from
    it.
    """
    return records if part.is_all else {name: record.lift(part, state) for name, record in records.items()}


def of_kind(records: Records, kind: type[AnyRecord]) -> dict[str, AnyRecord]:
    """Return the entries of `records` (decisions in a pass, by mechanism name) that are of class `kind`, as a dict."""
    return {name: record for name, record in records.items() if isinstance(record, kind)}


def decisions_only(record: Record) -> DepthRecord:
    """Return what a depth mechanism decided in a pass, `record`, without auxiliary loss and state for later blocks.

    Raises AssertionError for records of other mechanisms.
    """
    return expect(record, DepthRecord)._replace(loss_BT=None, carry={})


def carried(records: Iterable[Record]) -> dict[str, Tensor]:
    """Return the tensors [B, T] that mechanisms carry to the next block, by tensor name, with their new values.

    records: the decisions of mechanisms in a pass, which contain these tensors.
    """
    return {name: value for record in records for name, value in record.carry.items()}


def auxiliary_loss(
    records: Iterable[Records],
    labelled_BT: Tensor | None,
    items: Tensor | int | None = None,
    over: Literal["labelled", "all"] | str = "labelled",
) -> Tensor | None:
    """Return the sum of all mechanisms' auxiliary losses as a scalar with gradient; None if there are none.

    records: decisions of the pass, a dict by mechanism name for each block. labelled_BT: bool, the tokens with a
    training target. over: "labelled" sums each loss over these tokens and divides by their number; any other value
    takes each loss's mean over the tokens that reached its mechanism, which is also done if labelled_BT is None. items:
    the divisor to use instead of the number of labelled tokens, for example that number summed over all micro-batches
    of an optimizer step; means over reached tokens are then first multiplied by the number of labelled tokens.
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
