"""Make a tiny model's decisions non-trivial: about half of the tokens are kept, and rows differ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skipstone import SkipstoneForCausalLM
from skipstone.budget.handles import ThresholdHandle, find_handles
from skipstone.core.routing_module import causal_obstacle
from skipstone.train.decay import kinds_of

VOCAB, ROWS, LENGTH = 61, 3, 15


def ids(rows: int = ROWS, length: int = LENGTH, seed: int = 5) -> Tensor:
    drawn = torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed), device="cpu")
    return drawn.to(torch.get_default_device())


@torch.no_grad()
def enliven(model: SkipstoneForCausalLM) -> None:
    """Change a model in place so that decisions are not trivial: about half of the tokens are kept, and rows differ.

    Weights become larger, routers spread their scores widely, schedules are on their way, and thresholds lie among the
    scores. What is changed follows from what mechanisms declare: the kind of each parameter, and thresholds.
    """
    torch.manual_seed(12)
    for mechanism in model.routing_modules():
        mechanism.advance(0.25, None)
    kinds, owned = kinds_of(model), {id(p) for m in model.routing_modules() for p in m.parameters()}
    for name, parameter in model.named_parameters():
        own, drawn = id(parameter) in owned, torch.randn_like(parameter)
        if own and not parameter.any() and (parameter.dim() == 0 or kinds[name] == "preferences"):
            parameter.copy_(drawn * 0.7)
        elif own and parameter.dim() == 1 and kinds[name] == "biases":
            parameter.mul_(0.5).add_(drawn * 0.1)  # gates that start open are less so
        elif parameter.dim() > 1:
            parameter.mul_(6 if kinds[name] == "routers" else 4)
        elif parameter.dim() == 1:
            parameter.add_(drawn * 0.1)
    handles = find_handles(model)
    for _ in range(3 if handles else 1):  # each threshold moves what others see
        before = _state(model, handles)
        _centre(model, handles)
        if all(map(torch.equal, before, _state(model, handles))):
            break


def _state(model: SkipstoneForCausalLM, handles: list[ThresholdHandle]) -> list[Tensor]:
    """Return copies of all that `_centre` may change."""
    thresholds = torch.tensor([handle.threshold for handle in handles])
    return [thresholds, *(p.clone() for module in model.routing_modules() for p in module.parameters())]


def _centre(model: SkipstoneForCausalLM, handles: list[ThresholdHandle]) -> None:
    """Set every threshold between two scores, so that about half of the tokens of each block lie above it."""
    decisions = [getattr(m, "decision", None) for block in model.model.layers for m in block.mechanisms.values()]
    guesses = [guess for decision in decisions if (guess := getattr(decision, "guess", None)) is not None]
    hooks = [guess.register_forward_hook(_centre_guess) for guess in guesses]  # of predictors: no record has them
    records = None  # of the model as it is now; a forward pass is most of the work, and the last round changes nothing
    for handle in handles:
        name = handle.name.split()[1]
        layers = [i for i, block in enumerate(model.model.layers) if name in block.mechanisms]
        if records is None:
            before = _state(model, [])
            records = _records(model)
            unchanged = all(map(torch.equal, before, _state(model, [])))  # by the hooks
        alone = {layer: scores for layer in layers if len(scores := _scores(handle, records, layer))}
        if alone:
            shares = [0.5] if len(alone) == 1 else [share / 20 for share in range(1, 20)]
            lines = [_between(torch.cat(list(alone.values())), share) for share in shares]
            line = max(lines, key=lambda line: min(_evenness(scores > line) for scores in alone.values()))
            unchanged = unchanged and handle.threshold == float(line)
            handle.set(float(line))
        for layer, scores in alone.items():
            if len(alone) > 1 and _evenness(scores > handle.threshold) < 0.1:
                _level(model, handle, layer, name)
                unchanged = False
        records = records if unchanged else None
    if hooks and records is None:
        _records(model)
    for hook in hooks:
        hook.remove()


def _centre_guess(guess: Any, inputs: Any, output: Tensor) -> Tensor:
    """Shift a predictor's bias, and its output at once, so that half of its guesses lie above 0, if they do not yet.

    A hook of a forward pass, so that later blocks see the new decisions: one pass sets all predictors.
    """
    if not output.numel():
        return output
    line = _between(output.flatten(), 0.5)
    if line.abs() < 1e-3 * (output.max() - output.min()):
        return output
    guess.score_bias.sub_(line)
    return output - line


def _level(model: SkipstoneForCausalLM, handle: ThresholdHandle, layer: int, name: str) -> None:
    """Shift the bias of one block's gate, so that a threshold that several blocks share lies among this block's scores.

    handle: the threshold. layer, name: the block and its gate.
    """
    scores = _scores(handle, _records(model), layer)
    own = [p for p in model.model.layers[layer].mechanisms[name].parameters() if p.numel() == 1]
    if own and len(scores):
        own[-1].add_(0.1)
        slope = (_scores(handle, _records(model), layer).mean() - scores.mean()) / 0.1
        own[-1].add_((handle.threshold - scores.median()) / slope - 0.1)


def _scores(handle: ThresholdHandle, records: Any, layer: int) -> Tensor:
    return handle.scores([r if i == layer else {} for i, r in enumerate(records)])


def _evenness(above: Tensor) -> float:
    """Return the share of True or of False values, whichever is smaller: 1/2 if half are True, 0 if all are alike."""
    return min(above.float().mean().item(), 1 - above.float().mean().item())


def _records(model: SkipstoneForCausalLM) -> Any:
    routing = "oracle" if causal_obstacle(model.routing_modules()) else "causal"
    return model(ids(), routing=routing, noise=False, output_records=True).records


def _between(values: Tensor, share: float) -> Tensor:
    """Return a number between two of the values, with about the share `share` of them below it.

    The two are not so close that rounding could swap them.
    """
    ordered = values.sort().values
    at = min(max(round(share * len(ordered)), 1), max(len(ordered) - 1, 1))
    near = 1e-4 * (ordered[-1] - ordered[0])
    while at < len(ordered) - 1 and ordered[at] - ordered[at - 1] < near:
        at += 1
    return (ordered[at - 1] + ordered[min(at, len(ordered) - 1)]) / 2
