"""Whether the Hugging Face hub can be reached at all, found out before its own library tries for half a minute."""

from __future__ import annotations

from pathlib import Path

SECONDS = 5  # that the one request may take


def require_hub(name: str) -> None:
    """Raise FileNotFoundError with one line if nothing of a model is in the hub's cache and the hub cannot be asked.

    name: a hub name, such as owner/name. With HF_HUB_OFFLINE set, the hub is not asked and counts as unreachable.
    """
    if (reason := why_unreachable(name)) is not None:
        raise FileNotFoundError(f"{name!r} is no folder here and not in the hub's cache, and {reason}")


def why_unreachable(name: str, kind: str = "model") -> str | None:
    """Return why the hub cannot be asked for a repository; None if it can, or if a snapshot is in the local cache.

    name: a hub name, such as owner/name; for a text that cannot be one, the result is None. kind: "model" or "dataset".
    With HF_HUB_OFFLINE set, no request is made; otherwise one, which takes at most some seconds and is not repeated.
    Whatever the hub answers, even that there is no such repository, means that it can be asked.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, is_offline_mode
    from huggingface_hub.errors import FileMetadataError, HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return None  # whoever reads the files tells that it is no name
    cached = Path(constants.HF_HUB_CACHE) / "--".join([f"{kind}s", *name.split("/")]) / "snapshots"
    if cached.is_dir():
        return None
    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", repo_type=kind), timeout=SECONDS)
    except (HfHubHTTPError, FileMetadataError):
        return None
    except Exception as error:  # of the library that huggingface_hub makes requests with
        return f"the hub cannot be reached: {' '.join(str(error).split())[:200] or type(error).__name__}"
    return None
