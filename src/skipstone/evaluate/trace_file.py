"""`write_trace`: write which blocks update each token of a text, as a file for pandas, polars or a spreadsheet."""

from __future__ import annotations

import csv
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from skipstone.core.atomic_write import check_free, complete
from skipstone.core.plain_text import read_text
from skipstone.core.strict import unknown
from skipstone.measure.token_trace import COLUMNS
from skipstone.runs import Run

LINES = 1 << 16  # of a row group in a parquet file
Line = Sequence[object]
BYTE_ORDER_MARK = "\ufeff"  # that editors on Windows put before a text in UTF-8


def write_trace(
    run: Path,
    text: Path,
    out: Path,
    *,
    context: int | None = None,
    limit: int | None = None,
    report: Callable[[int, int], None] | None = None,
) -> int:
    """Write which blocks update each token of a text, as a table with one line for each token, block and mechanism.

    Columns: row, position (in the row), token (its text), layer, mechanism (empty for a block without any), score (of
    the router), weight (of the update), kept, loss (of predicting the next token, in nats), routing (causal, or oracle
    if decisions see the whole row). run: folder of a run or saved model with a tokenizer. text: a file in UTF-8. out:
    the file to write; its suffix determines the format: .parquet (needs pyarrow), .csv or .jsonl. context: tokens per
    row; None means the model's maximum. limit: read only the first `limit` tokens; None means all of them. report:
    called with the number of tokens done and their total. Returns the number of lines.

    Raises ValueError for another suffix, a missing package, a model without a tokenizer, an empty text and a context
    out of range; FileExistsError if `out` exists.
    """
    check_suffix(out)
    check_free(out)

    from skipstone.core.routing_module import causal_obstacle  # loads torch, which the checks above do not need
    from skipstone.measure.depth_map import depth_maps

    opened = Run(run)
    model, tokenizer = opened.load_model(), opened.load_tokenizer()
    if tokenizer is None:
        raise ValueError(
            f"{run} has no tokenizer and so no text to trace: it was trained on a synthetic task, or converted from "
            "a checkpoint without one"
        )
    longest = model.config.max_position_embeddings
    if context is not None and not 1 <= context <= longest:
        raise ValueError(f"context must be from 1 to {longest} (max_position_embeddings), got {context}")
    if causal_obstacle(model.routing_modules()):
        warnings.warn("this model cannot decide causally; the traced decisions see the whole row", stacklevel=2)
    ids: list[int] = tokenizer(read_text(text).removeprefix(BYTE_ORDER_MARK))["input_ids"][:limit]
    done = None if report is None else (lambda tokens: report(tokens, len(ids)))
    parts = depth_maps(model, ids, min(context or longest, len(ids) or 1), done)
    lines = (line for part in parts for line in part.lines(lambda i: str(tokenizer.decode([i]))))
    with complete(out) as partial:
        return WRITERS[out.suffix](partial, lines)


def check_suffix(out: Path) -> None:
    """Raise ValueError if `write_trace` cannot write the file `out`.

    It can if the suffix is .csv or .jsonl, or .parquet and pyarrow is installed.
    """
    if out.suffix not in WRITERS:
        raise ValueError(unknown("suffix of the file", out.suffix, WRITERS))
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError("parquet files need a package: pip install 'skipstone[trace]'; or name a .csv or .jsonl file")


def _counted(lines: Iterable[Line], write: Callable[[Line], object]) -> int:
    count = 0
    for line in lines:
        write(line)
        count += 1
    return count


def _write_csv(path: Path, lines: Iterator[Line]) -> int:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        return _counted(lines, writer.writerow)


def _write_jsonl(path: Path, lines: Iterator[Line]) -> int:
    with path.open("w", encoding="utf-8") as file:
        return _counted(
            lines,
            lambda line: file.write(json.dumps(dict(zip(COLUMNS, line, strict=True)), ensure_ascii=False) + "\n"),
        )


def _write_parquet(path: Path, lines: Iterator[Line]) -> int:
    import pyarrow as arrow
    from pyarrow import parquet

    where = [arrow.int32(), arrow.int32(), arrow.string(), arrow.int16(), arrow.string()]
    kinds = [*where, arrow.float32(), arrow.float32(), arrow.bool_(), arrow.float32(), arrow.string()]
    schema = arrow.schema(list(zip(COLUMNS, kinds, strict=True)))
    count = 0
    with parquet.ParquetWriter(path, schema) as writer:
        while group := list(islice(lines, LINES)):
            columns = [list(column) for column in zip(*group, strict=True)]
            writer.write_table(arrow.table(columns, schema=schema))
            count += len(group)
    return count


WRITERS: dict[str, Callable[[Path, Iterator[Line]], int]] = {
    ".parquet": _write_parquet,
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
}
