"""Checks of a recipe, its run folder, corpus, loggers and model that do not load torch; mistakes are told together."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

from skipstone.core.placeholders import checked_lightly
from skipstone.core.strict import PlainMapping, from_dict, mistakes, refuse
from skipstone.data.config import DataConfig
from skipstone.data.corpora import find_entry, load_corpus
from skipstone.train import folder as folders
from skipstone.train.recipe import Recipe, TrainConfig, read_recipe

PACKAGE_OF = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}


def check(
    config: PlainMapping,
    *,
    out: Path | None = None,
    resume: bool = False,
    writes: bool = True,
    read: Callable[[PlainMapping], Recipe] = read_recipe,
    model_checker: str = "skipstone.train.setup",
) -> None:
    """Raise ValueError with one line per mistake in a recipe, its run folder, its corpus and its model.

    It does not load torch, so it takes a fraction of a second. What is wrong with the data themselves shows only later.
    config: the recipe as a plain dict. out: the run folder; None means the default, runs/NAME or runs/CORPUS-TIME.
    resume: whether the folder is to be continued instead of created. writes: whether a run folder will be written;
    False skips its check. read: the function that parses this kind of recipe and raises ValueError with its mistakes.
    model_checker: name of the module whose `model_mistakes` checks the recipe's model and the options of its
    mechanisms; it is imported with placeholders for torch.
    """
    lines: list[str] = []
    try:
        recipe = read(config)
    except ValueError as error:
        lines += mistakes(error)
        lines += _corpus_of(config.get("data"))
    else:
        lines += _surroundings(recipe, out, resume, writes)
    lines += checked_lightly(model_checker, "model_mistakes", config)
    refuse(lines)


def _surroundings(recipe: Recipe, out: Path | None, resume: bool, writes: bool) -> Iterator[str]:
    """Yield mistakes outside of a valid recipe: missing packages of loggers, its run folder, files of its corpus.

    out, resume, writes: as in `check`.
    """
    checks: list[Callable[[], object]] = [
        lambda: check_loggers(recipe.train),
        lambda: _check_corpus(recipe.data.corpus),
    ]
    if writes:
        checks.append(lambda: _check_folder(recipe, out, resume))
    for function in checks:
        try:
            function()
        except (ValueError, OSError) as error:
            yield str(error)


def _corpus_of(data: object) -> list[str]:
    """Return mistakes in the files of the corpus that a recipe's section `data` names; none if it is invalid."""
    try:
        _check_corpus(from_dict(DataConfig, data).corpus)  # type: ignore[arg-type]
    except OSError as error:
        return [str(error)]
    except ValueError:
        pass  # reported already
    return []


def check_loggers(train: TrainConfig) -> None:
    """Raise ValueError if the package of one of `train.loggers` is not installed."""
    for name in train.loggers:
        if name in PACKAGE_OF and importlib.util.find_spec(PACKAGE_OF[name]) is None:
            raise ValueError(f"train.loggers: {name} needs a package: pip install 'skipstone[{name}]'")


def _check_folder(recipe: Recipe, out: Path | None, resume: bool) -> None:
    folder = folders.chosen(recipe, out, resume)
    if not resume and folders.is_first_process():
        folders.check_new(folder)


def _check_corpus(name: str) -> None:
    """Raise an error if files of the user's own corpus `name` are missing; published corpora are not looked for."""
    entry, argument = find_entry(name)
    if name.partition(":")[0] in ("text", "jsonl"):
        load_corpus(name)
    if entry.kind == "shards" and not Path(argument).expanduser().is_dir():
        raise FileNotFoundError(f"corpus {name!r}: there is no folder {argument!r}")
