"""Training of a draft head (`model/draft_head.py`) on frozen hidden states of a model.

Rows of text pass the model once, and the head learns from the hidden states that are kept. Its loss at each token:

    KL(model || head) over the shortlist + .1 smooth L1 of the hidden states

In the second half of the steps, the head reads each row twice, the second time with half of the states replaced by its
own guesses of them, because it reads its own guesses when it proposes several tokens.

Shape letters: N rows, B rows of a step, T tokens, D width, R shortlisted tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from time import monotonic

import torch
from torch import Tensor, nn
from torch.nn import functional

from skipstone.core.progress_bar import advance, work
from skipstone.model.build import Block, StoredLinear
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.draft_head import DraftHead, rows_of_head, told_of

ROWS = 8  # of a step
REUSE = 4  # steps that read a row
SHORTLIST = 8192  # tokens
RATE, MOST_RATE = 0.35, 5e-3  # the largest learning rate times the width, and a bound of it
LEAST_RATE, WARMUP = 0.05, 20  # the last rate as a share of the largest, and steps of increase
L1 = 0.1
JOINED = 0.02  # standard deviation of the initial weights that read the next token
HELD_OUT = 16  # of so many rows, one is not trained on
MOST_STEPS = 1_000_000  # millions of rows; more are typing mistakes
AHEAD = 3  # tokens that are guessed when the head is measured
UNIT = "steps"
LIKE_LLAMA = ("norm", "norm_placement", "mlp", "activation", "qk_norm", "positions", "parallel_residual")  # of a block


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedHead:
    """A trained draft head and the figures of its training.

    head: the head, a block that guesses the model's next tokens from its last hidden states. steps: number of optimizer
    steps. rows: number of rows that it was trained on. tokens: tokens per row. right: on held-out rows, the share of
    positions at which the head guesses the model's most probable token one, two and three tokens ahead; the tokens
    before the guessed one are those of the text.
    """

    head: DraftHead
    steps: int
    rows: int
    tokens: int
    right: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """The model's outputs on N rows of T tokens, from which a draft head learns to guess tokens.

    ids_NT: token ids, int64. hidden_NTD: the model's last hidden states, bf16. mass_V: fp32, for each of V tokens the
    probability that the model gives it, summed over all positions.
    """

    ids_NT: Tensor
    hidden_NTD: Tensor
    mass_V: Tensor


def train_draft_head(
    model: SkipstoneForCausalLM,
    ids_NT: Tensor,
    *,
    steps: int | None = None,
    minutes: float = 10.0,
    shortlist: int = SHORTLIST,
    seed: int = 0,
) -> TrainedHead:
    """Train a draft head, a block that guesses a model's next tokens, on rows of text; return it with its figures.

    The head reads the model's last hidden states. model: the model; its weights stay as they are. ids_NT: token ids,
    int64 [N, T]; the first rows are used, as many as the steps need. steps: optimizer steps, each on 8 rows; None means
    as many as fit into `minutes`, judged by the time of the first ones. minutes: minutes of training; used only without
    `steps`. shortlist: number of most probable tokens among which the head guesses. seed: seed of initial weights and
    order. The figures are those of `TrainedHead`, such as the share of guesses that are right on held-out rows. Raises
    ValueError for values out of range, fewer than two rows, and rows of fewer than five tokens.
    """
    _check(ids_NT, steps, minutes, shortlist)
    teacher = _Teacher(model.eval())
    if steps is None:
        steps = _affordable(teacher, ids_NT, minutes, shortlist)
    ids_NT = ids_NT[: rows_for(steps)]
    held_out = max(len(ids_NT) // HELD_OUT, 1)
    batches = math.ceil(len(ids_NT) / ROWS)
    with work(batches + steps, UNIT):
        features = teacher.features(ids_NT)
        learner = _Learner(teacher, features.mass_V.topk(min(shortlist, len(features.mass_V))).indices, seed)
        learner.train(features.ids_NT[held_out:], features.hidden_NTD[held_out:], steps)
    right = learner.right(features.ids_NT[:held_out], features.hidden_NTD[:held_out])
    head = learner.head.requires_grad_(False).eval()
    return TrainedHead(head=head, steps=steps, rows=len(ids_NT) - held_out, tokens=ids_NT.shape[1], right=right)


def rows_for(steps: int) -> int:
    """Return how many rows of text `steps` optimizer steps need, including those held out for measuring."""
    return max(math.ceil(steps * ROWS / REUSE * HELD_OUT / (HELD_OUT - 1)), 2)


def _check(ids_NT: Tensor, steps: int | None, minutes: float, shortlist: int) -> None:
    if ids_NT.dim() != 2 or len(ids_NT) < 2 or ids_NT.shape[1] < AHEAD + 2:
        raise ValueError(
            f"a draft head needs at least 2 rows of {AHEAD + 2} tokens, got {' rows of '.join(map(str, ids_NT.shape))}"
        )
    if steps is not None:
        check_steps(steps)
    if not 0 < minutes < math.inf:
        raise ValueError(f"minutes must be above 0, got {minutes:g}")
    if shortlist < 1:
        raise ValueError(f"shortlist must be at least 1, got {shortlist}")


def check_steps(steps: int) -> None:
    """Raise ValueError unless `steps` is a possible number of training steps, from 1 to a million."""
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"steps must be from 1 to {MOST_STEPS:,}, got {steps:,}")


def _affordable(teacher: _Teacher, ids_NT: Tensor, minutes: float, shortlist: int) -> int:
    """Return the number of training steps that take `minutes`, judged by the time of the first rows.

    teacher: the model. ids_NT: token ids of the text. shortlist: number of tokens among which the head guesses.
    """
    seconds, began = [], monotonic()
    features = teacher.features(ids_NT[:ROWS])
    seconds.append((monotonic() - began) / REUSE)
    trial = _Learner(teacher, features.mass_V.topk(min(shortlist, len(features.mass_V))).indices, seed=0)
    for steps in (1, 2):  # the first one is slower
        began = monotonic()
        trial.train(features.ids_NT, features.hidden_NTD, steps)
    seconds.append((monotonic() - began) / 2)
    return max(round(60 * minutes / sum(seconds)), 1)


class _Teacher:
    """The model whose tokens a draft head learns to guess."""

    def __init__(self, model: SkipstoneForCausalLM) -> None:
        self.model = model
        self.every = torch.arange(model.config.vocab_size, device=model.device)

    @torch.no_grad()
    def features(self, ids_NT: Tensor) -> Features:
        """Return the model's hidden states on rows of text, and each token's probability summed over all positions.

        ids_NT: token ids, int64.
        """
        states, mass_V = [], torch.zeros(len(self.every), device=self.model.device)
        for ids_BT in ids_NT.to(self.model.device).split(ROWS):
            hidden_BTD = self.model.model(ids_BT, use_cache=False, routing="causal", noise=False).last_hidden_state
            for hidden_TD in hidden_BTD:
                mass_V += self.model.lm_head(self.model.to_head(hidden_TD)).float().softmax(-1).sum(0)
            states.append(hidden_BTD.to(torch.bfloat16))
            advance(UNIT)
        return Features(ids_NT=ids_NT.to(self.model.device), hidden_NTD=torch.cat(states), mass_V=mass_V)

    @torch.no_grad()
    def embedded(self, ids_BT: Tensor) -> Tensor:
        return self.model.decoder.embed_tokens(ids_BT).float()  # type: ignore[no-any-return]


class _Learner:
    """A draft head in training, with its optimizer's data."""

    def __init__(self, teacher: _Teacher, shortlist_R: Tensor, seed: int) -> None:
        model = teacher.model
        self.teacher, self.generator = teacher, torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = new_head(model, len(shortlist_R)).to(model.device)
        self.head.shortlist_R.copy_(shortlist_R.sort().values)
        self.rows_RD = rows_of_head(model, self.head.shortlist_R) * model.config.logit_scale

    def train(self, ids_NT: Tensor, hidden_NTD: Tensor, steps: int) -> None:
        """Train the head for `steps` optimizer steps on rows in random order, all of them once before any twice.

        ids_NT: token ids. hidden_NTD: the model's last hidden states.
        """
        rate = [min((i + 1) / WARMUP, 1) * (1 - (1 - LEAST_RATE) * i / steps) for i in range(steps)]
        largest = min(RATE / hidden_NTD.shape[-1], MOST_RATE)
        optimizer = torch.optim.AdamW(self.head.parameters(), lr=largest, betas=(0.9, 0.95), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: rate[min(i, steps - 1)])
        order: list[int] = []
        for step in range(steps):
            if len(order) < ROWS:
                order += torch.randperm(len(ids_NT), generator=self.generator).tolist()
            at, order = order[:ROWS], order[ROWS:]
            with torch.enable_grad():
                loss = self._loss(ids_NT[at], hidden_NTD[at].float(), twice=2 * step >= steps)
                loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            advance(UNIT, note=f"loss {float(loss.detach()):.3f}")

    def _loss(self, ids_BT: Tensor, hidden_BTD: Tensor, twice: bool) -> Tensor:
        embedding_BTD, wanted_BTD = self.teacher.embedded(ids_BT[:, 1:]), hidden_BTD[:, 1:]
        odds_BTR = functional.linear(wanted_BTD, self.rows_RD).log_softmax(-1)
        guess_BTD = self.head(hidden_BTD[:, :-1], embedding_BTD)
        loss = self._apart(guess_BTD, wanted_BTD, odds_BTR)
        if not twice:
            return loss
        own_BTD = torch.cat((hidden_BTD[:, :1], guess_BTD[:, :-1].detach()), 1)
        replaced_BT1 = torch.rand(own_BTD.shape[:2], generator=self.generator)[..., None] < 0.5
        mixed_BTD = torch.where(replaced_BT1.to(own_BTD.device), own_BTD, hidden_BTD[:, :-1])
        return (loss + self._apart(self.head(mixed_BTD, embedding_BTD), wanted_BTD, odds_BTR)) / 2

    def _apart(self, guess_BTD: Tensor, wanted_BTD: Tensor, odds_BTR: Tensor) -> Tensor:
        own_BTR = functional.linear(guess_BTD, self.rows_RD).log_softmax(-1)
        divergence = (odds_BTR.exp() * (odds_BTR - own_BTR)).sum(-1).mean()
        return divergence + L1 * functional.smooth_l1_loss(guess_BTD, wanted_BTD)

    @torch.no_grad()
    def right(self, ids_NT: Tensor, hidden_NTD: Tensor) -> tuple[float, ...]:
        """Return the share of positions at which the head guesses the model's most probable token, for each distance.

        The first share is for one token ahead, the next for two, and so on. ids_NT: token ids of held-out rows.
        hidden_NTD: the model's last hidden states.
        """
        found = torch.zeros(AHEAD)
        total = 0
        for ids_T, hidden_TD in zip(ids_NT, hidden_NTD.float(), strict=True):
            best_T = self.teacher.model.lm_head(hidden_TD.to(self.teacher.model.dtype)).argmax(-1)
            guess_1TD, count = hidden_TD[None], len(ids_T) - AHEAD
            for ahead in range(AHEAD):
                guess_1TD = self.head(guess_1TD[:, :-1], self.teacher.embedded(ids_T[None, ahead + 1 :]))
                token_T = self.head.shortlist_R[functional.linear(guess_1TD[0], self.rows_RD).argmax(-1)]
                found[ahead] += float((token_T == best_T[ahead + 1 :])[:count].sum())
            total += count
        return tuple((found / total).tolist())


def new_head(model: SkipstoneForCausalLM, shortlist: int) -> DraftHead:
    """Return an untrained draft head, a block that guesses the token after next from a hidden state and the next token.

    The hidden state is the last one of `model`. The block starts with the weights of the model's last block, if a head
    supports all parts of that block, and reads almost only the hidden state: the weights of the next token's embedding
    are small. shortlist: number of tokens among which it guesses.
    """
    head = DraftHead(model.config, shortlist)
    with torch.no_grad():
        nn.init.normal_(head.join.weight, 0.0, JOINED)
        head.join.weight[:, : model.config.hidden_size] += torch.eye(model.config.hidden_size)
        head.told.copy_(told_of(model))
        norm = getattr(model.decoder.norm, "weight", None)
        if norm is not None and model.config.norm == head.stack.config.norm:
            head.stack.norm.load_state_dict({"weight": norm})
    if all(getattr(model.config, field) == getattr(head.stack.config, field) for field in LIKE_LLAMA):
        own = head.stack.layers[0].state_dict()
        for name, weight in _floats(model.decoder.layers[len(model.decoder.layers) - 1]).items():
            if name in own and own[name].shape == weight.shape:
                own[name].copy_(weight)
    return head


def _floats(block: Block) -> dict[str, Tensor]:
    """Return the weights of a block by name, quantised ones restored."""
    found = {name: x.detach().float() for name, x in block.named_parameters() if x.is_floating_point()}
    for name, module in block.named_modules():
        if isinstance(module, StoredLinear):
            found[f"{name}.weight"] = module.restored().float()
    return found
