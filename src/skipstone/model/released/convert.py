"""The table of layouts in which papers released weights, and conversion from such a file to a model folder and back."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from skipstone.core import checksums
from skipstone.core.atomic_write import complete
from skipstone.core.strict import choose, unknown
from skipstone.model.card import write_card
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig
from skipstone.model.loading import Dtype, about, from_tensors, named_dtype, quiet
from skipstone.model.pretrained import load_model
from skipstone.model.released.files import read_weights, write_weights
from skipstone.model.released.layout import ReleasedLayout
from skipstone.model.released.polychromatic import POLYCHROMATIC
from skipstone.model.released.tsa import TSA

LAYOUTS: dict[str, ReleasedLayout] = {"tsa": TSA, "polychromatic": POLYCHROMATIC}
WRITTEN = (".pt", ".safetensors")


def load_released(file: str | Path, layout: str, dtype: Dtype = None, **options: object) -> SkipstoneForCausalLM:
    """Load the model in a file of weights as a paper's authors released them.

    file: a .pt or .safetensors file. layout: "tsa" (Token-Selective Attention) or "polychromatic" (PolychromaticLM).
    dtype: "float32", "bfloat16", "float16" or a torch.dtype; None means the dtype of the weights in the file. options:
    values that the weights do not contain: num_heads for "tsa"; tau, the temperature of the mix of activations, for
    "polychromatic" (default: the file's value if it has one, else .1). Raises FileNotFoundError if there is no such
    file, and ValueError for a file, tensor or option that does not fit the layout.
    """
    chosen, path = choose("layout", layout, LAYOUTS), Path(file).expanduser()
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in chosen.options:
            raise ValueError(unknown(f"option of layout {layout!r}", name, chosen.options))
    weights = read_weights(path)
    with about(path.name), quiet():
        found = chosen.read(weights, given)
        config = SkipstoneConfig.from_plain(found.values)
        return from_tensors(config, _copied(found.tensors), named_dtype(dtype, _dtype(found.tensors)))


def convert_from(file: str | Path, out: Path, layout: str, dtype: Dtype = None, **options: object) -> None:
    """Convert a file of weights as a paper's authors released them to a model folder `out` with a model card.

    file: a .pt or .safetensors file. layout: "tsa" (Token-Selective Attention) or "polychromatic" (PolychromaticLM).
    dtype: "float32", "bfloat16", "float16" or a torch.dtype; None means the dtype of the weights in the file. options:
    values that the weights do not contain: num_heads for "tsa", tau (temperature of the mix of activations) for
    "polychromatic". Raises FileNotFoundError if there is no such file, ValueError for a file, tensor or option that
    does not fit the layout, and FileExistsError if `out` is a file or a non-empty folder.
    """
    with complete(Path(out)) as partial:
        model = load_released(file, layout, dtype, **options)
        with quiet():
            model.save_pretrained(partial)
            write_card(model, partial, title=Path(out).name, source=Path(file).name)
            checksums.record(partial, checksums.all_but_model_cards(partial))


def convert_to(folder: str | Path, out: Path, layout: str, dtype: Dtype = None) -> None:
    """Write one of our models, saved in `folder`, in a paper's released layout to the file `out`.

    out: ends in .pt or .safetensors, which chooses the format. layout: "polychromatic" (PolychromaticLM); the other
    layout, "tsa", can only be read. dtype: the dtype to write; None means the saved weights' dtype. Raises
    FileExistsError if `out` exists, and ValueError for another layout or suffix, and for a model that the released code
    would compute differently.
    """
    out, writers = Path(out), {name: found.write for name, found in LAYOUTS.items() if found.write is not None}
    write = choose("layout to write", layout, writers)
    if out.suffix not in WRITTEN:
        raise ValueError(f"output {str(out)!r} must end in {' or '.join(WRITTEN)}")
    with complete(out) as partial:
        model = load_model(folder, dtype)
        with about(str(folder)):
            weights = write(model)
        partial.parent.mkdir(parents=True, exist_ok=True)
        write_weights(weights, partial, out.suffix)


def _dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    return tensors["model.embed_tokens.weight"].dtype


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors out of a file that may be memory-mapped."""
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
