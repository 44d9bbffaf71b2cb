"""The files of a draft head: `draft_head.safetensors` and `draft_head.json`, beside the weights of its model."""

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
    """Return the file of the head in a folder. Raises FileNotFoundError, one line, without one."""
    path = Path(folder) / FILE
    if not path.is_file() or not path.with_name(ABOUT).is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} has no {FILE if not path.is_file() else ABOUT}, which draft 'head' needs: `skipstone "
            "draft-head` trains one"
        )
    return path


def refuse_draft_head(folder: str | Path) -> None:
    """Raise FileExistsError where a folder has a head already, OSError where nothing can be written.

    Weights without their description are what a killed process has left.
    """
    path = Path(folder) / ABOUT
    if path.exists():
        raise FileExistsError(f"{str(path)!r} exists already; nothing is overwritten; remove it to train another head")
    check_writable(path)


def save_draft_head(head: DraftHead, folder: str | Path, about: PlainMapping) -> Path:
    """Write a head and what is known of it beside the weights of its model.

    The description is written last and has the hash of the weights, so a killed process leaves no head that is read.
    Raises FileExistsError where there is a head, `WriteError` where the disk is full.
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
    """Read the draft head in a folder, or in the one that the model was loaded from.

    Raises FileNotFoundError without one, `Damaged` for files that are not what was written, ValueError for a head of
    another model or another format.
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
    """Return what changes when the head in a folder is replaced. Raises FileNotFoundError without one."""
    path = require_draft_head(folder)
    return str(path.resolve()), path.stat().st_mtime, path.with_name(ABOUT).stat().st_mtime


def _about(path: Path) -> PlainDict:
    values = read_sealed(path)
    if values.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r}: format must be {FORMAT}, got {values.get('format')!r}")
    return values
