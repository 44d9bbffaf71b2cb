"""What mechanisms did in a pass, by layer: capacity, precision, shares of activations, experts and neuron groups.

There is one reader for each kind of record (decisions in a pass). A new kind of record is a class in `core/records.py`
and a reader in `READERS`: the log of a training, evaluation and its tables take it from there.

Shape letters: B rows, T tokens, A activations, X experts (no-ops included), G groups of neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

from skipstone.core.records import ActivationRecord, AnyRecord, DepthRecord, ExpertsRecord, NeuronGroupsRecord, Records
from skipstone.core.routing_module import RoutingModule
from skipstone.core.strict import PlainDict, PlainMapping
from skipstone.core.width import GroupRouter
from skipstone.mechanisms import DepthMechanism
from skipstone.mechanisms.mix_figures import MixFigures
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.nn.block import SEGMENT
from skipstone.nn.experts import ExpertsMLP
from skipstone.ops import reference as ops

ACTIVATION_NAMES = tuple(function.__name__ for function in ops.ACTIVATIONS)
ACTIVATION_ROWS = 64
ONE_ROW = slice(1)  # activation figures look at every neuron of every token: one row is enough to log

Figures = PlainMapping
AnyModule = TypeVar("AnyModule", bound=RoutingModule)


@dataclass(frozen=True)
class FigureColumn:
    """A column of a table of figures by layer.

    title: the column's heading. value: given the figures of a mechanism by name, returns the cell's number, or None for
    an empty cell. digits: decimals shown; None for a share, which is shown as a percentage.
    """

    title: str
    value: Callable[[Figures], float | None]
    digits: int | None = None


@dataclass(frozen=True)
class FigureTable:
    """The layout of a table of the figures of one kind of mechanism, with a row for each layer and mechanism.

    key: a figure that only mechanisms of this kind have; the table shows those that have it. title: heading of the
    table. first: heading of the first column. columns: the other columns. note: explanation below the table, or None.
    """

    key: str
    title: str
    first: str
    columns: Sequence[FigureColumn]
    note: str | None = None


class Reader(Generic[AnyModule, AnyRecord]):
    """The base class of readers, which accumulate figures from the decisions of one mechanism in one layer.

    activation_rows: number of rows from which `ActivationReader` takes its figures, which are expensive; other readers
    use all rows. tables: layouts in which the figures are shown.
    """

    tables: ClassVar[tuple[FigureTable, ...]]

    def __init__(self, activation_rows: int = ACTIVATION_ROWS) -> None:
        self.rows_left = activation_rows

    @staticmethod
    def log_pairs(module: AnyModule, record: AnyRecord) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (name, numerator, denominator) of each figure of one pass that training logs.

        The figure is numerator / denominator, scalar tensors on the device that can first be summed over passes and
        processes. module: the mechanism. record: the decisions of the pass.
        """
        raise NotImplementedError

    def add(self, module: AnyModule, record: AnyRecord, known_BT: Tensor | None) -> None:
        """Add the decisions of one batch to the figures.

        module: the mechanism. record: the mechanism's decisions. known_BT: bool [B, T] (rows, tokens), the tokens that
        are known to need depth; None if the data do not state it.
        """
        raise NotImplementedError

    def result(self) -> PlainDict:
        """Return {name: value}, the figures of all batches added so far; each subclass's docstring lists the names."""
        raise NotImplementedError


class Summaries:
    """Accumulates figures of every mechanism in every layer of a model, as the `Reader` classes list them.

    model: the model whose decisions are added. activation_rows: number of rows from which figures of activation
    mechanisms (PolyGLU) are taken, because they take as long as the MLPs themselves; 0 leaves them out.
    """

    def __init__(self, model: SkipstoneForCausalLM, activation_rows: int = ACTIVATION_ROWS) -> None:
        self._activation_rows = activation_rows
        blocks = model.decoder.layers
        around = ({name: block.mechanism(name) for name in block.sites[SEGMENT]} for block in blocks)
        self._blocks = [{**block.routing_modules(), **segment} for block, segment in zip(blocks, around, strict=True)]
        self._readers: list[dict[str, AnyReader]] = [{} for _ in self._blocks]

    @torch.no_grad()
    def add(self, records: Sequence[Records], known_BT: Tensor | None = None) -> None:
        """Add the decisions of one batch to the figures.

        records: the decisions, a dict by mechanism name for each block. known_BT: bool [B, T] (rows, tokens), the
        tokens that are known to need depth; None if the data do not state it.
        """
        for modules, readers, decided in zip(self._blocks, self._readers, records, strict=True):
            for name, record in decided.items():
                reader = READERS[type(record)]
                if reader is not ActivationReader or self._activation_rows:
                    readers.setdefault(name, reader(self._activation_rows)).add(modules[name], record, known_BT)

    def layers(self) -> list[dict[str, PlainDict]]:
        """Return for each block {mechanism name: {figure: value}}; the subclasses of `Reader` list all figures."""
        return [{name: reader.result() for name, reader in readers.items()} for readers in self._readers]


class PrecisionRecall:
    """Counts the precision and recall of the tokens that a mechanism keeps, against those that it should keep.

    Accuracy would say little: a router that skips everything is right about 7 of 8 tokens if it should keep 1 of 8.
    """

    def __init__(self) -> None:
        self.kept = self.needed = self.both = 0

    def add(self, kept_BT: Tensor, needed_BT: Tensor, reached_BT: Tensor) -> None:
        """Add the decisions of one batch; all tensors are bool [B, T] (rows, tokens).

        kept_BT: tokens that the mechanism keeps. needed_BT: tokens that it should keep. reached_BT: tokens that came to
        the mechanism at all; only these count.
        """
        kept_BT, needed_BT = kept_BT & reached_BT, needed_BT & reached_BT
        self.kept += int(kept_BT.sum())
        self.needed += int(needed_BT.sum())
        self.both += int((kept_BT & needed_BT).sum())

    def result(self) -> dict[str, float | None]:
        """Return "precision", "recall" and their harmonic mean "f1"; None for each that would divide by zero."""
        both = self.kept + self.needed
        return {
            "precision": self.both / self.kept if self.kept else None,
            "recall": self.both / self.needed if self.needed else None,
            "f1": 2 * self.both / both if both else None,
        }


class DepthReader(Reader[DepthMechanism, DepthRecord]):
    """Accumulates figures of one depth mechanism in one block, which `result` returns under these names.

    `capacity`: kept tokens as a share of those that reached the mechanism. `capacity_p99`: 99th percentile of that
    share over rows. `weight`: mean factor on the update of a kept token. `precision`, `recall`, `f1`: of the kept
    tokens, against those that a synthetic corpus marks as needing depth; without marks, against the tokens of each row
    with the highest scores (keys are missing for mechanisms without scores). A figure is None if no token counts.
    """

    tables = (
        FigureTable(
            "capacity",
            "depth mechanisms by layer",
            "layer, mechanism",
            (
                FigureColumn("kept", lambda f: f["capacity"]),
                FigureColumn("99 % of rows keep at most", lambda f: f["capacity_p99"]),
                FigureColumn("weight of a kept update", lambda f: f["weight"], 3),
                FigureColumn("F1", lambda f: f.get("f1"), 3),
            ),
            "F1 of the kept tokens: by those that need depth where that is known, else by the best of the row",
        ),
    )

    def __init__(self, activation_rows: int = ACTIVATION_ROWS) -> None:
        super().__init__(activation_rows)
        self.reached = self.kept = 0
        self.weight = 0.0
        self.rows: list[Tensor] = []
        self.precision_recall: PrecisionRecall | None = None

    @staticmethod
    def log_pairs(module: DepthMechanism, record: DepthRecord) -> Iterator[tuple[str, Tensor, Tensor]]:
        reached_BT = record.reached_BT
        count = reached_BT.sum()
        yield "capacity", (record.kept_BT & reached_BT).sum(), count
        yield "gate", torch.where(reached_BT, record.weight_BT, 0.0).sum(), count

    def add(self, module: DepthMechanism, record: DepthRecord, known_BT: Tensor | None) -> None:
        needed_BT = module.oracle_mask(record) if known_BT is None else known_BT
        if needed_BT is not None:
            self.precision_recall = self.precision_recall or PrecisionRecall()
            self.precision_recall.add(record.kept_BT, needed_BT, record.reached_BT)
        reached_B, kept_B = record.reached_BT.sum(1), (record.kept_BT & record.reached_BT).sum(1)
        self.reached += int(reached_B.sum())
        self.kept += int(kept_B.sum())
        self.weight += float(record.weight_BT[record.kept_BT].double().sum())
        self.rows.append((kept_B / reached_B)[reached_B > 0].cpu())

    def result(self) -> PlainDict:
        rows = torch.cat(self.rows).double()
        return {
            "capacity": self.kept / self.reached if self.reached else None,
            "capacity_p99": _quantile(rows, 0.99),
            "weight": self.weight / self.kept if self.kept else None,
            **({} if self.precision_recall is None else self.precision_recall.result()),
        }


def _quantile(x_N: Tensor, q: float) -> float | None:
    """Return the q-quantile of x_N by sorting, because torch.quantile refuses more than 16 million values."""
    if not len(x_N):
        return None
    return float(x_N.sort().values[min(int(q * len(x_N)), len(x_N) - 1)])


def _activation_table(title: str, kind: str, figures: Mapping[str, str]) -> FigureTable:
    shares = [FigureColumn(name, lambda f, name=name: f[kind][name]) for name in ACTIVATION_NAMES]  # type: ignore[misc]
    more = [FigureColumn(name, lambda f, key=key: f[key], 4) for name, key in figures.items()]  # type: ignore[misc]
    return FigureTable("shares", title, "layer, mechanism", (*shares, *more))


class ActivationReader(Reader[MixFigures, ActivationRecord]):
    """Accumulates figures of mixed activation functions (PolyGLU) over the first `activation_rows` rows.

    `shares`: mean share of each activation function in the mix, by name. `neurons`: share of neurons in which each
    function is the strongest, by name. `diversity`: share of neurons whose strongest function is not the most common
    one. `entropy`: mean entropy of the mix, divided by the largest possible. `dynamic_entropy`, `static_entropy`: mean
    entropies in nats at temperature 1, of all logits and of the neurons' learned preferences alone.
    """

    SHARES, FIGURES = ("shares", "neurons"), ("diversity", "entropy", "dynamic_entropy")
    tables = (
        _activation_table(
            "activations by layer",
            "shares",
            {
                "entropy / maximum": "entropy",
                "dynamic entropy (nats)": "dynamic_entropy",
                "static entropy (nats)": "static_entropy",
            },
        ),
        _activation_table("neurons by their strongest activation", "neurons", {"differ from most": "diversity"}),
    )

    def __init__(self, activation_rows: int = ACTIVATION_ROWS) -> None:
        super().__init__(activation_rows)
        self.tokens = 0
        self.sums: dict[str, Tensor] = {}
        self.static_entropy = 0.0

    @staticmethod
    def log_pairs(module: MixFigures, record: ActivationRecord) -> Iterator[tuple[str, Tensor, Tensor]]:
        row = ActivationRecord(record.logits_BTA[ONE_ROW], record.reached_BT[ONE_ROW])
        for name in ("entropy", "diversity", "dynamic_entropy"):
            x_BT = getattr(module, name)(row)
            yield name, x_BT.nansum(), x_BT.isfinite().sum()
        static = module.static_entropy()
        yield "static_entropy", static, torch.ones_like(static)

    def add(self, module: MixFigures, record: ActivationRecord, known_BT: Tensor | None) -> None:
        rows = min(self.rows_left, len(record.reached_BT))
        self.rows_left -= rows
        self.static_entropy = float(module.static_entropy())
        for row in range(rows):  # one at a time: [T, neurons, A] is the largest tensor here
            reached_T = record.reached_BT[row]
            part = ActivationRecord(record.logits_BTA[row : row + 1], reached_T[None])
            for name in (*self.SHARES, *self.FIGURES):
                figure_T = getattr(module, name)(part)[0].double()
                total = figure_T.expand(len(reached_T), *figure_T.shape[1:])[reached_T].sum(0).cpu()
                self.sums[name] = self.sums[name] + total if name in self.sums else total
            self.tokens += int(reached_T.sum())

    def result(self) -> PlainDict:
        means = {name: (total / max(self.tokens, 1)).tolist() for name, total in self.sums.items()}
        return {
            **{name: dict(zip(ACTIVATION_NAMES, means[name], strict=True)) for name in self.SHARES},
            **{name: means[name] for name in self.FIGURES},
            "static_entropy": self.static_entropy,
        }


class ExpertsReader(Reader[ExpertsMLP, ExpertsRecord]):
    """Accumulates figures of a mixture of experts.

    `experts`: list of each expert's share of all choices (a choice sends one token to one expert). `no_op`: share of
    choices that are no-ops. `entropy`: mean entropy of the softmax over experts and no-ops, divided by the largest
    possible. All are None if no token reached the experts. activation_rows: not used.
    """

    tables = (
        FigureTable(
            "experts",
            "experts by layer",
            "layer, part",
            (
                FigureColumn("least chosen expert", lambda f: min(f["experts"] or [None])),
                FigureColumn("most chosen expert", lambda f: max(f["experts"] or [None])),
                FigureColumn("no-ops", lambda f: f["no_op"]),
                FigureColumn("entropy / maximum", lambda f: f["entropy"], 3),
            ),
            "shares of all choices of the tokens that reached the experts",
        ),
    )

    def __init__(self, activation_rows: int = ACTIVATION_ROWS) -> None:
        super().__init__(activation_rows)
        self.tokens, self.entropy = 0, 0.0
        self.chosen: Tensor | None = None  # of each expert, the no-ops as one at the end

    @staticmethod
    def log_pairs(module: ExpertsMLP, record: ExpertsRecord) -> Iterator[tuple[str, Tensor, Tensor]]:
        chosen_X = record.chosen_BTX.sum((0, 1))
        count, real_X = chosen_X.sum(), chosen_X[: module.config.count]
        yield "no_op", count - real_X.sum(), count
        yield "busiest", real_X.max(), count
        yield "entropy", module.entropy(record).nansum(), record.reached_BT.sum()

    def add(self, module: ExpertsMLP, record: ExpertsRecord, known_BT: Tensor | None) -> None:
        chosen_X = record.chosen_BTX.sum((0, 1)).double().cpu()
        experts, no_ops = chosen_X[: module.config.count], chosen_X[module.config.count :]
        chosen = torch.cat((experts, no_ops.sum(0, keepdim=True)))
        self.chosen = chosen if self.chosen is None else self.chosen + chosen
        self.tokens += int(record.reached_BT.sum())
        self.entropy += float(module.entropy(record)[record.reached_BT].double().sum())

    def result(self) -> PlainDict:
        if self.chosen is None or not self.tokens:
            return {"experts": None, "no_op": None, "entropy": None}
        *experts, no_op = (self.chosen / self.chosen.sum()).tolist()
        return {"experts": experts, "no_op": no_op, "entropy": self.entropy / self.tokens}


class NeuronGroupsReader(Reader[GroupRouter, NeuronGroupsRecord]):
    """Accumulates figures of neuron groups, adjacent MLP neurons that are switched on or off together for a token.

    `groups`: list of the share of tokens for which each group is on; empty if no token reached the MLP. `on`: mean of
    these shares, or None. `always_on`, `never_on`: number of groups that are on for all tokens, and for none.
    activation_rows: not used.
    """

    tables = (
        FigureTable(
            "groups",
            "neuron groups by layer",
            "layer, part",
            (
                FigureColumn("groups", lambda f: len(f["groups"]), 0),
                FigureColumn("on", lambda f: f["on"]),
                FigureColumn("always on", lambda f: f["always_on"], 0),
                FigureColumn("never on", lambda f: f["never_on"], 0),
            ),
            "on: share of the groups, mean over the tokens that reached the MLP",
        ),
    )

    def __init__(self, activation_rows: int = ACTIVATION_ROWS) -> None:
        super().__init__(activation_rows)
        self.tokens = 0
        self.on: Tensor | None = None  # tokens for which each group is

    @staticmethod
    def log_pairs(module: GroupRouter, record: NeuronGroupsRecord) -> Iterator[tuple[str, Tensor, Tensor]]:
        on_G, count = record.kept_BTG.sum((0, 1)), record.reached_BT.sum()
        groups = torch.full_like(count, len(on_G))
        yield "on", on_G.sum(), count * groups
        yield "changing", ((on_G > 0) & (on_G < count)).sum(), groups

    def add(self, module: GroupRouter, record: NeuronGroupsRecord, known_BT: Tensor | None) -> None:
        on_G = record.kept_BTG.sum((0, 1)).double().cpu()
        self.on = on_G if self.on is None else self.on + on_G
        self.tokens += int(record.reached_BT.sum())

    def result(self) -> PlainDict:
        shares = [] if self.on is None or not self.tokens else (self.on / self.tokens).tolist()
        return {
            "groups": shares,
            "on": sum(shares) / len(shares) if shares else None,
            "always_on": sum(share == 1 for share in shares),
            "never_on": sum(share == 0 for share in shares),
        }


AnyReader: TypeAlias = Reader[Any, Any]
READERS: dict[type, type[AnyReader]] = {
    DepthRecord: DepthReader,
    ActivationRecord: ActivationReader,
    ExpertsRecord: ExpertsReader,
    NeuronGroupsRecord: NeuronGroupsReader,
}
