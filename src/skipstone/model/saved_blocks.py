"""Make a model's configuration describe its blocks as they are, before the model is saved.

Tools that remove, copy or exchange blocks of a built model leave the configuration as it was. The blocks keep their
RoPE angles and attention windows, but the saved model would be built from the configuration, and compute something
else.
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from skipstone.core.weights import parameter_count
from skipstone.model.build import SITES, Blocks, Int8Linear
from skipstone.model.config import SkipstoneConfig
from skipstone.ops import int4


class SavesItsBlocks(PreTrainedModel):
    """The base class of our models that makes a saved configuration describe the blocks as they now are.

    Blocks may have been removed, copied or exchanged since the model was built. config: the model's configuration.
    """

    config: SkipstoneConfig

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, object] | None = None,
        **kwargs: object,
    ) -> None:
        """Save the model as transformers does, with a configuration that describes its blocks as they are.

        save_directory: the folder. is_main_process: whether this process writes the files. state_dict: the weights to
        write; None means the model's own. kwargs: further arguments of transformers' `save_pretrained`. Raises
        ValueError if the configuration cannot describe the blocks (`describe_blocks`).
        """
        describe_blocks(self.config, cast("Blocks", self.base_model.layers))
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)  # type: ignore[arg-type]

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of parameters as transformers does, with every weight of a four-bit matrix counted.

        only_trainable: whether to count parameters with gradients alone, of which four-bit matrices have none.
        exclude_embeddings: whether to leave out embeddings.
        """
        found = super().num_parameters(only_trainable, exclude_embeddings)
        packed = [] if only_trainable else [x for x in self.parameters() if x.dtype == torch.uint8]
        return found + parameter_count(packed) - sum(x.numel() for x in packed)


def describe_blocks(config: SkipstoneConfig, blocks: Blocks) -> None:
    """Set the fields of `config` for RoPE, windows and int8 matrices to what the blocks are, before the model is saved.

    Fields and blocks differ if blocks were removed, copied or exchanged after the model was built. Raises ValueError if
    there are more or fewer blocks than `num_hidden_layers`, or if a block has other mechanisms than the configuration
    says. Nothing is done if some block is not of our class.
    """
    if not all(hasattr(block, "turned_by") and hasattr(block, "sites") for block in blocks):
        return
    count = len(blocks)
    if config.num_hidden_layers != count:
        raise ValueError(
            f"the model has {count} blocks, but num_hidden_layers of its configuration is {config.num_hidden_layers}; "
            "set it to the number of blocks before saving"
        )
    if config.positions == "rope":
        rotary = [i for i, block in enumerate(blocks) if block.turned_by != "none"]
        if _names(config.rotary_layers) != rotary:
            config.rope_layers = rotary if len(rotary) < count else None
    windowed = [i for i, block in enumerate(blocks) if block.self_attn.window is not None]
    if _names(config.windowed_layers) != windowed:
        config.window_layers = windowed if 0 < len(windowed) < count else None
        if not windowed:
            config.attention_window = config.window_rope_parameters = None
    if config.weight_format == "int4":
        config.weight_int8 = [name for i, block in enumerate(blocks) for name in _int8_matrices(i, block)] or None
    entries = SkipstoneConfig.from_dict(config.to_dict()).mechanism_entries  # as it will be read
    for i, block in enumerate(blocks):
        said = {site: [e.key for e in entries if e.site == site and i in e.layers] for site in SITES}
        if said != block.sites:
            own, theirs = ([name for names in sites.values() for name in names] for sites in (block.sites, said))
            raise ValueError(
                f"block {i} has the mechanisms {own}, but config.mechanisms gives it {theirs}; blocks were moved: set "
                "the layers of config.mechanisms to where the mechanisms are now before saving"
            )


def _int8_matrices(layer: int, block: nn.Module) -> list[str]:
    """Return the paths below the decoder of a block's int8 matrices that could have four bits by their width."""
    named = block.named_modules()
    return [f"layers.{layer}.{x}" for x, m in named if isinstance(m, Int8Linear) and int4.serves(m.in_features)]


def _names(read: Callable[[], list[int]]) -> list[int] | None:
    """Return the block indices that `read` reads from a configuration; None if they are not in the model."""
    try:
        return read()
    except ValueError:
        return None
