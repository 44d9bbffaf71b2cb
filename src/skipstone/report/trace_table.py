"""A file that `skipstone trace` has written, read back as what a report shows of a model's decisions.

The file is a depth map: which blocks update each token of a text. Shape letters: B rows of the text, T tokens of the
longest row, L layers.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from skipstone.core.strict import PlainDict, unknown
from skipstone.measure.token_trace import COLUMNS, Allocation, TokenTrace

ROUTINGS = ("causal", "oracle", "unknown")
SUFFIXES = (".parquet", ".csv", ".jsonl")
TEXT = {"row": int, "position": int, "layer": int, "score": float, "weight": float, "loss": float}  # of cells in a CSV


@dataclass(kw_only=True)
class _Token:
    """What a depth map says of one token.

    text: its text. loss: loss of predicting the next token in nats, NaN without one. weights: weight of each block's
    update, by index of the block, 0 where a mechanism skips it. kept: whether all mechanisms of the block keep the
    token.
    """

    text: str
    loss: float
    weights: dict[int, float] = field(default_factory=dict)
    kept: dict[int, bool] = field(default_factory=dict)


def read_trace(path: Path) -> TokenTrace:
    """Read a file of `skipstone trace`: the decisions on its first row, and the allocation of compute in all rows.

    path: a .parquet, .csv or .jsonl file. A block counts as computed for a token if all of its mechanisms keep the
    token. Raises ValueError for any other file, and for .parquet without the package pyarrow.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(unknown("suffix of a depth map", path.suffix, SUFFIXES))
    rows: dict[int, dict[int, _Token]] = {}
    routing = "unknown"
    counts: dict[int, dict[str, list[int]]] = {}  # of a mechanism of a layer: tokens that it keeps, that reached it
    try:
        for line in _lines(path):
            loss = math.nan if line["loss"] is None else float(line["loss"])
            row = rows.setdefault(int(line["row"]), {})
            token = row.setdefault(int(line["position"]), _Token(text=str(line["token"]), loss=loss))
            routing = _known(line.get("routing", routing))
            layer, kept = int(line["layer"]), _bool(line["kept"])
            token.weights[layer] = token.weights.get(layer, 1.0) * float(line["weight"])
            token.kept[layer] = token.kept.get(layer, True) and kept
            if line["mechanism"] is not None:
                count = counts.setdefault(layer, {}).setdefault(str(line["mechanism"]), [0, 0])
                count[0] += kept
                count[1] += kept or line["score"] is not None
        if not rows or sorted(rows) != list(range(len(rows))):
            raise ValueError("its rows are not numbered from 0")
        found = [[row[t] for t in range(len(row))] for _, row in sorted(rows.items())]
        layers = len(found[0][0].weights)
        weight_LT = [[token.weights[layer] for token in found[0]] for layer in range(layers)]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"{str(path)!r} is no depth map of `skipstone trace`: {_reason(error)}") from None
    depths = [[_depth(token) for token in row] for row in found]
    return TokenTrace(
        tokens=[token.text for token in found[0]],
        weight_LT=weight_LT,
        kept_LT=[[token.kept[layer] for token in found[0]] for layer in range(layers)],
        depth_T=depths[0],
        depth=sum(map(sum, depths)) / sum(map(len, depths)),
        routing=routing,
        routed=frozenset(counts),
        capacity={i: {name: kept / max(all_, 1) for name, (kept, all_) in by.items()} for i, by in counts.items()},
        allocation=_allocation(found, depths),
    )


def _depth(token: _Token) -> float:
    return sum(token.kept.values()) / len(token.kept)


def _known(routing: object) -> str:
    if routing not in ROUTINGS:
        raise ValueError(unknown("routing", routing, ROUTINGS))
    return str(routing)


def _bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"kept must be true or false, got {value!r}")
    return value


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError) and isinstance(error.args[0], int):
        return f"its positions and layers are not numbered from 0, or a token lacks number {error}"
    return f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())


def _allocation(rows: list[list[_Token]], depths: list[list[float]]) -> Allocation:
    import torch  # a report without depth maps needs none

    from skipstone.measure.allocation import measure_allocation
    from skipstone.measure.trace import category_of

    ids = {text: i for i, text in enumerate(dict.fromkeys(token.text for row in rows for token in row))}
    shape = (len(rows), max(map(len, rows)))
    real_BT = torch.zeros(shape, dtype=torch.bool)
    compute_BT, loss_BT = torch.zeros(shape, dtype=torch.double), torch.full(shape, math.nan, dtype=torch.double)
    ids_BT, category_BT = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    for b, row in enumerate(rows):
        real_BT[b, : len(row)] = True
        compute_BT[b, : len(row)] = torch.tensor(depths[b], dtype=torch.double)
        loss_BT[b, : len(row)] = torch.tensor([token.loss for token in row], dtype=torch.double)
        ids_BT[b, : len(row)] = torch.tensor([ids[token.text] for token in row])
        category_BT[b, : len(row)] = torch.tensor([category_of(token.text) for token in row])
    return measure_allocation(compute_BT, loss_BT, ids_BT, real_BT, category_BT)


def _lines(path: Path) -> Iterator[PlainDict]:
    """Yield the lines of a depth map in any of its formats, with None for what is empty."""
    if path.suffix == ".parquet":
        if importlib.util.find_spec("pyarrow") is None:
            raise ValueError("parquet files need a package: pip install 'skipstone[trace]'")
        from pyarrow import ArrowInvalid, parquet

        try:
            file = parquet.ParquetFile(path)
            for batch in file.iter_batches(columns=list(COLUMNS)):
                yield from batch.to_pylist()
        except ArrowInvalid as error:
            raise ValueError(str(error)) from None
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)
    else:
        with path.open(encoding="utf-8", newline="") as lines:
            for line in csv.DictReader(lines):
                if None in line.values() or None in line:
                    raise ValueError("a line has too few or too many cells")
                yield {key: _cell(key, value) for key, value in line.items()}


def _cell(key: str, text: str) -> object:
    if key == "kept":
        return {"True": True, "False": False}.get(text, text)
    if key == "token":
        return text
    return None if text == "" else TEXT.get(key, str)(text)
