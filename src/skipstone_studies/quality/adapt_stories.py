"""The loss of a small pretrained model that is adapted to compute less, compared with other uses of the same FLOPs.

The checkpoint generates stories at temperature 1; every compared model is adapted on the same ones, learning from the
text and from the checkpoint's distribution. All models that skip execute the FLOPs of the model without one block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from skipstone.core.strict import PlainDict
from skipstone.evaluate.loaded_run import batches, load_run
from skipstone.measure.flops import flop_check
from skipstone.measure.losses import measure_loss
from skipstone_studies.adapting import adapt_run, text_folder
from skipstone_studies.study import Column, Figures, RecipeDict, Study

SOURCE = "stories260K"
BUDGET = 0.8155  # FLOPs of a row of 256 tokens without one of five blocks, as a share of all
CONTEXT, STEPS, ROWS, COUNTED = 256, 200, 128, 16
SAMPLED = {"tokens": 600_000, "length": 384, "batch": 128}
LOSS = {"language_modelling": 0.5, "distillation": 0.5}
LEAST = {"score": "block_influence"}


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the recipes by name: the source, the same trained further, one without a block, and models that skip.

    Each is a dict of settings that makes one of the compared models. The source is the checkpoint before it is adapted.
    scale: not used.
    """
    mixture = {"name": "mixture_of_depths", "layers": {**LEAST, "count": 3}, "capacity_warmup": 0.15}
    best = {**mixture, "kv": "full", "skip": "low_rank", "skip_rank": 16}
    random = {**best, "decision": "random", "weight": "none"}
    gates = {"name": "token_selective", "layers": "1:", "depth_weight": 0.0}
    routed = {"budget": BUDGET, "router_learning_rate": 3e-3, "start": "measured"}
    at_random = {**routed, "start": "random"}
    soft = {"steps": STEPS * 3 // 5}
    hard = {"steps": STEPS - soft["steps"], "routing": "causal", "learning_rate": 5e-4}
    closing = {"loss": {**LOSS, "budget": 10.0}, "router_learning_rate": 1e-2, "stages": [soft, hard]}
    return {
        "source": {"source": SOURCE, "sampled": SAMPLED},
        "dense, tuned": _recipe({}),
        "one block dropped": _recipe({"drop_layers": {**LEAST, "count": 1}}),
        "random skipping": _recipe({"mechanisms": [random]}, **at_random),
        "mixture of depths": _recipe({"mechanisms": [best]}, **routed),
        "same, random start": _recipe({"mechanisms": [best]}, **at_random),
        "same, nothing for skipped tokens": _recipe({"mechanisms": [{**best, "skip": "identity"}]}, **routed),
        "same, no keys of skipped tokens": _recipe({"mechanisms": [{**best, "kv": "kept"}]}, **routed),
        "token-selective attention": _recipe({"mechanisms": [gates]}, **closing, budget=BUDGET),
    }


def _recipe(model: PlainDict, **options: object) -> RecipeDict:
    train = {"steps": STEPS, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": STEPS // 10}
    quiet = {"eval_every": 0, "eval_rows": 8, "save_every": STEPS // 4, "log_every": STEPS // 10}
    return {
        "source": SOURCE,
        "sampled": SAMPLED,
        "model": model,
        "data": {"context": CONTEXT},
        "train": {**train, **quiet},
        "adapt": {"loss": LOSS, **options},
    }


def measured(folder: Path) -> Figures:
    """Return the losses of one run on held-out stories and on wikitext-2, and the counted FLOPs per token of stories.

    folder: the run folder. Keys: `stories` and `wikitext-2`, losses in nats per token by the pass that skips; `flops`,
    forward FLOPs per token of that pass.
    """
    stories = f"text:{text_folder(folder, SOURCE, SAMPLED)}"
    found: PlainDict = {}
    for name, corpus, split in (("stories", stories, "validation"), ("wikitext-2", "wikitext-2", "test")):
        loaded = load_run(folder, split, corpus, CONTEXT)
        assert loaded.data is not None
        model, device = loaded.model, loaded.model.device
        found[name] = measure_loss(model, loaded.primary, batches(loaded.data, 8, device, ROWS), activations=False).loss
        if name == "stories":
            found["flops"] = flop_check(model, loaded.primary, batches(loaded.data, 1, device, COUNTED)).counted
    return found


def derive(figures: Mapping[str, Figures]) -> dict[str, Figures]:
    """Return for each arm `share`, its FLOPs divided by those of the arm "source", and its `perplexity` on the stories.

    The FLOPs are forward FLOPs per token of stories, as counted by `measured`. figures: what `measured` returned for
    each arm (compared recipe) with one seed, by arm. The result is {} without the arm "source", which is the model
    before it is adapted.
    """
    if "source" not in figures:
        return {}
    whole = figures["source"]["flops"]
    return {
        arm: {"share": found["flops"] / whole, "perplexity": math.exp(found["stories"])}
        for arm, found in figures.items()
    }


ADAPT_STORIES = Study(
    name="adapt_stories",
    purpose="A small pretrained model computes less: Mixture-of-Depths, random skipping, gates, fewer blocks",
    about=(
        "stories260K is adapted for 200 steps on stories that it generated. Every arm reads the same rows and is "
        "trained with cross-entropy and distillation in equal parts. All arms that skip execute about the FLOPs of "
        "the model without one block; FLOPs are counted, one row at a time. *Nats* and *perplexity* are those of the "
        "pass that skips, on rows that no arm was trained on; wikitext-2 is text of another kind. Arms named *same* "
        "differ from *mixture of depths* in the property named."
    ),
    arms=arms,
    seeds={"laptop": (0,)},
    make=adapt_run,
    measure=measured,
    measure_together=None,
    derive=derive,
    columns=(
        Column(key="share", title="executed FLOPs", format=".1%"),
        Column(key="stories", title="stories, nats", format=".4f", better="low"),
        Column(key="perplexity", title="perplexity"),
        Column(key="wikitext-2", title="wikitext-2, nats"),
    ),
)
