"""Nothing that acts around the call of a linear layer is bypassed: offloading, hooks, parametrisations, adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

import skipstone
from models import on_disk, tiny_model

GROUPS: dict[str, dict[str, Any]] = {
    "groups": {"capacity": 0.5, "group_size": 8},
    "magnitude": {"decision": "magnitude", "capacity": 0.5, "group_size": 1},
    "tried and kept": {"decision": "magnitude", "capacity": 0.75, "down_capacity": 0.5, "group_size": 1},
}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def net(name: str, **options: Any) -> skipstone.SkipstoneForCausalLM:
    sizes = {"vocab_size": 300, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    return tiny_model(**sizes, initializer_range=0.2, neuron_groups=GROUPS.get(name), **options)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def doubled_by_hook(linear: nn.Linear) -> None:
    linear.register_forward_hook(lambda module, inputs, output: 2 * output)


def doubled_by_parametrisation(linear: nn.Linear) -> None:
    parametrize.register_parametrization(linear, "weight", Doubled())


def doubled_by_forward(linear: nn.Linear) -> None:
    plain = linear.forward
    linear.forward = lambda x: 2 * plain(x)  # type: ignore[method-assign]


def doubled_by_hook_on_all(linear: nn.Linear) -> None:
    HANDLES.append(register_module_forward_hook(lambda module, x, y: 2 * y if module is linear else None))


HANDLES: list[RemovableHandle] = []


@pytest.fixture(autouse=True)
def no_hooks_left() -> Iterator[None]:
    yield
    while HANDLES:
        HANDLES.pop().remove()


AROUND: dict[str, Callable[[nn.Linear], None]] = {
    "hook": doubled_by_hook,
    "hook on all modules": doubled_by_hook_on_all,
    "parametrisation": doubled_by_parametrisation,
    "forward": doubled_by_forward,
}


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 290, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("around", AROUND)
@torch.no_grad()
def test_what_acts_around_a_layer_acts(name: str, around: str, ids: Tensor) -> None:
    spoken, right = net(name), net(name)
    for i in (0, 2):
        AROUND[around](spoken.model.layers[i].mlp.down_proj)
        right.model.layers[i].mlp.down_proj.weight.mul_(2)
    torch.testing.assert_close(spoken(ids).logits, right(ids).logits)
    assert torch.equal(spoken.generate(ids[:1], **GREEDY), right.generate(ids[:1], **GREEDY))


@pytest.mark.filterwarnings("ignore::UserWarning")  # accelerate's remarks on offloading
@pytest.mark.parametrize("name", [*GROUPS, "dense"])
@torch.no_grad()
def test_weights_on_disk_compute_the_same(name: str, ids: Tensor, tmp_path: Path) -> None:
    model = net(name)
    spread = on_disk(model, tmp_path)
    torch.testing.assert_close(spread(ids).logits, model(ids).logits)
    assert torch.equal(spread.generate(ids[:1], **GREEDY), model.generate(ids[:1], **GREEDY))
    with pytest.raises(ValueError, match="loss_chunk needs direct access to the head's weight"):
        spread(ids, labels=ids, loss_chunk=8)


@pytest.mark.parametrize("around", AROUND)
def test_a_chunked_loss_refuses_a_head_that_is_more_than_its_weight(around: str, ids: Tensor) -> None:
    model = net("dense")
    AROUND[around](model.lm_head)
    with pytest.raises(ValueError, match="loss_chunk needs direct access to the head's weight"):
        model(ids, labels=ids, loss_chunk=8)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("which", ["gate_proj", "up_proj", "down_proj"])
@torch.no_grad()
def test_a_layer_with_a_bias_in_the_place_of_one_without_is_called(name: str, which: str, ids: Tensor) -> None:
    model = net(name)
    model.generate(ids[:1], **GREEDY)
    for block in model.model.layers:
        plain = getattr(block.mlp, which)
        layer = nn.Linear(plain.in_features, plain.out_features)
        layer.weight = plain.weight
        setattr(block.mlp, which, layer)
    masked = model(ids, executor="masked").logits
    torch.testing.assert_close(model(ids).logits, masked)
    cache = model(ids[:1, :4], use_cache=True).past_key_values
    steps = [model(ids[:1, t : t + 1], past_key_values=cache).logits for t in range(4, 12)]
    torch.testing.assert_close(torch.cat(steps, 1), masked[:1, 4:])


def written(model: skipstone.SkipstoneForCausalLM) -> None:
    for block in model.model.layers:
        block.mlp.up_proj.weight.mul_(2)


def replaced(model: skipstone.SkipstoneForCausalLM) -> None:
    for block in model.model.layers:
        block.mlp.down_proj.weight.data = -block.mlp.down_proj.weight.data


def hooked(model: skipstone.SkipstoneForCausalLM) -> None:
    for block in model.model.layers:
        block.mlp.down_proj.register_forward_hook(lambda module, inputs, output: -output)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("change", [written, replaced, hooked])
@torch.no_grad()
def test_weights_that_change_between_steps_are_read_again(name: str, change: Callable[..., None], ids: Tensor) -> None:
    model = net(name)
    cache = model(ids[:1, :4], use_cache=True).past_key_values
    for t in range(4, 8):
        model(ids[:1, t : t + 1], past_key_values=cache)
    change(model)
    expected = model(ids[:1, 8:9], past_key_values=copy.deepcopy(cache), executor="masked").logits
    torch.testing.assert_close(model(ids[:1, 8:9], past_key_values=cache).logits, expected)


def test_a_chunked_loss_refuses_a_head_with_a_bias(ids: Tensor) -> None:
    model = net("dense")
    model.lm_head = nn.Linear(32, 300)
    with pytest.raises(ValueError, match="loss_chunk needs direct access to the head's weight"):
        model(ids, labels=ids, loss_chunk=8)
