"""Run one recipe of a study that begins with a checkpoint: adapt the checkpoint, or keep it unchanged.

The recipes that a study compares are called its arms.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from skipstone.adapt.adaptation import adapt
from skipstone.adapt.self_generated import write
from skipstone.core.atomic_write import complete
from skipstone.core.lock import locked
from skipstone.core.strict import PlainDict
from skipstone.data.corpora import load_corpus
from skipstone.model.pretrained import convert
from skipstone.runs import Run
from skipstone_studies.record import digest
from skipstone_studies.study import SAVE_MINUTES, RecipeDict, train_run

PARTS = ("model", "data", "train", "adapt")
HUB = {
    "SmolLM2-135M-Instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "gemma-3-270m-q4_k_m": "google/gemma-3-270m",  # the file of this name is in five packages of the Python index
}
# Texts whose folders were named by the options alone: {their digest: the source that wrote them}.
EARLIER = {"4140169338c4cd0d": "stories260K", "8111822553fceb10": "SmolLM2-135M-Instruct"}


def adapt_run(recipe: RecipeDict, folder: Path, resume: bool, callbacks: Sequence[TrainerCallback]) -> None:
    """Run one recipe of a study (an arm): adapt a checkpoint, store it unchanged, or train a model from random weights.

    recipe: a dict with the sections model, data, train and adapt, and two more keys. `source`: the name of a
    checkpoint, or {"arm": NAME} for the run of another arm of the same study and seed; without this key, a model is
    trained from random weights. `sampled`: options with which the source generates the text that becomes the corpus
    (the arguments of `sampled_text` other than source and out, such as `tokens`). Without a section `adapt`, the source
    is stored unchanged. folder: the run folder to write. resume: whether to continue an interrupted run. callbacks:
    further callbacks of the trainer.
    """
    if "source" not in recipe:
        train_run(recipe, folder, resume, callbacks)
        return
    source, parts = source_of(recipe, folder), {name: recipe[name] for name in recipe if name in PARTS}
    if "sampled" in recipe:
        texts = sampled_text(source, text_folder(folder, recipe["source"], recipe["sampled"]), **recipe["sampled"])
        parts["data"] = {**parts.get("data", {}), "corpus": f"text:{texts}"}
    if "adapt" in recipe:
        adapt(source, parts, out=folder, resume=resume, save_minutes=SAVE_MINUTES, callbacks=callbacks)
    else:
        convert(source, folder)


def source_of(recipe: RecipeDict, folder: Path) -> str:
    """Return the path or Hub name of the checkpoint with which a recipe begins.

    recipe: a recipe whose key `source` is the name of a checkpoint or {"arm": NAME}. folder: the run folder of the arm
    (compared recipe); other arms' run folders lie beside it. Raises FileNotFoundError if the checkpoint does not exist.
    """
    source = recipe["source"]
    return source_path(source) if isinstance(source, str) else str(run_beside(folder, source["arm"]).model_folder())


def source_path(name: str) -> str:
    """Return the path of a checkpoint below the folder SKIPSTONE_DATA, or its name on the Hugging Face Hub.

    name: the checkpoint's name, such as "SmolLM2-135M-Instruct": in SKIPSTONE_DATA, a folder of this name or a file
    NAME.gguf. Raises FileNotFoundError if there is neither and `HUB`, this module's table of names on the Hub, lacks
    it.
    """
    data = os.environ.get("SKIPSTONE_DATA")
    for path in (Path(data, name), Path(data, f"{name}.gguf")) if data else ():
        if path.exists():
            return str(path)
    if name in HUB:
        return HUB[name]
    raise FileNotFoundError(
        f"checkpoint {name!r} was not found; put its folder into the folder that SKIPSTONE_DATA names"
    )


def run_beside(folder: Path, arm: str) -> Run:
    """Return the run of another arm (compared recipe) of the same study, of the same scale (size) and seed.

    folder: the run folder of the arm that asks. arm: the name of the other. Raises FileNotFoundError if it has not been
    run.
    """
    path = folder.with_name(f"{arm}-seed{folder.name.rpartition('seed')[2]}")
    if not path.is_dir():
        raise FileNotFoundError(f"the run of arm {arm!r} is not in {str(folder.parent)!r}: run that arm first")
    return Run(path)


def text_folder(folder: Path, source: str | PlainDict, options: PlainDict) -> Path:
    """Return the path of the folder for text that a checkpoint generates, one for all runs of a study at one scale.

    folder: a run folder of the study. source: the key `source` of a recipe, the name of a checkpoint or {"arm": NAME}
    for another arm's run of the seed of `folder`. options: the options by which the text is generated, by name, such as
    `tokens`. Other sources and other options have other folders. A folder that an earlier version named by the options
    alone is returned if it exists and its text is known to come from `source` (`EARLIER`).
    """
    earlier = digest(options)
    if EARLIER.get(earlier) == source and (path := folder.with_name(f"text-{earlier}")).is_dir():
        return path
    made_by = source if isinstance(source, str) else run_beside(folder, source["arm"]).name
    return folder.with_name(f"text-{digest({'source': made_by, 'options': options})}")


def sampled_text(source: str, out: Path, also: str | None = None, **options: Any) -> Path:
    """Let a checkpoint generate text into the folder `out`, unless that exists already; return the folder.

    source: path or hub name of the checkpoint. also: name of a corpus whose validation split becomes the first part of
    the training text; None means that there is only generated text. options: `tokens` (stop once there are so many),
    `length` (most tokens of a text), `batch` (texts generated at a time), `start` (prompt of each text), `seed` and
    `dtype`, with the defaults of `skipstone.adapt.self_generated.write`. The folder has train.txt and validation.txt.
    Raises `Busy` (a ValueError) while another process generates into the folder.
    """
    if not out.is_dir():
        with locked(out), complete(out) as partial:  # raises Busy while another process samples it
            write(source, partial, **options)
            if also is not None:
                train = partial / "train.txt"
                parts = [*load_corpus(also).documents("validation"), train.read_text(encoding="utf-8")]
                train.write_text("\n\n".join(parts), encoding="utf-8")
    return out
