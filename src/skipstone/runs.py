"""Run folders, which training writes and all other commands read.

RUN/config.yaml       the resolved recipe           RUN/tokenizer/     Hugging Face's format; text corpora only
RUN/environment.json  versions, commit, machine     RUN/checkpoints/   checkpoint-N, to resume from
RUN/metrics.jsonl     one line per log              RUN/model/         the trained model, written at the end
RUN/result.json       the summary, written last     RUN/view.json      data about the model for reports
RUN/best/             the model with the lowest validation loss, with `keep_best` only
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from skipstone.core import checksums
from skipstone.core.atomic_write import WriteError, write_whole
from skipstone.core.plain_text import check_yaml, parse_json, read_object, read_text
from skipstone.core.sealed import check_text, read_sealed, sealed, unsealed_line
from skipstone.core.strict import PlainDict, PlainMapping, from_dict
from skipstone.data.config import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from skipstone.data.prepare import PreparedData
    from skipstone.model.causal_lm import SkipstoneForCausalLM

CONFIG, ENVIRONMENT, METRICS, RESULT = "config.yaml", "environment.json", "metrics.jsonl", "result.json"
TOKENIZER, CHECKPOINTS, MODEL, VIEW = "tokenizer", "checkpoints", "model", "view.json"
BEST, BEST_STEP = "best", "best.json"  # the folder, and in it the step and its validation loss
ADAPTER = "adapter_config.json"  # of PEFT; its presence without config.json makes a folder a saved adapter
MODEL_CONFIG = "config.json"  # its presence makes a folder a saved model
METRICS_LINES = "metrics_lines"  # in result.json: how many lines metrics.jsonl had at the end
HASHED = 256 * 2**20  # bytes of weights up to which hashes are compared at every load, which takes a moment


@dataclass(frozen=True)
class Run:
    """A run folder, or the folder of a saved model (weights and perhaps a tokenizer, but no recipe), to be read.

    folder: path of the folder. Raises FileNotFoundError if there is no such folder, and ValueError if it is neither a
    run nor a saved model.
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        if not self.folder.is_dir():
            raise FileNotFoundError(f"run folder {str(self.folder)!r} does not exist")
        if not (self.folder / CONFIG).is_file() and not self.is_saved_model:
            if (self.folder / ADAPTER).is_file():
                raise ValueError(
                    f"{str(self.folder)!r} holds an adapter ({ADAPTER}), not a model; `skipstone convert "
                    f"{self.folder} OUT` merges it into its base: name OUT then"
                )
            raise ValueError(
                f"{str(self.folder)!r} is neither a run folder (no {CONFIG}) nor a saved model (no {MODEL_CONFIG})"
            )

    @property
    def is_saved_model(self) -> bool:
        """Whether this is the folder of a saved model and not of a run."""
        return (self.folder / MODEL_CONFIG).is_file() and not (self.folder / CONFIG).is_file()

    @property
    def name(self) -> str:
        """The name of the folder, without its parents."""
        return self.folder.resolve().name

    @property
    def finished(self) -> bool:
        """Whether training has reached its end and written result.json."""
        return (self.folder / RESULT).is_file()

    def config(self) -> PlainDict:
        """Return the recipe with all defaults filled in: {"model": ..., "data": ..., "train": ...}.

        Raises ValueError for a saved model, which has no recipe, and for a file that is damaged or cannot be read.
        """
        text = self._read(CONFIG)
        check_text(text, self.folder / CONFIG)
        try:
            check_yaml(text)
            values = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{str(self.folder / CONFIG)!r} cannot be read: {reason}") from None
        if not isinstance(values, dict) or not {"model", "data", "train"} <= set(values):
            raise ValueError(f"{str(self.folder / CONFIG)!r} is not a recipe: it needs model, data and train")
        return values

    def environment(self) -> PlainDict:
        """Return environment.json as a dict: versions, commit, machine, seed, start time and command.

        The keys are `skipstone`, `torch`, `transformers`, `python`, `git_commit`, `git_dirty`, `machine`, `seed`,
        `started`, `command` and `processes`; also `data_sha256`, a fingerprint of the training data, if one was taken,
        and `resumed`, a list with one dict for each time that training was resumed. Raises ValueError for a saved
        model, which has no such file, and for a damaged file.
        """
        return self._json(ENVIRONMENT)

    def result(self) -> PlainDict:
        """Return the content of result.json, the summary of the finished training, as a dict.

        The keys are `steps`, `tokens`, `seconds`, `tokens_per_second`, `train_loss`, `validation` (a dict with
        `oracle_loss` and `causal_loss`) and `parameters` (their number), `metrics_lines` (lines of metrics.jsonl),
        `skipped_steps` if there are any, and those that the kind of training adds. Losses are in nats per token; a
        value that was not measured is None. Raises ValueError for a run that is not finished, and for a file that is
        damaged or cannot be read.
        """
        if not self.finished and not self.is_saved_model:
            raise ValueError(f"run {str(self.folder)!r} is not finished; `skipstone train ... --resume` continues it")
        return self._json(RESULT)

    def metrics(self) -> list[PlainDict]:
        """Return the entries of metrics.jsonl, the logged losses and speeds, as dicts in the order of steps.

        Each has at least "step" and "split" ("train" or "validation"). Raises ValueError if a line is invalid, or if a
        finished run has fewer lines than it wrote.
        """
        found = read_metrics(self._file(METRICS))
        try:
            known = self._json(RESULT).get(METRICS_LINES, 0) if self.finished else 0
        except ValueError:  # `result` will say so
            known = 0
        if isinstance(known, int) and len(found) < known:
            path = str(self.folder / METRICS)
            raise ValueError(f"{path!r} has lost lines: {len(found)} are left of {known} that {RESULT} knows of")
        return found

    def best(self) -> PlainDict | None:
        """Return {"step": ..., "loss": ...}, the step with the lowest validation loss and this loss, in nats per token.

        None if there is no folder RUN/best: the model of this step is saved there only if the recipe sets
        train.keep_best. Raises ValueError for a damaged file.
        """
        return self._json(f"{BEST}/{BEST_STEP}") if (self.folder / BEST).is_dir() else None

    def model_folder(self) -> Path:
        """Return the folder of the model's weights: the final ones or, with a warning, those of the last checkpoint.

        For a saved model, it is the folder itself. Raises ValueError if there are neither final weights nor a
        checkpoint.
        """
        if self.is_saved_model:
            return self.folder
        if (self.folder / MODEL).is_dir():  # complete since it has its name
            return self.folder / MODEL
        last = last_checkpoint(self.folder)
        if last is None:
            raise ValueError(f"run {str(self.folder)!r} has neither a final model nor a checkpoint yet")
        warnings.warn(f"run {str(self.folder)!r} is not finished; using its {last.name}", stacklevel=3)
        return last

    def load_model(self) -> SkipstoneForCausalLM:
        """Load the saved model, or that of the last checkpoint if training has not finished, in evaluation mode.

        Raises ValueError, naming the file, if weights are missing or unexpected or differ from what was written: sizes
        are always compared, SHA-256 hashes for files of up to 256 MiB.
        """
        from skipstone.model.pretrained import load_model

        folder = self.model_folder()
        checksums.check(folder, hash_up_to=HASHED)
        model = load_model(folder)
        model.eval()
        return model

    def load_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Load the tokenizer of the run or saved model; None if there is none, as for synthetic tasks.

        Raises ValueError for files that cannot be read.
        """
        from skipstone.data.tokenizers import load_saved
        from skipstone.model.pretrained import TOKENIZER_FILES

        folder = self.folder if self.is_saved_model else self.folder / TOKENIZER
        if folder.is_file():
            raise ValueError(f"{str(folder)!r} is a file; it should be the folder of the run's tokenizer")
        return load_saved(folder) if any((folder / name).is_file() for name in TOKENIZER_FILES) else None

    def data_config(self) -> DataConfig:
        """Return the data section of the recipe, parsed.

        Raises ValueError for a saved model, which has no recipe, and for invalid values.
        """
        return from_dict(DataConfig, self.config()["data"], "data")

    def data(self, split: str = "validation", *, train: bool = False) -> PreparedData:
        """Return the run's datasets, tokenised with the tokenizer that is saved in the run.

        split: "validation" or "test", the split whose rows become `validation` in the result. train: whether to load
        the training split as well. Raises ValueError for a saved model, and FileNotFoundError for data that are not
        there.
        """
        from skipstone.data.prepare import prepare

        return prepare(self.data_config(), tokenizer=self.load_tokenizer(), train=train, split=split)

    def kept_view(self) -> PlainDict | None:
        """Return what view.json holds for reports: the model's mechanisms as text, and its decisions on a few rows.

        The keys are "format", "mechanisms", "set_capacity" and "trace" (`ModelView.to_dict`). Returns None if there is
        no such file, if it is damaged, or if the recipe or the weights have changed since it was saved.
        """
        try:
            values = read_object(self.folder / VIEW)
            same = values["sha256"] == self._digest() and sealed(values["view"])["sha256"] == values["of_view"]
            return dict(values["view"]) if same else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep_view(self, view: PlainMapping) -> None:
        """Save what reports show of the trained model in view.json, so that they need not run the model.

        view: what `ModelView.to_dict` returned. If the folder cannot be written, nothing happens.
        """
        try:
            values = {"sha256": self._digest(), "of_view": sealed(view)["sha256"], "view": view}
            write_whole(self.folder / VIEW, json.dumps(values) + "\n")
        except (OSError, WriteError):
            return

    def _digest(self) -> str:
        """Return the SHA-256 of the recipe, the model's configuration and its weights."""
        model, digest = self.model_folder(), hashlib.sha256()
        for path in [self.folder / CONFIG, model / MODEL_CONFIG, *sorted(model.glob("*.safetensors"))]:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _file(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            what = "is a saved model, not a run" if self.is_saved_model else "is incomplete"
            raise ValueError(f"{str(self.folder)!r} {what}: it has no {name}")
        return path

    def _read(self, name: str) -> str:
        return read_text(self._file(name))

    def _json(self, name: str) -> PlainDict:
        return read_sealed(self._file(name))


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names, with as many parent folders as are needed to distinguish them.

    If a folder is given twice, each name is followed by its number in the list, counted from 1.
    """
    paths = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, paths), default=0) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{parts[-1]} ({i})" for i, parts in enumerate(paths, 1)]


def read_metrics(path: Path) -> list[PlainDict]:
    """Return the entries of the metrics file `path` (JSON lines), one dict per line, in the order of the file.

    Each has at least "step", an integer, and "split" ("train" or "validation"). A last line that a crash cut short is
    left out. Raises ValueError, naming file and line, for an invalid line.
    """
    found = []
    for number, line in enumerate(read_text(path).split("\n")[:-1], 1):
        try:
            values = parse_json(line)
            if not isinstance(values["step"], int) or not isinstance(values["split"], str):
                raise ValueError("step and split are not a number and a name")
            content = unsealed_line(values)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{str(path)!r}, line {number}, is not a line of metrics: {error!r}") from None
        found.append(content)
    return found


def count_lines(path: Path) -> int:
    """Return the number of complete lines in the metrics file `path`; 0 if there is no such file.

    The file is flushed to disk first.
    """
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return sum(part.count(b"\n") for part in iter(partial(file.read, 1 << 20), b""))


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest `checkpoints/checkpoint-N` of a run folder (largest N); None if there is none."""
    return next(reversed(checkpoints(folder)), None)


def checkpoints(folder: Path) -> list[Path]:
    """Return every `checkpoints/checkpoint-N` of a run folder, in ascending order of the step N."""
    found = [path for path in (folder / CHECKPOINTS).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))
