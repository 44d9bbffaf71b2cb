"""A draft head: one block that guesses a model's next hidden state from the last one and the next token.

After EAGLE (Li et al., arXiv 2401.15077), with both inputs normalised as in DeepSeek-V3's multi-token prediction (arXiv
2412.19437, equation 21), and with a head of frequent tokens alone as in FR-Spec (arXiv 2502.14856):

    y_t = block(join [norm(h_t); norm(e(x_t+1))])       h: normalised hidden states of the model, e: its embedding
    guess of h_t+1 = norm(y_t)                          guess of x_t+2 = the shortlisted token of the largest logit

Shape letters: B rows, T tokens, D width, R shortlisted tokens.
"""

from __future__ import annotations

import copy
import time
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from skipstone.model.build import Float16Linear, Format, Int8Linear, StoredLinear, build_norm
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig
from skipstone.model.decoder import SkipstoneModel
from skipstone.ops import int8

TOLD = 16  # tokens whose embeddings tell one model from another
ALIKE = 0.99  # cosine of them: copies of a model in bf16 and int8 are above it, other models are not


class DraftHead(nn.Module):
    """A draft head: a small network that guesses a model's hidden state one token ahead (EAGLE, arXiv 2401.15077).

    It projects two inputs, a hidden state and the embedding of the token after it, to the model's width, and runs one
    Llama block on the result. config: the model's configuration. shortlist: R, the number of tokens that can be
    guessed. shortlist_R: int64, their ids, ascending. told: fp32 [17, D], a fingerprint of the model (16 embeddings and
    the final norm's weight), by which a head of another model is recognised.
    """

    shortlist_R: Tensor
    told: Tensor

    def __init__(self, config: SkipstoneConfig, shortlist: int) -> None:
        super().__init__()
        own, D = _config(config), config.hidden_size
        self.hidden_norm, self.embedding_norm = build_norm(own), build_norm(own)
        self.join: nn.Linear | StoredLinear = nn.Linear(2 * D, D, bias=False)
        self.stack = SkipstoneModel(own)
        del self.stack.embed_tokens  # the model's is used
        self.register_buffer("shortlist_R", torch.zeros(shortlist, dtype=torch.long))
        self.register_buffer("told", torch.zeros(TOLD + 1, D))

    def forward(
        self, hidden_BTD: Tensor, embedding_BTD: Tensor, cache: Cache | None = None, mask_BT: Tensor | None = None
    ) -> Tensor:
        """Return guesses of the model's hidden states one token later, normalised, [B, T, D].

        hidden_BTD: the model's hidden states at T tokens after its final norm, or earlier guesses of them.
        embedding_BTD: the model's embeddings of the tokens that follow these. cache: the head's own cache, or None.
        mask_BT: 0 for padding, as in the model's attention_mask; None means no padding.
        """
        out = self.stack(
            inputs_embeds=self.join(torch.cat((self.hidden_norm(hidden_BTD), self.embedding_norm(embedding_BTD)), -1)),
            attention_mask=mask_BT,
            past_key_values=cache,
            use_cache=cache is not None,
            routing="causal",
            noise=False,
        )
        return out.last_hidden_state  # type: ignore[no-any-return]

    def new_cache(self) -> Cache:
        """Return an empty cache for the keys and values of the head's block."""
        return DynamicCache(config=self.stack.config)

    def require(self, model: SkipstoneForCausalLM, name: str = "the draft head") -> None:
        """Raise ValueError unless this head was trained for the model.

        The message is one line that begins with `name`. Copies of the model in another precision count as the same
        model.
        """
        D = model.config.hidden_size
        if self.told.shape[1] != D:
            raise ValueError(f"{name} belongs to another model: its width is {self.told.shape[1]}, the model's {D}")
        if int(self.shortlist_R[-1]) >= model.config.vocab_size:
            raise ValueError(
                f"{name} belongs to another model: it guesses token {int(self.shortlist_R[-1])}, the model has "
                f"{model.config.vocab_size} tokens"
            )
        told_KD, own_KD = self.told.to(model.device), told_of(model)
        found_K = nn.functional.cosine_similarity(told_KD, own_KD, dim=-1)
        equal_K = (told_KD == own_KD).all(-1)  # an embedding of zeros, as padding has, is like nothing
        if not bool(((found_K > ALIKE) | equal_K).all()):
            raise ValueError(f"{name} belongs to another model: their embeddings differ; train a head of this one")


def told_of(model: SkipstoneForCausalLM) -> Tensor:
    """Return a fingerprint of a model that survives a change of precision, fp32 [17, D].

    It consists of the embeddings of 16 tokens spread evenly over the vocabulary and the weight of the final norm. A
    draft head keeps it, to recognise the model that it was trained for.
    """
    ids = torch.linspace(0, model.config.vocab_size - 1, TOLD, device=model.device).long()
    with torch.no_grad():
        norm = getattr(model.decoder.norm, "weight", None)
        last = torch.ones_like(model.decoder.embed_tokens(ids[:1])) if norm is None else norm[None]
        return torch.cat((model.decoder.embed_tokens(ids), last.detach())).float()


def rows_of_head(model: SkipstoneForCausalLM, ids_R: Tensor) -> Tensor:
    """Return the rows of the model's output head for the token ids ids_R, fp32 [R, D], without gradients."""
    head = model.lm_head
    if isinstance(head, Int8Linear):
        return int8.restore(head.weight[ids_R], head.weight_scale.detach()[ids_R])
    if isinstance(head, Float16Linear):
        return head.values[ids_R].float()
    return head.weight.detach()[ids_R].float()


class ReadyHead:
    """A copy of a draft head prepared for fast guessing on a model's device, with some rows of the model's output head.

    These are the rows of the tokens that can be guessed. On a CPU with numba all matrices of the copy are rounded to
    int8, even if the model's are not, because a guess need not be exact. head: the draft head. model: its model. size:
    number of weights of the copy. seconds: how long one guess took when the copy was made.
    """

    def __init__(self, head: DraftHead, model: SkipstoneForCausalLM) -> None:
        shortlist = nn.Linear(model.config.hidden_size, len(head.shortlist_R), bias=False)
        shortlist.weight.data = rows_of_head(model, head.shortlist_R.to(model.device))
        own = copy.deepcopy(head)
        parts = nn.ModuleDict({"head": own, "shortlist": shortlist})
        parts.to(model.device)
        if model.device.type == "cpu" and find_spec("numba") is not None:
            _round(parts)
        parts.requires_grad_(False).eval().to(model.dtype)
        self.head, self.shortlist = own, parts["shortlist"]  # which is an int8 layer by now
        self.size = sum(x.numel() for x in parts.parameters())
        self._warm(model)

    def __call__(self, hidden_BTD: Tensor, embedding_BTD: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor:
        """Return guesses of the model's hidden states one token later, normalised, [B, T, D].

        hidden_BTD: the model's hidden states after its final norm, or earlier guesses of them. embedding_BTD: the
        model's embeddings of the tokens that follow these. cache: the head's own cache, or None. mask: [B, T], 0 for
        padding; None means no padding.
        """
        return self.head(hidden_BTD, embedding_BTD, cache, mask)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _warm(self, model: SkipstoneForCausalLM) -> None:
        """Make three guesses, so that compilation is over, and store how long the last one took."""
        cache, token_11 = self.head.new_cache(), self.head.shortlist_R[:1, None]
        hidden_11D = model.decoder.embed_tokens(token_11)
        for _ in range(3):
            began = time.perf_counter()
            hidden_11D = self(hidden_11D, model.decoder.embed_tokens(token_11), cache, None)
            token_11 = self.token(hidden_11D)
            self.seconds = time.perf_counter() - began

    def token(self, hidden_B1D: Tensor) -> Tensor:
        """Return for each row the shortlisted token with the largest logit, int64 [B, 1].

        hidden_B1D: a guessed hidden state for each of B rows.
        """
        return self.head.shortlist_R[self.shortlist(hidden_B1D).argmax(-1)]


def _round(parts: nn.Module) -> None:
    """Replace all matrices by int8 ones of the same values."""
    whole = {name: module.weight for name, module in parts.named_modules() if isinstance(module, nn.Linear)}
    Format(name="int8", group=int8.GROUP).replace(parts)
    for name, weight in whole.items():
        layer = parts.get_submodule(name)
        assert isinstance(layer, Int8Linear)
        number, scale = int8.quantise(weight, layer.group)
        layer.weight.data, layer.weight_scale.data = number, scale


def _config(config: SkipstoneConfig) -> SkipstoneConfig:
    """Return the configuration of a one-block Llama decoder with the width, heads and context length of `config`."""
    return SkipstoneConfig(
        vocab_size=1,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        norm_eps=config.norm_eps,
    )
