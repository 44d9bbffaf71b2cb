"""Mixture-of-Depths around a segment: one decision for several neighbouring blocks.

    x_i <- x_i + w(r_i) * (Stack(x)_i - x_i)     if token i is kept        r_i = router(x_i), once for the whole stack
    x_i <- x_i                                   otherwise

Stack(x) is the stream after all blocks of the segment, w the option `weight`. A segment has one router, one threshold
and one gather. Kept tokens pass all of its blocks together and attend to each other there, so the stack sees a shorter
sequence; a skipped token is computed exactly as in the model without these blocks. With `kv: full`, the other tokens
give keys and values to every block of the stack, from the stream as it enters it. All options are those of
`mixture_of_depths`. The middle of the model as one stack on few positions is what SpaceByte (arXiv 2404.14408, with
`decision: boundary`) and H-Net (arXiv 2507.07955) do; Mixture-of-Depths (arXiv 2404.02258) routes single blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from skipstone.mechanisms.mixture_of_depths import MixtureOfDepths, MixtureOfDepthsConfig


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(MixtureOfDepthsConfig):
    """The options of a segment, several neighbouring blocks that share one decision.

    The options are those of `MixtureOfDepthsConfig`, except that `capacity` must be a single number. Raises ValueError
    for a list or a ramp.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.capacity, float | int):
            raise ValueError(f"capacity must be one number for a segment, which decides once, got {self.capacity!r}")


class Segment(MixtureOfDepths):
    """Mixture-of-Depths around several neighbouring blocks: a token passes all of them or skips all of them.

    There is one router and one decision for the segment. hidden_size: width of the model. placement: the segment's
    first block; None outside of a model. Options are the fields of `SegmentConfig`, as keyword arguments or as
    `config`.
    """

    Config = SegmentConfig
    default_layers = "1:-1"
    sites = ("segment",)
