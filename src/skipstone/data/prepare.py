"""`prepare`: build the datasets of training and evaluation rows that a `DataConfig` describes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skipstone.core.strict import PlainDict, unknown
from skipstone.data import rows, sequences, switched, synthetic
from skipstone.data.blend import BlendedWindows, InTurn, check_sources
from skipstone.data.config import Blend, DataConfig
from skipstone.data.corpora import find_entry, load_corpus
from skipstone.data.encode import Encoded, encode_documents, text_bytes
from skipstone.data.mixed import MixedWindows, with_spans
from skipstone.data.packing import CoveringWindows, RandomWindows, WindowsOnce, num_covering
from skipstone.data.rows import Row, RowDataset
from skipstone.data.shards import ShardSet, fingerprint, open_sources
from skipstone.data.tokenizers import build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYNTHETIC_ROWS = {"train": 1 << 16, "validation": 1024, "test": 1024}
SYNTHETIC_STREAM = {"train": 0, "validation": 1, "test": 2}  # also for the spans of a mixed corpus
VOCABULARIES = {
    "reset-s3": synthetic.VOCAB_SIZE,
    "switched-s3": switched.VOCAB_SIZE,
    "copy": sequences.VOCAB_SIZE,
    "sort": sequences.VOCAB_SIZE,
}
EVALUATION_SEED = 0  # all runs are evaluated on the same synthetic rows, whatever their seeds


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedData:
    """The datasets of a run, with their tokenizer and counts.

    config: the configuration that the datasets were made from. description: one line about the corpus. train: training
    rows, to be read in order (a sequential sampler), because row i is already a random draw;
    `dataclasses.replace(train, rows=n)` sets their number; None if training rows were not requested. validation: rows
    that predict every token of the split once (`CoveringWindows`), or synthetic rows that are the same for every seed.
    tokenizer: None for synthetic tasks. vocab_size: number of ids; all ids are below it. pad_id: the id with which
    `collate` pads. validation_labels: number of predictions in all rows of `validation`. validation_bytes: UTF-8 bytes
    of the text that these rows cover, for bits per byte = summed loss in nats / ln 2 / validation_bytes (losses on eos
    tokens count, which have no bytes); None for synthetic tasks and mixed corpora. fingerprint: SHA-256 of all token
    ids, or of the manifests of shards, by which a resumed run recognises its data; None for synthetic tasks and without
    training rows.
    """

    config: DataConfig
    description: str
    train: RowDataset | None
    validation: RowDataset
    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    pad_id: int
    validation_labels: int
    validation_bytes: int | None
    fingerprint: str | None = None

    def collate(self, items: Sequence[Row]) -> Row:
        """Stack rows into a batch, padded with `pad_id`; for DataLoader or Trainer.

        items: B rows of `train` or `validation`, dicts of int64 tensors (T,). The result has the same keys with tensors
        (B, T), T being that of the longest row, and `attention_mask` (1 for real tokens) if any row was padded.
        """
        return rows.collate(items, self.pad_id)


def prepare(
    config: DataConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    train: bool = True,
    split: str = "validation",
) -> PreparedData:
    """Load, tokenise and cut the data of a run into rows.

    config: the data to load. tokenizer: a tokenizer to use instead of the one that `config` names, such as a saved
    run's. train: whether to load training rows; if False, the training split may be missing. split: the split whose
    rows become `validation` in the result: "validation" or "test". Raises ValueError or FileNotFoundError for unknown
    names, missing files, and corpora that are too small for one row.
    """
    entry, _ = find_entry(config.corpus)
    if entry.kind == "synthetic":
        return _prepare_synthetic(config, entry.summary, train, split)
    if entry.kind == "shards":
        return _prepare_shards(config, tokenizer, train, split)
    corpus = load_corpus(config.corpus)
    if tokenizer is None:
        tokenizer = build_tokenizer(config.tokenizer or entry.tokenizer or "byte", corpus)
    first_id = with_spans(tokenizer) if entry.kind == "mixed" else None
    try:
        known = encode_documents(tokenizer, corpus.documents("train")) if train else None
        training = None if known is None else _train(config, known)
        encoded = encode_documents(tokenizer, corpus.documents(split))
        validation = _validation(config, encoded)
    except ValueError as error:
        about = f"corpus {config.corpus!r}"
        raise ValueError(str(error) if about in str(error) else f"{about}: {error}") from None
    data = PreparedData(
        config=config,
        description=f"{corpus.description} ({corpus.licence})",
        train=training,
        validation=validation,
        tokenizer=tokenizer,
        vocab_size=len(tokenizer),
        pad_id=_pad_id(tokenizer),
        validation_labels=validation.num_labels,
        validation_bytes=text_bytes(tokenizer, encoded, validation.tokens),
        fingerprint=None if known is None else _hash(known, encoded),
    )
    return data if first_id is None else _mixed(data, first_id, split)


def _mixed(data: PreparedData, first_id: int, split: str) -> PreparedData:
    """Put spans of Switched-S3 into half of the text's training and validation rows (`MixedWindows`).

    first_id: id of the first of the spans' tokens. split: which split `data.validation` is.
    """

    def over(text: Any, stream: str, seed: int) -> MixedWindows:
        return MixedWindows(rows=len(text), text=text, first_id=first_id, seed=seed, stream=SYNTHETIC_STREAM[stream])

    validation = over(data.validation, split, EVALUATION_SEED)
    return replace(
        data,
        train=None if data.train is None else over(data.train, "train", data.config.seed),
        validation=validation,
        validation_labels=validation.num_labels,
        validation_bytes=None,
    )


def _hash(*splits: Encoded) -> str:
    """Return one SHA-256 over the token ids of several splits, in hexadecimal."""
    digest = hashlib.sha256()
    for encoded in splits:
        digest.update(np.ascontiguousarray(encoded.ids[:]).view(np.uint8).data)
    return digest.hexdigest()


def _windows(config: DataConfig, encoded: Encoded) -> PlainDict:
    starts = encoded.document_starts if config.packing == "packed" else None
    return {"ids": encoded.ids, "context": config.context, "document_starts": starts}


def _train(config: DataConfig, encoded: Encoded) -> RandomWindows | WindowsOnce:
    length = config.train_rows or max(1, len(encoded.ids) // config.context)
    kind = WindowsOnce if config.sampling == "once" else RandomWindows
    return kind(**_windows(config, encoded), seed=config.seed, rows=length)


def _validation(config: DataConfig, encoded: Encoded) -> CoveringWindows:
    whole = max(1, num_covering(len(encoded.ids), config.context))
    return CoveringWindows(**_windows(config, encoded), rows=min(config.validation_rows or whole, whole))


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokenizer's pad id, else its eos id, else 0; padding is masked and has no label, so any id works."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _prepare_shards(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase | None, train: bool, split: str
) -> PreparedData:
    sets = open_sources(Path(find_entry(config.corpus)[1]).expanduser())
    blend = config.blend or Blend(
        start={name: opened.manifest.total("train", "tokens") for name, opened in sets.items()}
    )
    check_sources(blend, list(sets))
    sets = {name: sets[name] for name in blend.sources}
    tokenizer = tokenizer or next(iter(sets.values())).tokenizer()
    encoded = {name: opened.encoded(split) for name, opened in sets.items()}
    validation = _in_turn(config, list(encoded.values()))
    reached = zip(encoded.values(), validation.reached(), strict=False)
    return PreparedData(
        config=config,
        description=f"tokenised shards: {', '.join(sets)}",
        train=_blended(config, blend, sets) if train else None,
        validation=validation,
        tokenizer=tokenizer,
        vocab_size=len(tokenizer),
        pad_id=_pad_id(tokenizer),
        validation_labels=sum(part.num_labels for part in validation.reached()),
        validation_bytes=sum(text_bytes(tokenizer, source, part.tokens) for source, part in reached),
        fingerprint=fingerprint(sets),
    )


def _blended(config: DataConfig, blend: Blend, sets: Mapping[str, ShardSet]) -> BlendedWindows:
    windows = [_windows(config, opened.encoded("train")) for opened in sets.values()]
    counts = [len(given["ids"]) // config.context for given in windows]
    for name, count in zip(sets, counts, strict=True):
        if not count:
            raise ValueError(f"source {name!r} has fewer training tokens than one context of {config.context}")
    sources = (WindowsOnce(**given, seed=config.seed, rows=n) for given, n in zip(windows, counts, strict=True))
    return BlendedWindows(
        rows=config.train_rows or (min if config.sampling == "once" else sum)(counts),
        sources=tuple(sources),
        names=tuple(sets),
        blend=blend,
        seed=config.seed,
        once=config.sampling == "once",
    )


def _in_turn(config: DataConfig, encoded: Sequence[Encoded]) -> InTurn:
    parts = [
        CoveringWindows(**_windows(config, source), rows=max(1, num_covering(len(source.ids), config.context)))
        for source in encoded
    ]
    whole = sum(map(len, parts))
    return InTurn(parts=tuple(parts), rows=min(config.validation_rows or whole, whole))


def _prepare_synthetic(config: DataConfig, description: str, train: bool, split: str) -> PreparedData:
    if split not in SYNTHETIC_ROWS:
        raise ValueError(unknown(f"split of corpus {config.corpus!r}", split, SYNTHETIC_ROWS))
    validation = _synthetic(config, split, config.validation_rows, EVALUATION_SEED)
    labels = validation[0]
    per_row = int((labels["shift_labels" if "shift_labels" in labels else "labels"] != rows.IGNORE).sum())
    return PreparedData(
        config=config,
        description=description,
        train=_synthetic(config, "train", config.train_rows, config.seed) if train else None,
        validation=validation,
        tokenizer=None,
        vocab_size=VOCABULARIES[config.corpus],
        pad_id=0,
        validation_labels=per_row * len(validation),
        validation_bytes=None,
    )


def _synthetic(config: DataConfig, split: str, length: int | None, seed: int) -> RowDataset:
    stream, length = SYNTHETIC_STREAM[split], length or SYNTHETIC_ROWS[split]
    given: PlainDict = {"rows": length, "seed": seed, "stream": stream, "context": config.context}
    if config.corpus == "reset-s3":
        return synthetic.ResetS3(**given)
    if config.corpus == "switched-s3":
        return switched.SwitchedS3(**given)
    return sequences.Sequences(task="copy" if config.corpus == "copy" else "sort", **given)
