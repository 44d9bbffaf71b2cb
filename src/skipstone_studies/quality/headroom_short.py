"""What routing could gain after the training of `decisive_short`, and what the segments of its routed models do.

A dense model is asked which bytes its blocks help. A routed model is run with other decisions than its own, which shows
how much its segment (the blocks that bytes may skip) lowers the loss, at the bytes that pass it and at the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from skipstone.core.strict import PlainDict
from skipstone.core.tokens import IDS, IDS_BEFORE, Tokens
from skipstone.data.prepare import PreparedData
from skipstone.data.rows import IGNORE, Row
from skipstone.evaluate.tables import Section, markdown
from skipstone.measure.losses import token_nats
from skipstone.measure.passes import inputs_of, targets
from skipstone.mechanisms.decisions.boundary import EXPECTED_SHARE, Boundary
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.runs import Run
from skipstone_studies import benefit_page, protocol
from skipstone_studies import protocol_page as pages
from skipstone_studies.claims import ByArm
from skipstone_studies.quality import decisive_short
from skipstone_studies.quality.decisive_short import SAME_TEXT
from skipstone_studies.quality.headroom import HEADROOM, ORACLE, on_rows
from skipstone_studies.study import Figures, RecipeDict
from skipstone_studies.text_loss import rows as batches
from skipstone_studies.text_loss import spaced

WORDS = "word starts"  # the bytes that decision "boundary" keeps
SHALLOW = "dense-4"  # the best dense model of `decisive_short`
SEGMENT = "segment"
ROWS = {"laptop": 256, "quick": 8}
# The decisions that a routed model is run with: name and heading in the table.
DECISIONS = {
    "own": "its own decisions",
    "none": "no byte kept",
    "chance": "as many bytes, at random",
    "words": "word starts",
}


def arms(scale: str, corpus: str = "distinct:python-code") -> dict[str, RecipeDict]:
    """Return the recipes by name: two dense models of `decisive_short`, and its models that skip.

    Each is a dict of settings that makes one of the compared models. The dense ones are the best at equal training
    FLOPs, and 8 blocks on the text of the model that skips by boundaries of words. scale: "laptop" or "quick". corpus:
    name of the text, as in data.corpus.
    """
    found = decisive_short.arms(scale, corpus)
    return {name: found[name] for name in (SHALLOW, SAME_TEXT, *decisive_short.ROUTED)}


def measured(folder: Path) -> Figures:
    """Return the figures of one run: its losses and FLOPs, and what its blocks do for the bytes of the test split.

    folder: the run folder. Keys: those of `protocol.measured`, such as `loss`; for the dense model of 8 blocks also
    `benefit`, what `headroom.on_rows` returns, with word starts as one more way to choose bytes; for models that skip
    also `segment`, what `of_segment` returns.
    """
    figures, arm = protocol.measured(folder), folder.name.rpartition("-seed")[0]
    data, count = protocol.data_of(protocol.recipe_of(folder)["data"], "test"), ROWS[folder.parent.name]
    if arm == SAME_TEXT:
        return {**figures, ORACLE: on_rows(Run(folder).load_model(), data, count, {WORDS: word_starts})}
    if arm in decisive_short.ROUTED:
        return {**figures, SEGMENT: of_segment(Run(folder).load_model().eval(), data, count)}
    return figures


def word_starts(rows: Sequence[Row]) -> Tensor:
    """Return which tokens of rows of bytes decision "boundary" keeps, bool [N], N counting the tokens of all rows.

    These are the first byte of a row, and each byte that ends a word (the space or sign directly behind its last
    letter), at which the first letter of the next word is predicted. rows: dicts of tensors [T] by name, of which
    `input_ids` is read.
    """
    return starts(torch.stack([row["input_ids"] for row in rows])).flatten()


def starts(id_BT: Tensor) -> Tensor:
    """Return which bytes decision "boundary" keeps, bool [B, T]. id_BT: bytes, int64; each row begins a document."""
    at_BT = torch.arange(id_BT.shape[1]).expand_as(id_BT)
    before_BT = torch.where(at_BT == 0, -1, id_BT.roll(1, 1))
    tokens = Tokens(slot_BT=at_BT, position_BT=at_BT, state={IDS: id_BT, IDS_BEFORE: before_BT})
    score_BT = torch.zeros_like(id_BT, dtype=torch.float32)  # which the decision does not read
    return Boundary(EXPECTED_SHARE, 1).causal(score_BT, score_BT, tokens)


@torch.no_grad()
def of_segment(model: SkipstoneForCausalLM, data: PreparedData, count: int) -> PlainDict:
    """Measure what the segment of a routed model does, by running it with other decisions than its own.

    model: the model, with one mechanism around a segment. data: prepared text, whose `validation` is read. count:
    number of evenly spaced rows. Keys of the result: `loss`, by name of the decisions (`DECISIONS`) in nats per
    prediction; `kept`, the share of bytes that the model keeps; `words`, the share of these that are word starts;
    `found`, the share of word starts that it keeps; `gain`, by how many nats the segment lowers the loss of the
    predictions at kept bytes ("kept") and at the others ("others"), each as a mean over these bytes.
    """
    at = next(i for i, block in enumerate(model.decoder.layers) if block.mechanisms)
    generator, parts = torch.Generator().manual_seed(0), list[tuple[Tensor, ...]]()
    for batch in batches(data, spaced(len(data.validation), count)):
        given = inputs_of(batch, model.device)
        out = model(**given, use_cache=False, output_records=True)
        kept_BT = next(iter(out.records[at].values())).kept_BT
        share = kept_BT.float().mean()
        others = {
            "none": torch.zeros_like(kept_BT),
            "chance": torch.rand(kept_BT.shape, generator=generator) < share,
            "words": starts(batch["input_ids"]),
        }
        nats = {"own": token_nats(out.logits, targets(batch))} | {
            name: token_nats(model(**given, use_cache=False, routing={at: mask_BT}).logits, targets(batch))
            for name, mask_BT in others.items()
        }
        known_BT = targets(batch) != IGNORE
        parts.append(tuple(x[known_BT] for x in (kept_BT, others["words"], *(nats[name] for name in DECISIONS))))
    kept_N, word_N, *losses = (torch.cat(each) for each in zip(*parts, strict=True))
    loss_N = dict(zip(DECISIONS, (each.double() for each in losses), strict=True))
    gain_N = loss_N["none"] - loss_N["own"]
    return {
        "loss": {name: float(each.mean()) for name, each in loss_N.items()},
        "kept": float(kept_N.float().mean()),
        "words": float(word_N[kept_N].float().mean()),
        "found": float(kept_N[word_N].float().mean()),
        "gain": {"kept": float(gain_N[kept_N].mean()), "others": float(gain_N[~kept_N].mean())},
    }


def details(figures: ByArm) -> str:
    """Return the Markdown below the table: what four more blocks gain, what segments do, and which bytes blocks help.

    figures: the figures of every run, {arm (compared recipe): {seed: nested dict}}.
    """
    found = {seed: one[ORACLE] for seed, one in sorted(figures.get(SAME_TEXT, {}).items()) if ORACLE in one}
    parts = [
        pages.headroom_text(pages.room_of(figures, SAME_TEXT, [SHALLOW]), SAME_TEXT, [SHALLOW]),
        segments(figures),
        *(benefit_page.tables(one, f"{SAME_TEXT}, seed {seed}") for seed, one in found.items()),
        benefit_page.NOTE + f" *{WORDS}*: the bytes that decision `boundary` keeps, an eighth of all, come first.",
    ]
    return "\n\n".join(part for part in parts if part)


def segments(figures: ByArm) -> str:
    """Return a Markdown table of what the segment of each routed model does, one row per run; "" without runs.

    figures: the figures of every run, {arm (compared recipe): {seed: nested dict}}.
    """
    table = [
        [
            f"{arm}, seed {seed}",
            f"{one['kept']:.1%}",
            f"{one['words']:.0%}",
            *(f"{one['loss'][name]:.4f}" for name in DECISIONS),
            *(f"{one['gain'][name]:+.4f}" for name in ("kept", "others")),
        ]
        for arm in decisive_short.ROUTED
        for seed, one in ((seed, of[SEGMENT]) for seed, of in sorted(figures.get(arm, {}).items()) if SEGMENT in of)
    ]
    if not table:
        return ""
    gains = ("gain at kept bytes", "gain at the others")
    columns = ["model", "kept", "word starts among them", *DECISIONS.values(), *gains]
    section = Section(title="What the segment does in models that skip", columns=columns, rows=table, notes=[NOTE])
    return markdown([section]).strip("\n")


NOTE = (
    "Losses in nats a byte on 256 test rows, where blocks 2 to 5 update the bytes that the heading names. A *gain* "
    "is the loss without the segment minus that with its own decisions, as a mean over the bytes that pass the "
    "segment, and over the others, which it can help by what later blocks read from kept bytes. A router that learns "
    "from the loss at the bytes that it keeps sees the first of them alone."
)
HEADROOM_SHORT = replace(
    HEADROOM,
    name="headroom_short",
    purpose="what could routing gain in decisive_short, and what do its segments do?",
    about=(
        "The models of [decisive_short](decisive_short.md), asked what their blocks do. Between two dense ones lies "
        f"what routing can gain: *{SHALLOW}*, the best one at equal training FLOPs, and *{SAME_TEXT}*, eight blocks "
        "for every byte after the text of the model that skips by word starts. The latter's blocks are skipped to "
        "see which bytes they help (it was trained without skipping; a model that is trained with it can gain more "
        "or less). The models "
        "that skip are run with other decisions than their own.\n\n" + pages.COLUMNS_NOTE
    ),
    arms=arms,
    seeds=decisive_short.DECISIVE_SHORT.seeds,
    measure=measured,
    claims=None,
    details=details,
)
