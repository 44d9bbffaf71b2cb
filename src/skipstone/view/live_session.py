"""The page's requests: strict reading from JSON, and the events of the requested models in turns.

One thread computes, pass by pass: the first model, its dense twin (a dense model of the same shape), the second model,
its dense twin. Each is timed by itself, so models that are shown side by side do not disturb each other's figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from skipstone.core.progress_bar import stages
from skipstone.core.strict import PlainDict, from_dict, unknown
from skipstone.generate.build_draft import EXIT, LOOKUP, SKIP
from skipstone.runs import distinct_names
from skipstone.view.live_model import LiveModel, rounded

T = TypeVar("T")
PROMPT = 20_000  # characters at most
NEW_TOKENS = 1024
DRAFTS = (None, LOOKUP, EXIT, SKIP)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request of the page: a prompt, the models that continue it, and the options of generation.

    prompt: the text to continue, 1 to 20,000 characters. models: indices of the loaded models, each at most once.
    new_tokens: number of tokens to generate, at most 1,024; fewer are generated if a model's context is full earlier.
    temperature: 0 (chooses the most probable token) to 10. seed: seed of the sampling, an unsigned 32-bit number.
    budgets: for each of `models` the share of its dense FLOPs to execute, or None for the model as it was trained; if
    empty, None for all models. twin: whether to time a dense model of the same shape beside each model. draft:
    "lookup", "exit" or "skip", the source of guesses for speculative decoding, or None.
    """

    prompt: str
    models: list[int]
    new_tokens: int = 64
    temperature: float = 0.8
    seed: int = 0
    budgets: list[float | None] = field(default_factory=list)
    twin: bool = True
    draft: str | None = None

    def check(self, models: int) -> None:
        """Raise ValueError, with a message of one line, if a field of the request is out of range or unknown.

        models: number of loaded models.
        """
        if not self.prompt or len(self.prompt) > PROMPT:
            raise ValueError(f"prompt must have from 1 to {PROMPT:,} characters, got {len(self.prompt):,}")
        if not 1 <= self.new_tokens <= NEW_TOKENS:
            raise ValueError(f"new_tokens must be from 1 to {NEW_TOKENS:,}, got {self.new_tokens:,}")
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 10):
            raise ValueError(f"temperature must be from 0 to 10, got {self.temperature}")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed must be from 0 to {(1 << 32) - 1}, got {self.seed}")
        if not self.models or len({*self.models}) < len(self.models) or not {*self.models} <= {*range(models)}:
            raise ValueError(f"models must be numbers from 0 to {models - 1}, each once, got {self.models}")
        if self.draft not in DRAFTS:
            raise ValueError(unknown("draft", self.draft, filter(None, DRAFTS)))
        if len(self.budgets) not in (0, len(self.models)):
            raise ValueError(f"budgets must have an entry for each of the models, got {self.budgets}")


def open_models(runs: Sequence[Path]) -> list[LiveModel]:
    """Load the models of one or more folders, in their order.

    runs: folders of training runs or saved models. Raises ValueError or FileNotFoundError, with a message of one line,
    for a folder without a model or a tokenizer.
    """
    names = distinct_names(runs)
    with stages(*(f"loading {name}; its decoding is compiled if that was never done here" for name in names)) as stage:
        return [LiveModel(run, name) for run, name, _ in zip(runs, names, stage, strict=True)]


@dataclass(frozen=True, kw_only=True)
class AttentionRequest:
    """A request of the page for the attention weights of a token.

    model: index of the loaded model. tokens: ids of the text up to the token, which is the last. budget: share of the
    dense FLOPs that the model is set to; None means the model as it was trained.
    """

    model: int
    tokens: list[int]
    budget: float | None = None


def _parsed(kind: type[T], values: object) -> T:
    if not isinstance(values, dict):
        raise ValueError("a request must be a JSON object")
    return from_dict(kind, values, "request")


def read_attention_request(values: object, models: int) -> AttentionRequest:
    """Return the request for attention weights that decoded JSON describes.

    values: the decoded JSON. models: number of loaded models. Raises ValueError, with a message of one line, for values
    that are not allowed.
    """
    request = _parsed(AttentionRequest, values)
    if not 0 <= request.model < models:
        raise ValueError(f"model must be from 0 to {models - 1}, got {request.model}")
    return request


def attention_events(models: Sequence[LiveModel], request: AttentionRequest) -> Iterator[PlainDict]:
    """Yield the one event that answers a request for attention weights.

    models: all loaded models. request: the model, the text up to the token, and the budget. The event has `type`
    "attention", `model` (its index), `at` (index of the token in the text) and `layers`, which has for each block the
    weights of the tokens up to this one, or None if the token skips the block's attention.
    """
    found = models[request.model].attention(request.tokens, request.budget)
    yield {"type": "attention", "model": request.model, "at": len(request.tokens) - 1, "layers": found}


def read_request(values: object, models: int) -> Request:
    """Build a request from decoded JSON, and check that its fields are known, of the right types and in range.

    values: the decoded JSON. models: number of loaded models. Raises ValueError, with a message of one line, for values
    that are not allowed.
    """
    request = _parsed(Request, values)
    request.check(models)
    return request


def events(models: Sequence[LiveModel], request: Request) -> Iterator[PlainDict]:
    """Yield the events of all requested models in turns, each with its model's index as `model`.

    models: all loaded models. Each model has an event of type "start", one of type "pass" for each new token, and one
    of type "end". `LiveModel.events` names the fields of the first two. Pass events also have `dense_seconds`, the time
    of the same pass of a dense model of the same shape (the twin), if `request.twin` is set and the model has one.
    Raises ValueError, with a message of one line and before the first event, if a model cannot serve the request.
    """
    budgets = request.budgets or [None] * len(request.models)
    runs = {i: _run(models[i], request, budget) for i, budget in zip(request.models, budgets, strict=True)}
    return _in_turns(runs)


def _in_turns(runs: dict[int, Iterator[PlainDict]]) -> Iterator[PlainDict]:
    while runs:
        for i, run in list(runs.items()):
            event = next(run, None)
            if event is None:
                del runs[i]
            yield {"model": i, **(event or {"type": "end"})}


def _run(model: LiveModel, request: Request, budget: float | None) -> Iterator[PlainDict]:
    ids = model.encode(request.prompt)
    room = model.context - len(ids)
    if room < 1:
        raise ValueError(
            f"the prompt of {len(ids):,} tokens leaves no room in the context of {model.name}, {model.context:,} tokens"
        )
    if budget is not None and model.table is None:
        raise ValueError(f"{model.name} has no budget table; `skipstone calibrate` writes it")
    new = min(request.new_tokens, room)
    found = model.events(
        ids,
        new_tokens=new,
        temperature=request.temperature,
        seed=request.seed,
        budget=budget,
        draft=request.draft,
    )
    if not (request.twin and model.has_twin):
        return found
    return _beside(found, model.twin().seconds(ids, new))


def _beside(found: Iterator[PlainDict], twin: Iterator[float]) -> Iterator[PlainDict]:
    """Yield a model's events, with the seconds of the dense twin's pass added to each pass as `dense_seconds`.

    found: the events. twin: the seconds of the twin's passes, one for each.
    """
    for event in found:
        if event["type"] == "pass":
            event["dense_seconds"] = rounded(next(twin))
        yield event
