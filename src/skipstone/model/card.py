"""Writes the model card: README.md beside the weights, in the form that the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.fields import unlike_llama

MARK = "<!-- written by skipstone -->"  # cards without it were written by users and are not overwritten
Realised = Mapping[int, Mapping[str, float]]


def write_card(
    model: SkipstoneForCausalLM,
    folder: str | Path,
    *,
    title: str,
    source: str | None = None,
    realised: Realised | None = None,
    losses: Mapping[str, float] | None = None,
) -> None:
    """Write the model card of a model as README.md into a folder.

    title: the heading. source: name of the checkpoint that the model was converted from, or None. realised: measured
    share of tokens that each mechanism keeps in generation, in [0, 1], as {block: {mechanism: share}}. losses: losses
    in nats per token, by name. Values that are None or absent are shown as not measured. Raises FileExistsError if the
    folder has a README.md that was not written by this function.
    """
    path = Path(folder) / "README.md"
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise FileExistsError(f"model card {str(path)!r} was not written by skipstone and is not overwritten")
    card = render_card(model, title=title, source=source, realised=realised, losses=losses)
    path.write_text(card, encoding="utf-8")


def render_card(
    model: SkipstoneForCausalLM,
    *,
    title: str,
    source: str | None = None,
    realised: Realised | None = None,
    losses: Mapping[str, float] | None = None,
) -> str:
    """Return the model card as Markdown in the form that the Hugging Face hub reads.

    title: the heading. source: name of the checkpoint that the model was converted from, or None. realised: measured
    share of tokens that each mechanism keeps in generation, in [0, 1], as {block: {mechanism: share}}. losses: losses
    in nats per token, by name. Values that are None or absent are shown as not measured. Equal arguments give identical
    text.
    """
    sections = [
        _header(model, source),
        f"{MARK}\n\n# {title}\n\n{_summary(model)}" + (f" Converted from `{source}`." if source else ""),
        "## Architecture\n\n" + _table(("part", "value"), _architecture(model)),
        "## Mechanisms\n\n" + _mechanisms(model, realised),
        "## Losses\n\n" + _losses(losses),
        "## Loading\n\n" + LOADING,
        "## Licence\n\nNot chosen: whoever publishes these weights adds `license:` to the header above.",
    ]
    return "\n\n".join(sections) + "\n"


LOADING = """```python
import skipstone  # registers the classes; a process that cannot import it passes trust_remote_code=True
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")
```"""


def _header(model: SkipstoneForCausalLM, source: str | None) -> str:
    kinds = dict.fromkeys(mechanism.placement.name.replace("_", "-") for mechanism in model.routing_modules())
    lines = ["library_name: skipstone", "pipeline_tag: text-generation"]
    lines += [f"base_model: {source}"] if source and "/" in source else []
    lines += ["tags:", *(f"- {tag}" for tag in ("skipstone", *(["conditional-computation"] if kinds else []), *kinds))]
    return "\n".join(["---", *lines, "---"])


def _summary(model: SkipstoneForCausalLM) -> str:
    what = "with conditional computation" if any(model.routing_modules()) else "(dense)"
    return f"A decoder of {model.config.num_hidden_layers} blocks {what}, in the format of the package skipstone."


def _architecture(model: SkipstoneForCausalLM) -> Iterator[tuple[str, str]]:
    config = model.config
    activation = config.activation_options["name"]
    active = model.cost().parameters.active
    chosen = "" if config.mlp != "experts" else f", of which a token uses {active:,}"
    yield "parameters", f"{model.num_parameters():,}{chosen}"
    yield "blocks, width", f"{config.num_hidden_layers}, {config.hidden_size}"
    heads = f"{config.num_attention_heads} query heads, {config.num_key_value_heads} key/value heads"
    yield "attention", f"{heads} of size {config.head_dim}{', QK-norm' if config.qk_norm else ''}"
    dense = f"{config.mlp}, {activation}, {config.intermediate_size} neurons"
    words = model.decoder.layers[0].mlp.in_words()
    yield "MLP", words if words and config.mlp == "experts" else ", ".join(filter(None, (dense, words)))
    yield "norm, positions", f"{config.norm}, {config.positions}"
    if parts := unlike_llama(config):
        yield "other parts", ", ".join(f"{name} {value}" for name, value in parts.items())
    head = "tied" if model.head_is_tied else "untied"
    yield "vocabulary, context", f"{config.vocab_size:,} ({head} head), {config.max_position_embeddings:,} tokens"


def _mechanisms(model: SkipstoneForCausalLM, realised: Realised | None) -> str:
    rows = []
    for layer, block in enumerate(model.model.layers):
        for name, mechanism in block.routing_modules().items():
            if mechanism.built_in:
                continue  # described under Architecture
            asked = realised_share = "every token"  # of an activation mechanism, which leaves none out
            if name in block.mechanisms:
                capacity = getattr(mechanism, "capacity", None)
                share = (realised or {}).get(layer, {}).get(name)
                asked = "not set" if capacity is None else f"{capacity:g}"
                realised_share = "not measured" if share is None else f"{share:.4f}"
            rows.append((name, str(layer), asked, realised_share))
    if not rows:
        return "None: every token passes every block."
    return _table(("mechanism", "block", "set capacity", "realised capacity"), rows)


def _losses(losses: Mapping[str, float] | None) -> str:
    if not losses:
        return "Not measured."
    return _table(("loss", "nats per token"), [(name, f"{value:.4f}") for name, value in losses.items()])


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    rule = tuple("---" for _ in head)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
