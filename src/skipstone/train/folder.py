"""Write run folders. Files and folders in them appear only when they are complete."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from skipstone.core import atomic_write, checksums
from skipstone.core.atomic_write import write_json, write_whole
from skipstone.core.sealed import sealed, sealed_line, sealed_text
from skipstone.core.strict import PlainMapping
from skipstone.runs import CONFIG, ENVIRONMENT, METRICS, METRICS_LINES, MODEL, RESULT, Run, count_lines, read_metrics
from skipstone.train import environment
from skipstone.train.recipe import NOT_THE_RESULT, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATA = "data_sha256"  # in environment.json
ADDED = {
    "train.parallel": "ddp",
    "train.average_last": 0.0,
}  # keys that runs of earlier releases lack, and what they trained with
Write = Callable[[Path], object]  # writes a file or a folder at the path


def default_folder(recipe: Recipe) -> Path:
    """Return the default run folder of a recipe: runs/NAME, or runs/CORPUS-TIME for a recipe without a name."""
    if recipe.name is not None:
        return Path("runs") / recipe.name
    corpus = recipe.data.corpus.partition(":")[0]
    return Path("runs") / f"{corpus}-{datetime.now():%Y%m%d-%H%M%S}"


def chosen(recipe: Recipe, out: Path | None, resume: bool) -> Path:
    """Return the folder of a new or resumed run.

    recipe: provides the default folder, runs/NAME or, without a name, runs/CORPUS-TIME. out: the folder that the user
    named; None means the default. resume: whether an existing run is continued. Raises ValueError if a resumed run is
    named by neither `out` nor the recipe, and FileNotFoundError if the folder of a resumed run does not exist.
    """
    folder = Path(out) if out is not None else default_folder(recipe)
    if not resume:
        return folder
    if out is None and recipe.name is None:
        raise ValueError("--resume needs the run folder: name it with --out")
    if not folder.is_dir():
        raise FileNotFoundError(f"run folder {str(folder)!r} does not exist: nothing to resume")
    return folder


def is_first_process() -> bool:
    """Return whether this process is the first of those that train together, which writes all files.

    It reads the environment variable RANK, so it can be called before Trainer's arguments exist. Without it, there is
    one process, the first.
    """
    return os.environ.get("RANK", "0") == "0"


def check_new(folder: Path) -> None:
    """Raise FileExistsError if `folder` exists, unless it is an empty folder."""
    if not atomic_write.is_free(folder):
        raise FileExistsError(
            f"run folder {str(folder)!r} exists already and nothing is overwritten; name another with --out, or "
            "continue it with --resume"
        )


def create(folder: Path, config: PlainMapping, seed: int, parts: Mapping[str, Write], data: str | None = None) -> None:
    """Create a run folder that contains the recipe, the environment and `parts`; it appears complete or not at all.

    The recipe is config.yaml, the environment environment.json. folder: must not exist, or be empty; otherwise
    FileExistsError is raised. config: the recipe with all defaults, as plain values. seed: the run's seed, which is
    noted in environment.json. parts: for each further file or folder, by name, a function that writes it at the path
    passed to it. data: fingerprint of the data that the run trains on, noted in environment.json; None means that none
    is noted.
    """
    check_new(folder)
    more = {} if data is None else {DATA: data}

    def fill(partial: Path) -> None:
        write_json(partial / ENVIRONMENT, sealed(environment.describe(seed) | more))
        for name, write in parts.items():
            write(partial / name)
        write_whole(partial / CONFIG, sealed_text(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)))

    atomic_write.new_folder(folder, fill)


def add_absent(folder: Path, parts: Mapping[str, Write]) -> None:
    """Write those of `parts` that are missing from a run folder.

    This repairs runs of earlier releases that were killed before they wrote all of their files. folder: the run folder,
    which exists. parts: for each file or folder, by name, a function that writes it at the path passed to it.
    """
    for name, write in parts.items():
        path = folder / name
        if path.exists():
            continue
        partial = atomic_write.partial_of(path)
        atomic_write.remove(partial)
        with atomic_write.naming(path):
            write(partial)
            partial.rename(path)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer to `folder` with the hashes of its files.

    Transformers' notes on where the tokenizer was loaded from are left out.
    """
    for place in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(place, None)
    tokenizer.save_pretrained(folder)
    checksums.record(folder)


def check_same(saved: PlainMapping, given: PlainMapping, where: str = "") -> None:
    """Raise ValueError naming the first key in which a recipe differs from that of the run to be resumed.

    saved: the recipe of the run, as nested plain dicts. given: the recipe to resume it with. where: prefix of the keys
    in messages, such as "train." in a recursive call. Options of `train` that cannot change the result, such as the
    checkpoint intervals, may differ (`NOT_THE_RESULT`).
    """
    for key in {**saved, **given}:
        if where == "train." and key in NOT_THE_RESULT:
            continue
        path, old, new = f"{where}{key}", saved.get(key, ADDED.get(f"{where}{key}")), given.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            check_same(old, new, f"{path}.")
        elif old != new:
            raise ValueError(
                f"the recipe differs from the run's in {path}: {old!r} there, {new!r} now; a run must be resumed "
                "with the recipe that it was started with"
            )


def check_data(folder: Path, data: str | None, what: str = "the data") -> None:
    """Raise ValueError if the data have changed since the run in `folder` began.

    folder: the run folder, in whose environment.json the fingerprint is noted. data: fingerprint (SHA-256) of the
    present data; None if they have none. what: what the fingerprint is of, for the message. Nothing is checked if the
    run noted none; earlier releases noted one for shards only.
    """
    known = Run(folder).environment().get(DATA)
    if known is not None and known != data:
        raise ValueError(
            f"{what} have changed since the run {str(folder)!r} began (fingerprint {known} there, {data} now); "
            "a run must be resumed with what it was started with"
        )


def note_resumption(folder: Path, step: int) -> None:
    """Note in environment.json that this process resumes the run after step `step`.

    An entry is added to the list `resumed`, with the step, start time, command, number of processes, and what has
    changed of versions and machine since the run began. folder: the run folder.
    """
    known = Run(folder).environment()
    now = environment.describe(known["seed"])
    changed = {key: now[key] for key in now if key not in environment.session() and now[key] != known.get(key)}
    known.setdefault("resumed", []).append({"step": step, **environment.session(), "changed": changed})
    write_json(folder / ENVIRONMENT, sealed(known))


def cut_metrics(folder: Path, step: int, count: int | None = None) -> None:
    """Remove the lines of metrics.jsonl after step `step`, because a run that resumes there writes them again.

    folder: the run folder. count: number of lines when the checkpoint was written; lines beyond it are removed even if
    they belong to step `step`. None means that it is not known. Raises ValueError if fewer than `count` lines are left.
    """
    path = folder / METRICS
    if not path.is_file():
        if count:
            raise ValueError(f"{str(path)!r} is absent; it had {count} lines when checkpoint-{step} was saved")
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    if count is not None and len(kept) < count:
        raise ValueError(f"{str(path)!r} has lost lines: {len(kept)} are left of {count} up to step {step}")
    write_whole(path, "".join(sealed_line(line) + "\n" for line in kept[:count]))


def save_model(
    folder: Path,
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    card: PlainMapping,
    name: str = MODEL,
    parts: Mapping[str, Write] | None = None,
) -> None:
    """Write a model folder RUN/NAME: weights, tokenizer, model card and hashes; it appears complete or not at all.

    folder: the run folder. model: any object with a method `save_pretrained`. tokenizer: the tokenizer to save; None if
    there is none. card: arguments of `skipstone.model.card.write_card` besides the title, such as `losses`. name: name
    of the folder within the run. parts: for each further file, by name, a function that writes it at the path passed to
    it; None means no further files.
    """
    from skipstone.model.card import write_card

    partial = atomic_write.partial_of(folder / name)
    atomic_write.remove(partial)
    with atomic_write.naming(folder / name):
        try:
            model.save_pretrained(partial)
            if tokenizer is not None:
                save_tokenizer(tokenizer, partial)
            write_card(model, partial, title=folder.resolve().name, **card)
            for part, write in (parts or {}).items():
                write(partial / part)
            checksums.record(partial, checksums.all_but_model_cards(partial))
        except BaseException:
            atomic_write.remove(partial)
            raise
    atomic_write.replace_folder(partial, folder / name)


def save_result(folder: Path, result: PlainMapping) -> None:
    """Write result.json, the summary of a finished run, with the number of lines of metrics.jsonl.

    An existing file is replaced. folder: the run folder. result: the entries of the summary.
    """
    write_json(folder / RESULT, sealed({**result, METRICS_LINES: count_lines(folder / METRICS)}))
