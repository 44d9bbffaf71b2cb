"""The two files in which the mechanisms that `route` put into a model are saved, and their writing and reading.

skipstone_routing.json has the mechanisms' configuration entries, skipstone_routing.safetensors their weights. The JSON
file states its own SHA-256 and the SHA-256 of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from skipstone.core import atomic_write
from skipstone.core.checksums import Damaged, file_sha256
from skipstone.core.sealed import read_sealed, sealed
from skipstone.core.strict import PlainDict

ENTRIES, WEIGHTS = "skipstone_routing.json", "skipstone_routing.safetensors"
VERSION = 1
HASH = "weights_sha256"  # in the entries; files of earlier releases have none


def write(folder: Path, entries: list[dict[str, object]], modules: Mapping[str, nn.Module]) -> None:
    """Write the configuration entries and weights of mechanisms into a folder, leaving its other files alone.

    The files are skipstone_routing.json and skipstone_routing.safetensors. folder: created if missing. entries: one
    dict per mechanism, as in `SkipstoneConfig.mechanisms`. modules: the modules that hold the mechanisms' weights; keys
    are the prefixes of their weights' names in the file. Raises `WriteError` if the disk is full or fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in _named(modules).items()}
    partial = atomic_write.partial_of(folder / WEIGHTS)
    with atomic_write.naming(folder / WEIGHTS):
        save_file(tensors, partial)
        atomic_write.sync(partial)
        partial.replace(folder / WEIGHTS)
    content = {"version": VERSION, "mechanisms": entries, HASH: file_sha256(folder / WEIGHTS)}
    atomic_write.write_json(folder / ENTRIES, sealed(content))


def read_mechanisms(folder: Path) -> list[PlainDict]:
    """Return the configuration entries of the mechanisms saved in a folder, after comparing checksums.

    The entries are in skipstone_routing.json, which contains its own SHA-256 and the SHA-256 of the weights,
    skipstone_routing.safetensors. Files of earlier releases without hashes are not compared. Raises ValueError for a
    file of entries that is missing or invalid, and for an entry or weights file that differs from its hash.
    """
    path = folder / ENTRIES
    if not path.is_file():
        raise ValueError(f"cannot read {str(path)!r}: no such file")
    found = read_sealed(path)
    try:
        version, entries, known = found["version"], found["mechanisms"], found.get(HASH)
        if version != VERSION or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"version {version!r}, expected {VERSION}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {type(error).__name__}: {error}") from None
    if known is not None and (folder / WEIGHTS).is_file() and file_sha256(folder / WEIGHTS) != known:
        raise Damaged(f"{str(folder / WEIGHTS)!r} is damaged: its SHA-256 is not the one in {ENTRIES}")
    return list(entries)


def read_weights(folder: Path, modules: Mapping[str, nn.Module]) -> None:
    """Load the weights of mechanisms from skipstone_routing.safetensors in a folder into `modules`, in place.

    modules: the modules that hold the mechanisms' weights; keys are the prefixes of their weights' names in the file.
    Raises ValueError for a file that is missing or broken, or whose weights do not fit `modules`.
    """
    path = folder / WEIGHTS
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from None
    expected = _named(modules)
    wrong = sorted(found.keys() ^ expected.keys())
    wrong += [name for name, value in expected.items() if name in found and found[name].shape != value.shape]
    if wrong:
        differ = f"{wrong[0]} differs" if len(wrong) == 1 else f"{wrong[0]} and {len(wrong) - 1} more differ"
        raise ValueError(f"{str(path)!r} does not fit this model: {differ}")
    for name, value in expected.items():
        value.data.copy_(found[name])


def _named(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the parameters and saved buffers of these modules, by name with the module's key as prefix."""
    return {f"{prefix}.{name}": value for prefix, m in modules.items() for name, value in m.state_dict().items()}
