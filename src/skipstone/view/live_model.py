"""`LiveModel`: a loaded model, and one event for each pass over the prompt or over a token, as plain values for JSON.

Shape letters: B rows (one), T tokens of a pass, V vocabulary, F neurons, A activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from skipstone.budget import BudgetTable
from skipstone.budget.handles import find_handles
from skipstone.core.records import ActivationRecord, Records, of_kind
from skipstone.core.strict import PlainDict
from skipstone.generate.detokenizer import Detokenizer
from skipstone.generate.engine import Decoder, DecodingPass, drafting_of, setting_of
from skipstone.generate.sampler import Sampler
from skipstone.generate.text_generation import encode, ends
from skipstone.measure.compute import compute_shares
from skipstone.measure.depth_map import read_decisions
from skipstone.measure.model_view import mechanisms_in_words
from skipstone.measure.summaries import ACTIVATION_NAMES
from skipstone.mechanisms.mix_figures import MixFigures
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig
from skipstone.model.cost import cost, forward_flops, kept_from_records
from skipstone.model.fields import TYPES
from skipstone.runs import Run
from skipstone.view.attention_of_token import attention_of_last

TWIN_PARAMETERS = 300_000_000  # a dense twin of a larger model is not built: it would double the memory
NEURONS = 256  # of a layer in the map of neurons; of more, every k-th is shown
PROPOSED = 3  # tokens at a time by a draft: always, because one who asks for drafts wants to see them
DIGITS = 5  # significant, of numbers that go to the page


class LiveModel:
    """A loaded model whose decisions can be shown while it generates.

    folder: a run folder or a saved model. name: its name on the page. Raises ValueError or FileNotFoundError, with a
    message of one line, for a folder without a model or a tokenizer.
    """

    def __init__(self, folder: Path, name: str) -> None:
        opened = Run(folder)
        self.name, self.model, tokenizer = name, opened.load_model(), opened.load_tokenizer()
        if tokenizer is None:
            raise ValueError(f"{folder} has no tokenizer: a synthetic task has no text to type")
        self.tokenizer = tokenizer
        self.table = BudgetTable.load(place) if BudgetTable.find(place := opened.model_folder()) else None
        self.trained_share = 1.0 if self.table is None else self.table.current_share(self.model)
        self.blocks = list(self.model.decoder.layers)
        self.context: int = self.model.config.max_position_embeddings
        self._twin: DenseTwin | None = None
        warm(self.model)

    def describe(self) -> PlainDict:
        """Return the description of the model that the page shows before a prompt is entered, as plain values for JSON.

        Keys: name, mechanisms (in words), parameters, context (tokens), layers. slots: a pair [block, mechanism] for
        each decision that a `pass` event of `events` lists for a token, in the same order; mechanism is None for a
        block without mechanisms. budgets: [least, largest] share of the dense FLOPs to which the model can be set, by
        the table of thresholds that `skipstone calibrate` writes; None without this table. trained_budget: share of the
        dense FLOPs that the model uses as it was trained; None without the table. has_thresholds: whether `skipstone
        calibrate` could write a table. neurons: whether the model mixes activation functions, so that `neurons` has
        something to return. twin: whether a dense model of the same shape is timed. dense_flops: forward FLOPs of one
        token without mechanisms.
        """
        sites: list[list[str | None]] = [[n for site in block.sites.values() for n in site] for block in self.blocks]
        return {
            "name": self.name,
            "mechanisms": mechanisms_in_words(self.model),
            "parameters": self.model.num_parameters(),
            "context": self.context,
            "layers": len(self.blocks),
            "slots": [[layer, name] for layer, names in enumerate(sites) for name in names or [None]],
            "budgets": None if self.table is None else list(self.table.range),
            "trained_budget": None if self.table is None else rounded(self.trained_share),
            "has_thresholds": bool(find_handles(self.model)),
            "neurons": bool(self._mixes()),
            "twin": self.has_twin,
            "dense_flops": forward_flops(self.model, 1, mechanisms=False).total,
        }

    @property
    def has_twin(self) -> bool:
        """Whether a dense model of the same shape is timed for comparison.

        To save memory, that is done for models of at most 300 million parameters only.
        """
        return self.model.num_parameters() <= TWIN_PARAMETERS

    def twin(self) -> DenseTwin:
        """Return the dense model of the same shape that is timed beside this one; it is built on the first call."""
        if self._twin is None:
            self._twin = DenseTwin(self.model)
        return self._twin

    def neurons(self) -> PlainDict:
        """Return the learned preferences of MLP neurons for activation functions, as plain values for JSON.

        Keys: names: the functions' names. layers: for each block that mixes activations {"layer": its index, "every":
        step between shown neurons, of which there are at most 256, "preference": logits of each shown neuron, by
        function}. The function that a neuron prefers for a token has the largest sum of preference and the token's own
        logits (`mix` in the `pass` events of `events`).
        """
        layers = []
        for layer, mix in self._mixes().items():
            preference_FA = mix.preference_FA.detach().float().cpu()
            every = -(-len(preference_FA) // NEURONS)
            rows = [[rounded(value) for value in row] for row in preference_FA[::every].tolist()]
            layers.append({"layer": layer, "every": every, "preference": rows})
        return {"names": list(ACTIVATION_NAMES), "layers": layers}

    def _mixes(self) -> dict[int, MixFigures]:
        """Return the activation mechanisms that mix several functions (as PolyGLU does), by index of the block."""
        modules = [(i, module) for i, block in enumerate(self.blocks) for module in block.routing_modules().values()]
        return {i: module for i, module in modules if isinstance(module, MixFigures)}

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt. Raises ValueError if it is empty or not valid Unicode."""
        return encode(self.tokenizer, prompt)

    def attention(self, ids: Sequence[int], budget: float | None) -> list[list[float | None] | None]:
        """Return for each block the attention weights of the last of `ids` to all of them, averaged over heads.

        An entry is None for a block whose attention the last token skips. Weights have 5 significant digits; a single
        weight is None only if it is not finite. ids: token ids of one text. budget: share of the dense FLOPs that the
        model is set to during the pass; None means the model as it was trained. Raises ValueError for ids outside the
        vocabulary, for none or more than the context holds, and for a budget that the model cannot meet.
        """
        if not ids or len(ids) > self.context or not all(0 <= i < self.model.config.vocab_size for i in ids):
            raise ValueError(f"tokens must be from 1 to {self.context:,} ids of the vocabulary, got {len(ids):,}")
        with setting_of(self.model, budget, None if budget is None else self.table)():
            found = attention_of_last(self.model, ids)
        return [None if row is None else [rounded(weight) for weight in row] for row in found]

    def events(
        self,
        ids: Sequence[int],
        *,
        new_tokens: int,
        temperature: float,
        seed: int,
        budget: float | None,
        draft: str | None = None,
    ) -> Iterator[PlainDict]:
        """Continue a prompt and yield, as plain values for JSON, a `start` event and a `pass` event for each new token.

        ids: token ids of the prompt. new_tokens: how many to generate at most. temperature: 0 chooses the most probable
        token; otherwise tokens are sampled. seed: seed of the sampling. budget: share of the dense FLOPs that the model
        is set to; None means the model as it was trained. draft: the source of guesses for speculative decoding, such
        as "lookup", "exit" or "skip"; None means no speculation. Raises ValueError, before the first event, for a
        prompt that exceeds the context, and for a budget or a draft that the model does not support.

        The start event has `prompt`, a list of its tokens (dicts of id; text, what the token adds to the text; label,
        the token decoded alone). A pass event has: `read`, a dict for each token that was read, which are all tokens of
        the prompt in the first pass and one in later ones (compute: the share of the blocks' computation done for it;
        entropy and loss of its prediction, in nats; lists score, weight and kept with one value for each decision, in
        the order of `slots` of `describe`; and, in models that mix activation functions, mix: the token's own logits
        for these, by block; a number is None if it is not known or not finite); `first`, the index of the first token
        read; `token`, the new one; `seconds`; `flops` and `dense_flops`, the sums so far of the model and of a dense
        one of the same shape. With a draft, a pass checks several tokens: `guesses` is how many, `guessed` whether the
        new token was one of them, and `rejected` lists the guesses dropped because of it. The FLOPs of such a pass are
        added at its first token; the draft's own computation counts in the seconds, but not in the FLOPs.
        """
        input_ids = torch.tensor([list(ids)], device=self.model.device)
        table = None if budget is None else self.table
        decode = Decoder(self.model, input_ids, None, new_tokens, None, ends(self.model, self.tokenizer), "dynamic")
        decode.drafting = drafting_of(decode, draft, None if draft is None else PROPOSED, budget, table)
        setting = setting_of(self.model, budget, table, draft)
        passes = decode(Sampler(temperature, None, seed, input_ids.device), setting, 0)
        return self._events(list(ids), passes)

    def _events(self, ids: list[int], passes: Iterator[DecodingPass]) -> Iterator[PlainDict]:
        text, label = Detokenizer(self.tokenizer, ids), self.tokenizer.decode
        reading = Detokenizer(self.tokenizer)
        yield {"type": "start", "prompt": [{"id": i, "text": reading.push(i), "label": label([i])} for i in ids]}
        known, flops, dense, seen = list(ids), 0.0, 0.0, None
        while True:
            began = perf_counter()
            try:
                each = next(passes)
            except StopIteration:
                return
            token = int(each.token_B[0])  # waits for an accelerator, which belongs to the time
            seconds = perf_counter() - began
            prompt, new = seen is None, each.records is not seen
            size = len(ids) if prompt else each.logits_BTV.shape[1]
            first = 0 if prompt else len(known) - 1
            seen = each.records
            spent = self._spent(each, size, first) if new else 0.0
            flops, dense = flops + spent, dense + self._dense(len(ids) if prompt else 1, first)
            shown = range(size) if prompt else range(size + each.at, size + each.at + 1)
            known.append(token)
            yield {
                "type": "pass",
                "first": first,
                "read": self._read(each, size, shown, known[first + 1 :]),
                "token": {"id": token, "text": text.push(token), "label": label([token])},
                "guesses": size - 1 if new and not prompt else 0,
                "guessed": each.guessed_B is not None and bool(each.guessed_B[0]),
                "rejected": [{"id": i, "label": label([i])} for i in _rejected(each)],
                "seconds": rounded(seconds),
                "flops": flops,
                "dense_flops": dense,
            }

    def _spent(self, each: DecodingPass, tokens: int, past: int) -> float:
        """Return the executed forward FLOPs of a pass by the cost model.

        each: the pass. tokens: number of tokens that it reads. past: number of tokens before them. The head counts for
        the tokens from which a prediction is made.
        """
        kept = kept_from_records(self.model, each.records)
        # A layer that has kept no token so far has no slots; after a draft, the cache holds the guesses as well.
        slots = [layer.kv.entries.get("slot") for layer in each.cache.layers]  # type: ignore[attr-defined]
        stored = {i: 0 if slot is None else int((slot[0] < past).sum()) for i, slot in enumerate(slots)}
        predicted = 1 if past == 0 else tokens
        found = cost(self.model, tokens=tokens, past=past, kept=kept, stored=stored, logits_to_keep=predicted)
        return found.forward.total

    def _dense(self, tokens: int, past: int) -> float:
        """Return the forward FLOPs of a pass of the dense twin by the cost model.

        tokens: number of tokens that the pass reads: the prompt, or one. past: number of tokens before them.
        """
        found = cost(self.model, tokens=tokens, past=past, logits_to_keep=1).dense
        assert found is not None
        return found.forward.total

    def _read(self, each: DecodingPass, size: int, shown: range, targets: Sequence[int]) -> list[PlainDict]:
        """Return the decisions of a pass for some of its tokens, and the prediction made at each of them.

        each: the pass. size: number of tokens that it read. shown: their indices within the pass. targets: the tokens
        that came after the shown ones. Keys for each token: compute (share of the blocks' computation executed for it),
        entropy and loss of the prediction in nats, score, weight and kept by decision, and in models that mix
        activations `mix`, the token's logits for them by block.
        """
        decided = read_decisions(self.blocks, each.records, (1, size))
        compute = compute_shares(self.blocks, each.records).expand(1, size)[0].tolist()
        kept_logits = each.logits_BTV.shape[1]  # a pass over a prompt may have those of its last token alone
        rows = [t for t in shown if t >= size - kept_logits]
        chosen_TV = each.logits_BTV[0, [t - size + kept_logits for t in rows]]
        predicted = dict(zip(rows, _prediction(chosen_TV, targets[len(targets) - len(rows) :]), strict=True))
        logits = _activation_logits(self._mixes(), each.records, size)
        return [
            {
                "compute": rounded(compute[t]),
                "entropy": predicted[t][0] if t in predicted else None,
                "loss": predicted[t][1] if t in predicted else None,
                "score": [rounded(float(d.score_BT[0, t])) for d in decided],
                "weight": [rounded(float(d.weight_BT[0, t])) for d in decided],
                "kept": [bool(d.kept_BT[0, t]) for d in decided],
                **({"mix": logits[t]} if logits else {}),
            }
            for t in shown
        ]


class DenseTwin:
    """A dense model of the same shape with random weights, whose time per pass is compared with a model's.

    model: the model whose shape, device and dtype are copied; its mechanisms are left out, but experts in place of MLPs
    are not.
    """

    def __init__(self, model: SkipstoneForCausalLM) -> None:
        written = model.config.to_dict()
        values = {name: written[name] for name in TYPES if written.get(name) is not None}
        values |= {"mechanisms": [], "neuron_groups": None}
        if model.config.activation_entry.options is not None:
            values["activation"] = "silu"
        config = SkipstoneConfig.from_plain(values)
        self.model = SkipstoneForCausalLM(config).to(device=model.device, dtype=model.dtype).eval()
        warm(self.model)

    def seconds(self, ids: Sequence[int], new_tokens: int) -> Iterator[float]:
        """Yield the seconds of each pass of greedy decoding: first over the prompt, then for each further token.

        ids: token ids of the prompt. new_tokens: number of passes.
        """
        passes = _greedy(self.model, ids, new_tokens)
        while True:
            began = perf_counter()
            try:
                int(next(passes).token_B[0])
            except StopIteration:
                return
            yield perf_counter() - began


def warm(model: SkipstoneForCausalLM) -> None:
    """Decode two tokens, so that compilation on first use is not included in any later measurement of time.

    A model that cannot generate is left alone; its error appears when it is asked to generate.
    """
    with suppress(ValueError):
        for _ in _greedy(model, [0], 2):
            pass


def _greedy(model: SkipstoneForCausalLM, ids: Sequence[int], new_tokens: int) -> Iterator[DecodingPass]:
    """Yield the passes of a model that continues a prompt with its likeliest tokens, the end of a text included.

    ids: token ids of the prompt. new_tokens: number of passes.
    """
    input_ids = torch.tensor([list(ids)], device=model.device)
    decode = Decoder(model, input_ids, None, new_tokens, None, [], "dynamic")
    yield from decode(Sampler(0.0, None, 0, input_ids.device), setting_of(model, None, None))


def rounded(value: float) -> float | None:
    """Return `value` rounded to 5 significant digits; None for infinities and NaN, which JSON cannot represent."""
    return float(f"{value:.{DIGITS}g}") if abs(value) < float("inf") else None


def _rejected(each: DecodingPass) -> list[int]:
    """Return the ids of a draft's guesses that the chosen token rules out: the one in its place and all after it."""
    if each.guess_BK is None or each.guessed_B is None or bool(each.guessed_B[0]):
        return []
    count = each.guess_BK.shape[1]
    return [int(guess) for guess in each.guess_BK[0, each.at + count + 1 :]]


def _prediction(logits_TV: Tensor, target: Sequence[int]) -> list[tuple[float | None, float | None]]:
    """Return for each of T predictions its entropy, and its loss on the token that followed, in nats.

    logits_TV: the logits. target: the ids of the tokens that followed.
    """
    log_TV = logits_TV.float().log_softmax(-1)
    entropy_T = -(log_TV.exp() * log_TV).nan_to_num().sum(-1)
    loss_T = -log_TV.gather(-1, torch.tensor(target, device=log_TV.device)[:, None])[:, 0]
    return [(rounded(one), rounded(other)) for one, other in zip(entropy_T.tolist(), loss_T.tolist(), strict=True)]


def _activation_logits(mixes: Iterable[int], records: Sequence[Records], T: int) -> list[list[list[float | None]]]:
    """Return each token's own logits for the activations, for each block that mixes them: [token][block][activation].

    mixes: indices of these blocks. records: decisions of the pass, a dict by mechanism name for each block. T: number
    of tokens. Logits are None where the MLP did not compute the token.
    """
    unknown = torch.full((1, 1, len(ACTIVATION_NAMES)), float("nan"))
    found = []
    for layer in mixes:
        record = next(iter(of_kind(records[layer], ActivationRecord).values()), None)
        logits_BTA = unknown if record is None else record.logits_BTA.float()
        found.append(logits_BTA.expand(1, T, -1)[0].tolist())
    return [[[rounded(x) for x in layer[t]] for layer in found] for t in range(T)] if found else []
