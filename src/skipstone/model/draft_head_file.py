"""The files of a draft head, a block that guesses the next tokens, beside the weights of its model.

They are `draft_head.safetensors` and `draft_head.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from skipstone.core.atomic_write import check_writable, naming, partial_of, remove, sync, sync_names, write_whole
from skipstone.core.checksums import Damaged, file_sha256
from skipstone.core.sealed import read_sealed, sealed
from skipstone.core.strict import PlainDict, PlainMapping
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.draft_head import DraftHead
from skipstone.model.loading import one_line

FILE, ABOUT = "draft_head.safetensors", "draft_head.json"
FORMAT, WEIGHTS = 1, "weights_sha256"


def require_draft_head(folder: str | Path) -> Path:
    """Return the path of a draft head's weights, draft_head.safetensors, in a folder.

    A draft head is a block that guesses a model's next tokens. Raises FileNotFoundError, with a message of one line, if
    the weights or their description, draft_head.json, are missing.
    """
    if not str(folder):  # of a model that was not loaded; the working directory may hold one of another model
        raise FileNotFoundError(f"draft 'head' needs {FILE}, and the model was not loaded from a folder that has one")
    path = Path(folder) / FILE
    if not path.is_file() or not path.with_name(ABOUT).is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} has no {FILE if not path.is_file() else ABOUT}, which draft 'head' needs: `skipstone "
            "draft-head` trains one"
        )
    return path


def refuse_draft_head(folder: str | Path) -> None:
    """Raise an error if no draft head, a block that guesses a model's next tokens, can be saved in a folder.

    Raises FileExistsError if its description, draft_head.json, is there already, and OSError or `WriteError` if the
    folder cannot be written. Weights without the description are no obstacle: a killed process has left them.
    """
    path = Path(folder) / ABOUT
    if path.exists():
        raise FileExistsError(f"{str(path)!r} exists already; nothing is overwritten; remove it to train another head")
    check_writable(path)


def save_draft_head(head: DraftHead, folder: str | Path, about: PlainMapping) -> Path:
    """Write a draft head (it guesses a model's next tokens) beside the model's weights; return its weights' path.

    The files are draft_head.safetensors and the description, draft_head.json, in `folder`. about: the entries of the
    description, such as the steps of its training. The description is written last and contains the hash of the
    weights, so that a killed process leaves no head that would be read. Raises FileExistsError if there is a head
    already, OSError if the folder cannot be written, and `WriteError` if the disk is full.
    """
    refuse_draft_head(folder)
    path = Path(folder) / FILE
    aside = partial_of(path)
    with naming(path):
        try:
            save_file({name: x.contiguous().cpu() for name, x in head.state_dict().items()}, aside)
            sync(aside)
            digest = file_sha256(aside)
            aside.replace(path)
            sync_names(path.parent)
        finally:
            remove(aside)
    values = {"format": FORMAT, **about, "shortlist": len(head.shortlist_R), WEIGHTS: digest}
    write_whole(path.with_name(ABOUT), json.dumps(sealed(values), indent=1) + "\n")
    return path


def load_draft_head(model: SkipstoneForCausalLM, folder: str | Path | None = None) -> DraftHead:
    """Load the draft head (it guesses a model's next tokens) in a folder, with frozen weights, in evaluation mode.

    model: the model that the head belongs to. folder: None means the folder from which the model was loaded. Raises
    FileNotFoundError if there is no head, `Damaged` if its files are not as they were written, and ValueError for a
    head of another model or of another format.
    """
    path = require_draft_head(model.name_or_path if folder is None else folder)
    values = _about(path.with_name(ABOUT))
    if file_sha256(path) != values.get(WEIGHTS):
        raise Damaged(f"{str(path)!r} is damaged: {ABOUT} states another SHA-256")
    try:
        tensors = load_file(path)
        if tensors["told"].shape[1] != model.config.hidden_size:
            raise ValueError(
                f"{str(path)!r} belongs to another model: its width is {tensors['told'].shape[1]}, the model's "
                f"{model.config.hidden_size}"
            )
        head = DraftHead(model.config, len(tensors["shortlist_R"]))
        head.load_state_dict(tensors)
    except (SafetensorError, KeyError, RuntimeError, IndexError) as error:
        raise ValueError(f"{str(path)!r} belongs to another model or cannot be read: {one_line(error)}") from None
    head.require(model, repr(str(path)))
    return head.requires_grad_(False).eval()


def stamp(folder: str | Path) -> tuple[str, float, float]:
    """Return values that change when the draft head in a folder is replaced, so that outdated copies are noticed.

    A draft head is a block that guesses a model's next tokens. The values are the path of its weights, and the times in
    seconds at which its two files were last modified. Raises FileNotFoundError if there is no head.
    """
    path = require_draft_head(folder)
    return str(path.resolve()), path.stat().st_mtime, path.with_name(ABOUT).stat().st_mtime


def _about(path: Path) -> PlainDict:
    values = read_sealed(path)
    if values.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r}: format must be {FORMAT}, got {values.get('format')!r}")
    return values
