"""What mechanisms did, layer by layer, summed up over batches of records.

Shape letters: B rows, T tokens, A activations, X experts (no-ops included), G groups of neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from skipstone.core.records import ActivationRecord, DepthRecord, ExpertsRecord, NeuronGroupsRecord, Record, Records
from skipstone.measure.precision_recall import PrecisionRecall
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.ops import reference as ops

ACTIVATION_NAMES = tuple(function.__name__ for function in ops.ACTIVATIONS)
ACTIVATION_ROWS = 64


class Statistics:
    """Collects with `add`; `layers()` is the result so far.

    Activations are looked at in the first `activation_rows` rows only: it takes as long as the MLPs themselves, and the
    means hardly move from row to row.
    """

    def __init__(self, model: SkipstoneForCausalLM, activation_rows: int = ACTIVATION_ROWS) -> None:
        self._activation_rows = activation_rows
        blocks: Any = model.model.layers
        self._blocks = [block.routing_modules() for block in blocks]
        self._sums: list[dict[str, Any]] = [{} for _ in self._blocks]

    @torch.no_grad()
    def add(self, records: Sequence[Records], known_BT: Tensor | None = None) -> None:
        """The records of one batch. known_BT: bool, the tokens that need depth, on data where that is known."""
        for mechanisms, sums, decided in zip(self._blocks, self._sums, records, strict=True):
            for name, record in decided.items():
                if isinstance(record, DepthRecord):
                    sums.setdefault(name, _Depth()).add(mechanisms[name], record, known_BT)
                elif isinstance(record, ExpertsRecord):
                    sums.setdefault(name, _Experts()).add(mechanisms[name], record)
                elif isinstance(record, NeuronGroupsRecord):
                    sums.setdefault(name, _Groups()).add(record)
                elif self._activation_rows:
                    sums.setdefault(name, _Activation(self._activation_rows)).add(mechanisms[name], record)

    def layers(self) -> list[dict[str, dict[str, Any]]]:
        """For each block and each of its mechanisms:

        depth: `capacity`, kept tokens by asked tokens; `capacity_p99`, that share's 99th percentile over rows (of rows
        in which somebody was asked); `weight`, the mean factor on a kept token's update, None where none was kept;
        `precision`, `recall` and `f1` of the kept tokens, measured by those that are known to need depth, or else by
        those that the best of the row would be by the same scores (not for mechanisms without such an ideal).
        activation: `shares` of the four functions, `neurons`, the share of neurons in which each is the strongest,
        `diversity`, the share of neurons that differ from most, `entropy` as a share of its maximum, `dynamic_entropy`
        and `static_entropy` in nats without tau (`MixFigures`); means over tokens and neurons of the first rows.
        experts: `experts`, share of each in all choices, `no_op`, share of the no-ops together, and `entropy` of a
        token's softmax over both as a share of its maximum, in the mean; None where nobody was asked.
        neuron groups: `groups`, the share of tokens for which each is on, `on`, their mean, `always_on` and `never_on`,
        how many are for all tokens and for none.
        """
        return [{name: total.result() for name, total in sums.items()} for sums in self._sums]


class _Depth:
    def __init__(self) -> None:
        self.asked = self.kept = 0
        self.weight = 0.0
        self.rows: list[Tensor] = []
        self.agreement: PrecisionRecall | None = None

    def add(self, mechanism: Any, record: Record, known_BT: Tensor | None) -> None:
        assert isinstance(record, DepthRecord)
        wanted_BT = mechanism.oracle_mask(record) if known_BT is None else known_BT
        if wanted_BT is not None:
            self.agreement = self.agreement or PrecisionRecall()
            self.agreement.add(record.kept_BT, wanted_BT, record.reached_BT)
        reached_B, kept_B = record.reached_BT.sum(1), (record.kept_BT & record.reached_BT).sum(1)
        self.asked += int(reached_B.sum())
        self.kept += int(kept_B.sum())
        self.weight += float(record.weight_BT[record.kept_BT].double().sum())
        self.rows.append((kept_B / reached_B)[reached_B > 0].cpu())

    def result(self) -> dict[str, Any]:
        rows = torch.cat(self.rows).double()
        return {
            "capacity": self.kept / self.asked if self.asked else None,
            "capacity_p99": _quantile(rows, 0.99),
            "weight": self.weight / self.kept if self.kept else None,
            **({} if self.agreement is None else self.agreement.result()),
        }


def _quantile(x_N: Tensor, q: float) -> float | None:
    """By sorting: torch.quantile refuses more than 16 million values."""
    if not len(x_N):
        return None
    return float(x_N.sort().values[min(int(q * len(x_N)), len(x_N) - 1)])


class _Activation:
    SHARES, FIGURES = ("shares", "neurons"), ("diversity", "entropy", "dynamic_entropy")

    def __init__(self, rows: int) -> None:
        self.rows_left, self.tokens = rows, 0
        self.sums: dict[str, Tensor] = {}
        self.static_entropy = 0.0

    def add(self, mechanism: Any, record: Record) -> None:
        assert isinstance(record, ActivationRecord)
        rows = min(self.rows_left, len(record.reached_BT))
        self.rows_left -= rows
        self.static_entropy = float(mechanism.static_entropy())
        for row in range(rows):  # one at a time: [T, neurons, A] is the largest tensor here
            reached_T = record.reached_BT[row]
            part = ActivationRecord(record.logits_BTA[row : row + 1], reached_T[None])
            for name in (*self.SHARES, *self.FIGURES):
                figure_T = getattr(mechanism, name)(part)[0].double()
                total = figure_T.expand(len(reached_T), *figure_T.shape[1:])[reached_T].sum(0).cpu()
                self.sums[name] = self.sums[name] + total if name in self.sums else total
            self.tokens += int(reached_T.sum())

    def result(self) -> dict[str, Any]:
        means = {name: (total / max(self.tokens, 1)).tolist() for name, total in self.sums.items()}
        return {
            **{name: dict(zip(ACTIVATION_NAMES, means[name], strict=True)) for name in self.SHARES},
            **{name: means[name] for name in self.FIGURES},
            "static_entropy": self.static_entropy,
        }


class _Experts:
    def __init__(self) -> None:
        self.tokens, self.entropy = 0, 0.0
        self.chosen: Tensor | None = None  # of each expert, the no-ops as one at the end

    def add(self, mechanism: Any, record: Record) -> None:
        assert isinstance(record, ExpertsRecord)
        chosen_X = record.chosen_BTX.sum((0, 1)).double().cpu()
        experts, no_ops = chosen_X[: mechanism.config.count], chosen_X[mechanism.config.count :]
        chosen = torch.cat((experts, no_ops.sum(0, keepdim=True)))
        self.chosen = chosen if self.chosen is None else self.chosen + chosen
        self.tokens += int(record.reached_BT.sum())
        self.entropy += float(mechanism.entropy(record)[record.reached_BT].double().sum())

    def result(self) -> dict[str, Any]:
        if self.chosen is None or not self.tokens:
            return {"experts": None, "no_op": None, "entropy": None}
        *experts, no_op = (self.chosen / self.chosen.sum()).tolist()
        return {"experts": experts, "no_op": no_op, "entropy": self.entropy / self.tokens}


class _Groups:
    def __init__(self) -> None:
        self.tokens = 0
        self.on: Tensor | None = None  # tokens for which each group is

    def add(self, record: NeuronGroupsRecord) -> None:
        on_G = record.kept_BTG.sum((0, 1)).double().cpu()
        self.on = on_G if self.on is None else self.on + on_G
        self.tokens += int(record.reached_BT.sum())

    def result(self) -> dict[str, Any]:
        shares = [] if self.on is None or not self.tokens else (self.on / self.tokens).tolist()
        return {
            "groups": shares,
            "on": sum(shares) / len(shares) if shares else None,
            "always_on": sum(share == 1 for share in shares),
            "never_on": sum(share == 0 for share in shares),
        }
