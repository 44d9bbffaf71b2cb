"""Find the decoder of a model and its blocks, and refuse models that cannot be routed."""

from __future__ import annotations

from typing import Any

from torch import nn

from skipstone.core.routing_module import RoutingModule

KERNELS = ("sdpa", "eager")


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the causal decoder inside a transformers language model, or the text decoder of a multimodal one.

    Raises ValueError for a model that has none, that has an encoder, whose blocks have mechanisms already, or that is a
    Skipstone model, which names its mechanisms in its configuration.
    """
    kind, config = type(model).__name__, getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise ValueError(f"route needs a decoder of transformers, got {kind}; wrap single blocks by skipstone.Routed")
    if any(isinstance(module, RoutingModule) for module in model.modules()):
        raise ValueError(f"{kind} carries mechanisms already; undo() them first, or name them in its configuration")
    if getattr(config, "model_type", None) == "skipstone":
        raise ValueError(f"{kind} takes mechanisms in its configuration (SkipstoneConfig.mechanisms), not by route")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} has an encoder, which route does not support; a decoder-only model is needed")
    found = model.get_decoder()  # type: ignore[operator]
    assert isinstance(found, nn.Module)
    return found


def text_config(decoder: nn.Module) -> Any:
    """Return the configuration of the decoder's text blocks (for a multimodal model, the text part)."""
    config: Any = decoder.config
    return config.get_text_config(decoder=True)


def blocks_of(decoder: nn.Module) -> nn.ModuleList:
    """Return the decoder's list of blocks: its one child list with `num_hidden_layers` modules.

    Raises ValueError if there is no such list, or more than one.
    """
    count = text_config(decoder).num_hidden_layers
    found = [m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(found) != 1:
        what = "no list" if not found else f"{len(found)} lists"
        raise ValueError(f"{type(decoder).__name__} has {what} of {count} blocks, so it is not clear what to route")
    return found[0]


def require_kernel(decoder: nn.Module) -> None:
    """Raise ValueError unless the decoder's attention implementation is "sdpa" or "eager".

    Skipping passes attention masks for some of the queries only, which other implementations do not accept.
    """
    kernel = text_config(decoder)._attn_implementation
    if kernel not in KERNELS:
        raise ValueError(
            f"attn_implementation {kernel!r} takes no mask for single queries; route needs {' or '.join(KERNELS)}"
        )
