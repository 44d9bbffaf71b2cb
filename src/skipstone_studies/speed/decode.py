"""A study of decoding steps of a Mixture-of-Depths model compared with the dense model's, by number of rows.

All weights are random and all text is random tokens; both models of a comparison continue the same prompts with the
same tokens, one per row and step. Thresholds are calibrated on such text. Other studies time models by `Decoding`, too.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.core.strict import PlainDict, PlainMapping
from skipstone.measure.speed import Lap, finish
from skipstone_studies.speed.interleaved import ratio, seconds
from skipstone_studies.study import Column, Figures, RecipeDict, Study

RANDOM_TEXT = (
    "**Random weights on random tokens**, with thresholds set to skip the wanted share of tokens: these are times of "
    "executed work. In a trained model, skipped tokens are distributed less evenly."
)
ROWS = (1, 2, 4, 8, 16, 32, 64)
SIZE = {"width": 1024, "blocks": 10, "vocabulary": 1024, "prompt": 48, "steps": 24, "turns": 7}
ROUTED = {"name": "mixture_of_depths", "layers": "1::2", "capacity": 0.125, "decision": "ema_threshold"}
CALIBRATION = 32  # least number of rows for calibrating a threshold
Size = PlainMapping  # width, blocks, vocabulary; prompt, steps and turns of decoding


def model_of(size: Size, mechanisms: Sequence[PlainDict]) -> SkipstoneForCausalLM:
    """Build a model with weights drawn with a fixed seed, and heads of 64 channels.

    size: a mapping with the keys "width", "blocks" and "vocabulary". mechanisms: entries of the configuration's
    `mechanisms`; [] means a dense model.
    """
    torch.manual_seed(0)
    config = SkipstoneConfig(
        vocab_size=size["vocabulary"],
        hidden_size=size["width"],
        num_hidden_layers=size["blocks"],
        num_attention_heads=max(1, size["width"] // 64),
        mechanisms=list(mechanisms),
    )
    return SkipstoneForCausalLM(config).eval()


def text(size: Size, rows: int, length: int, seed: int) -> Tensor:
    """Return random token ids, int64 [rows, length], below `size["vocabulary"]`. seed: seed of the draws."""
    return torch.randint(0, size["vocabulary"], (rows, length), generator=torch.Generator().manual_seed(seed))


def routers(model: SkipstoneForCausalLM) -> Iterator[tuple[int, str, Any]]:
    """Yield (index of its block, name, mechanism) of every mechanism by which tokens can skip blocks of `model`.

    Such a mechanism is Mixture-of-Depths, for example.
    """
    blocks = model.model.layers
    for i, block in enumerate(blocks):
        for name, mechanism in block.mechanisms.items():
            yield i, name, mechanism


@torch.inference_mode()
def calibrate(model: SkipstoneForCausalLM, ids: Tensor, first: int = 0) -> None:
    """Set the threshold of every router of `model` so that it keeps its share (`capacity`) of the tokens `ids`.

    Kept tokens are those that the router's block computes. The threshold becomes the (1 - capacity) quantile of the
    router's scores of `ids`, block after block, because a block's scores depend on the blocks before it. ids: token ids
    of random text, int64 [rows, tokens]. first: index of the token in each row from which scores count.
    """
    for i, name, mechanism in routers(model):
        record = model(ids, use_cache=False, output_records=True).records[i][name]
        scores = record.score_BT[:, first:].flatten()
        mechanism.decision.threshold.copy_(scores.quantile(1 - mechanism.capacity))
        mechanism.decision.steps.fill_(1)


class Decoding:
    """A model that is timed decoding random tokens after a prompt in its cache.

    model: the model; the constructor sets its routing thresholds on random text, so that each router keeps its share
    (`capacity`) of the tokens. size: a mapping with "vocabulary", "prompt" (tokens of a prompt), "steps" (decoding
    steps of one timing) and "turns" (number of timings). rows: number of sequences decoded together.
    """

    def __init__(self, model: SkipstoneForCausalLM, size: Size, rows: int) -> None:
        self.model, self.size, self.rows, self.steps = model, size, rows, size["steps"]
        self.cache, self.turns = DynamicCache(config=model.config), itertools.count()
        self.prompts = text(size, rows, size["prompt"], seed=2).to(model.device)
        prompts = self.prompts.repeat(-(-CALIBRATION // rows), 1)
        continued = text(size, len(prompts), self.steps, seed=1).to(model.device)
        calibrate(model, torch.cat([prompts, continued], dim=1), size["prompt"])
        with torch.inference_mode():
            model(self.prompts, past_key_values=self.cache)

    @torch.inference_mode()
    def lap(self) -> Lap:
        """Run and time `steps` decoding steps of random tokens, then restore the cache.

        The result has `tokens`, the number of tokens decoded in all rows, and `seconds` of wall time.
        """
        fed = self._fed(next(self.turns))
        finish(self.model.device)
        start = time.perf_counter()
        for token in fed:
            self.model(token, past_key_values=self.cache).logits[:, -1].argmax(-1)
        finish(self.model.device)
        spent = time.perf_counter() - start
        self.cache.crop(-self.steps)
        return Lap(tokens=self.rows * self.steps, seconds=spent, joules=None)

    def _fed(self, turn: int) -> Sequence[Tensor]:
        """Return the random tokens that a turn decodes, a tensor int64 [rows, 1] for each step.

        turn: the number of the turn, which seeds the draw.
        """
        return text(self.size, self.rows, self.steps, seed=100 + turn).to(self.model.device).split(1, dim=1)

    @torch.inference_mode()
    def computed(self) -> float:
        """Return how many rows a routed block computes in a decoding step, as a mean over routed blocks and steps."""
        kept = []
        for turn in range(self.size["turns"] + 1):
            for token in self._fed(turn):
                out = self.model(token, past_key_values=self.cache, output_records=True)
                kept += [out.records[i][name].kept_BT.sum().item() for i, name, _ in routers(self.model)]
            self.cache.crop(-self.steps)
        return statistics.fmean(kept)

    @torch.inference_mode()
    def memory(self) -> dict[str, int]:
        """Return the size of a new cache that holds the prompts and the tokens of one timing.

        Keys: `entries` (stored tokens, summed over rows and blocks), `bytes` (of their keys, values and int64 indices)
        and `allocated` (bytes that the cache has reserved).
        """
        cache = DynamicCache(config=self.model.config)
        self.model(self.prompts, past_key_values=cache)
        for token in self._fed(1):
            self.model(token, past_key_values=cache)
        stores = [layer.kv for layer in cache.layers]  # type: ignore[attr-defined]
        return {
            "entries": sum(store.stored() for store in stores),
            "bytes": sum(store.bytes() for store in stores),
            "allocated": sum(store.bytes(allocated=True) for store in stores),
        }


def of_rows(rows: int) -> str:
    """Return "1 row" or "N rows"."""
    return "1 row" if rows == 1 else f"{rows} rows"


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the settings of every timing by its name: one for each number of rows that are decoded together.

    Each is a dict that `measured` takes. scale: not used.
    """
    return {of_rows(rows): {**SIZE, "mechanism": ROUTED, "rows": rows} for rows in ROWS}


def measured(recipe: RecipeDict) -> Figures:
    """Time decoding by the dense and the routed model at one number of rows, and measure their caches.

    recipe: an entry of `arms`, with the sizes and the number of rows. Keys of the result: `seconds` per step, {"dense",
    "routed"}; `speed`, tokens per second of the routed model divided by the dense one's, as {"median", "min", "max"}
    over timings; `computed` and `share`, the mean number of rows that a routed block computes in a step, and the same
    divided by all rows; `memory`, the routed cache divided by the dense one in `entries`, `bytes` and `allocated`
    bytes, and the `unused` share of its reserved bytes.
    """
    models = {"dense": model_of(recipe, []), "routed": model_of(recipe, [recipe["mechanism"]])}
    decodings = {name: Decoding(model, recipe, recipe["rows"]) for name, model in models.items()}
    taken = seconds({name: decoding.lap for name, decoding in decodings.items()}, recipe["turns"])
    return figures(
        {name: statistics.median(each) / recipe["steps"] for name, each in taken.items()},
        ratio(taken["dense"], taken["routed"]),
        decodings["routed"].computed(),
        recipe["rows"],
        {name: decoding.memory() for name, decoding in decodings.items()},
    )


def figures(
    step: Mapping[str, float],
    speed: Mapping[str, float],
    computed: float,
    rows: int,
    memory: Mapping[str, Mapping[str, int]],
) -> Figures:
    """Return the figures of decoding at one number of rows.

    step: seconds per step of the models "dense" and "routed". speed: tokens per second of the routed model divided by
    the dense one's, as {"median", "min", "max"} over timings. computed: number of rows, out of `rows`, that a routed
    block computes in a step, as a mean. memory: for "dense" and "routed" the size of the cache, {"entries", "bytes",
    "allocated"}: stored tokens, their bytes, and reserved bytes. Keys of the result: `seconds` (`step`), `speed` and
    `computed` as given; `share`, computed / rows; `memory`, for each key of the sizes the routed model's value divided
    by the dense one's, and `unused`, the share of the routed model's reserved bytes that hold nothing.
    """
    ours, dense = memory["routed"], memory["dense"]
    shares = {what: ours[what] / dense[what] for what in ours}
    return {
        "seconds": dict(step),
        "speed": dict(speed),
        "computed": computed,
        "share": computed / rows,
        "memory": {**shares, "unused": 1 - ours["bytes"] / ours["allocated"]},
    }


DECODE = Study(
    name="decode",
    purpose="Mixture-of-Depths: decoding speed relative to the dense model, by number of rows",
    about=RANDOM_TEXT
    + (
        " Each step decodes one token per row, greedily and in fp32. A causal threshold keeps 12.5 % of the tokens in "
        f"every other of {SIZE['blocks']} blocks of width {SIZE['width']} (128.6 M parameters, 1.6 % of them in "
        f"embedding and head). Prompts have {SIZE['prompt']} tokens, and a turn takes {SIZE['steps']} steps. *Speed* "
        "is the tokens per second of the routed model divided by those of the dense model in the same turn, so above "
        "1 is faster. *Rows computed* is the mean over routed blocks and steps, and *share* is the same relative to "
        "all rows. The KV columns give what the cache holds relative to the dense model's cache."
    ),
    arms=arms,
    seeds={"laptop": (0,)},
    clock=measured,
    columns=(
        Column(key="seconds.dense", title="dense, ms per step", format=".2f", unit=1e-3),
        Column(key="seconds.routed", title="routed, ms per step", format=".2f", unit=1e-3),
        Column(key="speed", title="speed (min to max)", format=".2f", spread=True),
        Column(key="computed", title="rows computed", format=".2f"),
        Column(key="share", title="share", format=".1%"),
        Column(key="memory.entries", title="KV entries", format=".1%"),
        Column(key="memory.bytes", title="KV bytes with slots", format=".1%"),
        Column(key="memory.allocated", title="KV allocated", format=".1%"),
        Column(key="memory.unused", title="unused share of it", format=".1%"),
    ),
)
