"""A decoder block with a seam around itself, its attention and its MLP.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from skipstone.core.records import Records, lift
from skipstone.core.seam import wrap
from skipstone.core.tokens import Tokens
from skipstone.nn.attention import Attention

SITES = ("block", "attention", "mlp")


class Block(GradientCheckpointingLayer):
    """Pre-norm attention and MLP. `sites` names, for each site, its mechanisms in `mechanisms`, outermost first."""

    def __init__(
        self,
        attention: Attention,
        mlp: nn.Module,
        input_norm: nn.Module,
        post_norm: nn.Module,
        mechanisms: Mapping[str, nn.Module],
        sites: Mapping[str, list[str]],
    ) -> None:
        super().__init__()
        self.self_attn, self.mlp = attention, mlp
        self.input_layernorm, self.post_attention_layernorm = input_norm, post_norm
        self.mechanisms = nn.ModuleDict(mechanisms)
        self.sites = {site: list(sites.get(site, [])) for site in SITES}
        self.num_adjustables = len(self.adjustables())

    def forward(self, x_BTD: Tensor, tokens: Tokens, past_key_values: Cache | None = None) -> tuple[Tensor, Records]:
        """The residual stream after this block, and what its mechanisms decided."""
        if not self.sites["block"]:
            # (x + a) + m, in the order of the pretrained models: x + (a + m) rounds differently in bf16
            _, after_BTD, m_BTD, records = self._sublayers(x_BTD, tokens, past_key_values)
            return after_BTD + m_BTD, self._complete(records, x_BTD)
        delta_BTD, records = self._inside("block", self._update, x_BTD, tokens, past_key_values)
        return x_BTD + delta_BTD, self._complete(records, x_BTD)

    def adjustables(self) -> dict[str, nn.Module]:
        """What decides in this block, by name: its mechanisms, an activation mechanism, an MLP of experts."""
        parts: list[Any] = [self.mlp, self.mlp.activation]
        return {**dict(self.mechanisms.items()), **{part.place.name: part for part in parts if hasattr(part, "place")}}

    def _complete(self, records: Records, x_BTD: Tensor) -> Records:
        """With those of mechanisms inside one that kept nobody: the names are the same in every call."""
        if len(records) == self.num_adjustables:
            return records
        missing = {name: m.unasked(x_BTD) for name, m in self.adjustables().items() if name not in records}  # type: ignore[operator]
        return {**records, **missing}

    def _inside(
        self, site: str, update: Callable[..., Any], x_BTD: Tensor, tokens: Tokens, past_key_values: Cache | None
    ) -> tuple[Tensor, Records]:
        """`update` inside the mechanisms of this site."""
        names = self.sites[site]
        if not names:
            return update(x_BTD, tokens, past_key_values)
        bound = partial(update, past_key_values=past_key_values)
        return wrap(bound, [self.mechanisms[name] for name in names])(x_BTD, tokens)

    def _update(self, x_BTD: Tensor, tokens: Tokens, past_key_values: Cache | None) -> tuple[Tensor, Records]:
        a_BTD, _, m_BTD, records = self._sublayers(x_BTD, tokens, past_key_values)
        return a_BTD + m_BTD, records

    def _sublayers(
        self, x_BTD: Tensor, tokens: Tokens, past_key_values: Cache | None
    ) -> tuple[Tensor, Tensor, Tensor, Records]:
        """The attention's update, the stream after it, the MLP's update."""
        a_BTD, records = self._inside("attention", self._attention, x_BTD, tokens, past_key_values)
        after_BTD = x_BTD + a_BTD
        m_BTD, more = self._inside("mlp", self._mlp, after_BTD, tokens, past_key_values)
        return a_BTD, after_BTD, m_BTD, {**records, **more}

    def _attention(self, x_BTD: Tensor, tokens: Tokens, past_key_values: Cache | None) -> tuple[Tensor, Records]:
        a = self.self_attn(self.input_layernorm(x_BTD), tokens, past_key_values)
        if tokens.wanted is not None:
            a = tokens.wanted.scatter(a)
        return _scaled(a, tokens), {}

    def _mlp(self, x_BTD: Tensor, tokens: Tokens, past_key_values: Cache | None) -> tuple[Tensor, Records]:
        cache = None if past_key_values is None else past_key_values.layers[self.self_attn.layer_idx]
        part = tokens.wanted
        if part is None:
            m, records = self.mlp(self.post_attention_layernorm(x_BTD), tokens, cache)
            return _scaled(m, tokens), records
        if part.width == 0:
            return x_BTD.new_zeros(x_BTD.shape), {}
        m, records = self.mlp(self.post_attention_layernorm(part.gather(x_BTD)), tokens.asked(), cache)
        return _scaled(part.scatter(m), tokens), lift(records, part, tokens.state)


def _scaled(y_BTD: Tensor, tokens: Tokens) -> Tensor:
    return y_BTD if tokens.gain_BT is None else y_BTD * tokens.gain_BT[..., None].to(y_BTD.dtype)
