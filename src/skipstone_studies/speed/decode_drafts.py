"""A study of speculative decoding of one row: its speed beside decoding without drafts, prompt by prompt."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from skipstone.generate import stream
from skipstone.measure.speed import Lap
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.pretrained import four_bit_rows
from skipstone.model.quantise import quantise
from skipstone_studies.adapting import source_path
from skipstone_studies.speed.interleaved import seconds, spread
from skipstone_studies.speed.rivals.engines import now
from skipstone_studies.speed.rivals.source import rows, source
from skipstone_studies.study import Column, Figures, RecipeDict, Study

SOURCE = "SmolLM2-135M-Instruct"
SIZES: dict[str, RecipeDict] = {
    "laptop": {"prompt": 64, "new": 96, "prompts": 4, "turns": 3},
    "quick": {"prompt": 24, "new": 4, "prompts": 1, "turns": 1},
}
NO_DRAFT = "none"
SLOW: RecipeDict = {"turns": 2}
SAMPLED = 0.8  # temperature
WAYS: dict[str, RecipeDict] = {
    "int8, no draft again": {"bits": 8, "draft": NO_DRAFT},
    "int8, lookup": {"bits": 8, "draft": "lookup"},
    "int8, lookup, sampled": {"bits": 8, "draft": "lookup", "temperature": SAMPLED},
    "int8, exit": {"bits": 8, "draft": "exit"},
    "fp32, int8": {"bits": 32, "draft": "int8", **SLOW},
    "fp32, lookup": {"bits": 32, "draft": "lookup", **SLOW},
    "16 bits, int8": {"bits": 16, "draft": "int8"},
    "16 bits, int4": {"bits": 16, "draft": "int4"},
    "16 bits, lookup": {"bits": 16, "draft": "lookup"},
    "4 bits, lookup": {"bits": 4, "draft": "lookup"},
    "fp32, int4": {"bits": 32, "draft": "int4", **SLOW},
}


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the settings of every measurement by its name: one for each format of the weights and kind of draft.

    Each is a dict that `measured` takes. scale: "laptop", or "quick" with fewer prompts, tokens and timings.
    """
    return {arm: {"source": SOURCE, "temperature": 0.0, **SIZES[scale], **way} for arm, way in WAYS.items()}


@cache
def _model(name: str, bits: int) -> SkipstoneForCausalLM:
    """Return the checkpoint `name` with weights of 32 bits, which are unchanged, 16, 8 or 4."""
    if bits == 32:
        return source(name)
    return quantise(source(name), bits, four_bit_rows(source_path(name)) if bits == 4 else None).eval()


def measured(recipe: RecipeDict) -> Figures:
    """Time decoding with a draft and without one in turns, for each prompt of each text.

    recipe: an entry of `arms`, with the keys "source" (name of the checkpoint), "bits" (of a weight), "draft" ("none"
    to time decoding without drafts against itself, which shows the noise), "temperature" (0: greedy), "prompt" and
    "new" (tokens), "prompts" (of each text) and "turns" (timings of each prompt). Keys of the result: by title of a
    text {"speed": {"median", "min", "max"} over prompts of the seconds without drafts divided by those with drafts,
    each the least of all timings; "guessed": the share of tokens that a draft had proposed}; `total`, the sum of all
    prompts' seconds without drafts divided by that with drafts; `worst`, the least speed of any prompt; `same`, the
    share of prompts whose text is the same with drafts, token for token, None if tokens are sampled.
    """
    model = _model(recipe["source"], recipe["bits"])
    found: dict[str, Figures] = {}
    same, speeds = list[bool](), list[float]()
    plain_total = drafted_total = 0.0
    for title, ids_RT in rows(recipe["source"]).items():
        each, guessed = [], []
        for row in range(recipe["prompts"]):
            plain, drafted = (
                _Decoding(model, ids_RT[row : row + 1, : recipe["prompt"]], recipe, draft)
                for draft in (None, None if recipe["draft"] == NO_DRAFT else recipe["draft"])
            )
            least = {who: min(laps) for who, laps in seconds({0: plain.lap, 1: drafted.lap}, recipe["turns"]).items()}
            each.append(least[0] / least[1])
            plain_total, drafted_total = plain_total + least[0], drafted_total + least[1]
            guessed.append(drafted.guessed)
            same.append(plain.text == drafted.text)
        found[title] = {"speed": spread(each), "guessed": sum(guessed) / len(guessed)}
        speeds += each
    unchanged = None if recipe["temperature"] else sum(same) / len(same)
    return {**found, "total": plain_total / drafted_total, "worst": min(speeds), "same": unchanged}


class _Decoding:
    """The decoding of one prompt, timed again and again.

    draft: the source of guesses; None: no drafts. After a call of `lap`, `text` has the new tokens and `guessed` the
    share of them that a draft had proposed.
    """

    def __init__(self, model: SkipstoneForCausalLM, ids_1T: Tensor, recipe: RecipeDict, draft: str | None) -> None:
        self.model, self.ids_1T, self.recipe, self.draft = model, ids_1T, recipe, draft
        self.text: list[int] = []
        self.guessed = 0.0

    def lap(self) -> Lap:
        """Decode the prompt's continuation once; the pass over the prompt is not timed."""
        new = self.recipe["new"]
        options = {"temperature": self.recipe["temperature"], "seed": 0, "eos_token_id": [], "draft": self.draft}
        steps = stream(self.model, self.ids_1T, max_new_tokens=new + 1, **options)
        next(steps)  # of the prompt
        start = now()
        found = list(steps)
        taken = now() - start
        self.text = [int(step.token_B) for step in found]
        self.guessed = sum(bool(step.guessed_B) for step in found) / new
        return Lap(tokens=new, seconds=taken, joules=None)


COLUMNS = (
    Column(key="total", title="all prompts", format=".2f"),
    *(Column(key=f"{title}.speed", title=title, format=".2f", spread=True) for title in ("plays", "manual", "code")),
    Column(key="worst", title="worst prompt", format=".2f"),
    *(Column(key=f"{title}.guessed", title=f"guessed, {title}", format=".0%") for title in ("plays", "manual", "code")),
    Column(key="same", title="texts that are the same", format=".0%"),
)
LAPTOP = SIZES["laptop"]

DECODE_DRAFTS = Study(
    name="decode_drafts",
    purpose="Speculative decoding of one row on a CPU, beside decoding without drafts",
    about=(
        f"The source is {SOURCE}, from a file of four-bit blocks; its weights are used in fp32, fp16, int8 and the "
        f"file's four bits. Each of {LAPTOP['prompts']} prompts from each of three texts on which no arm was tuned "
        "(plays of Shakespeare, the reference manual of the Python language, Python code) has "
        f"{LAPTOP['prompt']} tokens and is continued by {LAPTOP['new']}. Speeds are seconds without drafts divided by "
        "seconds with drafts, in the same engine: CPU time of one thread, in turns, the least of "
        f"{LAPTOP['turns']} timings of each ({SLOW['turns']} in fp32); the pass over the prompt is not timed. "
        "*All prompts* is the quotient of sums; a text's column has the median over its prompts (least to greatest). "
        "The number of guesses follows from measured times, as by default. *No draft again* times plain decoding "
        "against itself and shows the noise. "
        f"*Sampled* draws tokens at temperature {SAMPLED:g}: with drafts and without, the texts differ, but their "
        "distribution does not. The greedy text of so small a model repeats itself, which suits *lookup*. "
        "*int8* and *int4* draft by the model itself with rounded weights. Because the file's weights have four bits, "
        "*int4* loses less on it than on a checkpoint in bf16. "
        "*exit* drafts with the first half of the blocks, which this model was not trained for."
    ),
    arms=arms,
    seeds={"laptop": (0,), "quick": (0,)},
    clock=measured,
    columns=COLUMNS,
)
