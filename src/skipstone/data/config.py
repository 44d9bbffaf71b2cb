"""`DataConfig`: the training and evaluation data of a run. Importing this module loads neither torch nor NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from skipstone.core.strict import unknown
from skipstone.data.corpora import find_entry, knows_difficulty
from skipstone.data.tokenizers import check_spec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PACKINGS = ("stream", "packed")
LARGEST = 1 << 31  # largest context, seed and number of rows


@dataclass(frozen=True, kw_only=True)
class Blend:
    """The shares in which training rows come from several sources (folders of tokenised text), constant or changing.

    start: the share of each source, by its name, until the fraction `anneal_from` of the training is done. A source
    that is not named has the share 0. Only proportions count, so the shares need not sum to 1. end: the shares at the
    end of the training, approached linearly; None means `start` throughout. anneal_from: where the change begins, as a
    fraction of the training in [0, 1). Raises ValueError for negative shares, for shares that are all 0, and for
    `anneal_from` without `end`.
    """

    start: dict[str, float]
    end: dict[str, float] | None = None
    anneal_from: float = 0.0

    def __post_init__(self) -> None:
        for name, shares in (("start", self.start), ("end", self.end)):
            if shares is not None and not (all(map(_is_share, shares.values())) and sum(shares.values()) > 0):
                raise ValueError(f"blend.{name} must be shares that are not negative and not all 0, got {shares}")
        if not 0 <= self.anneal_from < 1:
            raise ValueError(f"blend.anneal_from must be in [0, 1), got {self.anneal_from}")
        if self.end is None and self.anneal_from:
            raise ValueError("blend.anneal_from has no effect without blend.end")

    @property
    def sources(self) -> list[str]:
        """The names of the sources with a positive share at any time of the training, sorted."""
        return sorted(name for name in {**self.start, **(self.end or {})} if self._share(name) > 0)

    def _share(self, name: str) -> float:
        return self.start.get(name, 0.0) + (self.end or {}).get(name, 0.0)

    def shares(self, progress_N: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the share of each of S sources for each of N rows, float64 [N, S]; each row of the result sums to 1.

        progress_N: the fraction of training completed at each row, from 0 to 1. The columns are in the order of the
        property `sources`, which is alphabetical.
        """
        import numpy as np

        start_S, end_S = (_normalised(shares, self.sources) for shares in (self.start, self.end or self.start))
        way_N1 = np.clip((progress_N[:, None] - self.anneal_from) / (1 - self.anneal_from), 0, 1)
        return (1 - way_N1) * start_S + way_N1 * end_S


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < float("inf")


def _normalised(shares: Mapping[str, float], sources: Sequence[str]) -> NDArray[np.float64]:
    import numpy as np

    found = np.array([shares.get(name, 0.0) for name in sources])
    return found / found.sum()


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training and evaluation data of a run.

    corpus: a name in the registry `skipstone.data.corpora.CORPORA`, with an argument after a colon where it needs one;
    `shards:FOLDER` is a folder of tokenised documents, which `skipstone prepare` writes. tokenizer: `char`, `byte`,
    `bpe:SIZE` or `pretrained:NAME_OR_PATH`; None means the corpus's default. context: tokens per row. packing:
    "stream": documents follow each other, separated by eos; "packed": rows also have document_ids and position_ids, so
    that attention keeps documents apart. seed: the seed by which training rows are chosen. sampling: None means that
    training rows are windows at random places; "once" means adjacent windows in random order, none read twice. Rows of
    shards are always adjacent windows; None then reads all of them before it reads any a second time. blend: for shards
    in several folders, the share of the rows that each has, fixed or changing during training; None means that it is
    proportional to the folder's tokens. train_rows: number of training rows, which a training replaces by steps *
    batch_size; None means as many as windows fit into the text side by side, or 65,536 synthetic rows. Row i is the
    same whatever this number, unless a blend changes during training. validation_rows: number of validation rows; None
    means the whole split, or 1,024 synthetic rows. Raises ValueError for invalid values: synthetic tasks accept no
    tokenizer, packing or sampling, shards no tokenizer.
    """

    corpus: str = "tiny-shakespeare"
    tokenizer: str | None = None
    context: int = 128
    packing: Literal["stream", "packed"] = "stream"
    seed: int = 0
    sampling: Literal["once"] | None = None
    blend: Blend | None = None
    train_rows: int | None = None
    validation_rows: int | None = None

    def __post_init__(self) -> None:
        entry, _ = find_entry(self.corpus)
        if self.tokenizer is not None:
            check_spec(self.tokenizer)
        if self.packing not in PACKINGS:
            raise ValueError(unknown("packing", self.packing, PACKINGS))
        if self.blend is not None and entry.kind != "shards":
            raise ValueError(f"blend applies to corpus shards:FOLDER only, got it with {self.corpus!r}")
        if self.tokenizer is not None and entry.kind == "shards":
            raise ValueError(f"corpus {self.corpus!r} has its tokenizer: leave tokenizer out, got {self.tokenizer!r}")
        usual = {"tokenizer": None, "packing": "stream", "sampling": None}
        changed = [name for name, value in usual.items() if getattr(self, name) != value]
        if entry.kind == "synthetic" and changed:
            field = changed[0]
            raise ValueError(f"corpus {self.corpus!r} is synthetic: leave {field} out, got {getattr(self, field)!r}")
        if entry.kind == "mixed" and self.packing != "stream":
            raise ValueError(f"corpus {self.corpus!r} has spans that belong to no document: leave packing out")
        for name, least in (("context", 2), ("seed", 0), ("train_rows", 1), ("validation_rows", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
            if value is not None and value > LARGEST:
                raise ValueError(f"{name} must be at most {LARGEST:,}, got {value:,}")

    @property
    def tells_difficulty(self) -> bool:
        """Whether rows of this corpus have a field `difficulty`.

        It is 0 or more at tokens that are known to need depth, and -1 or -2 at all others.
        """
        return knows_difficulty(self.corpus)
