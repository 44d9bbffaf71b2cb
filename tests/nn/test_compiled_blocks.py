"""The compiled call for all blocks equals the blocks one after the other, and is left where it would not.

`tests/laws/test_compiled_steps.py` compares it for every mechanism.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.mechanisms import MixtureOfDepths
from skipstone.model.quantise import quantise
from skipstone.nn import compiled_blocks
from skipstone.ops import decode_stack

pytest.importorskip("numba")

OPTIONS: dict[str, dict[str, Any]] = {
    "grouped heads": {"num_key_value_heads": 2},
    "biases": {"attention_bias": True, "mlp_bias": True, "attention_output_bias": True},
    "norms of queries and keys": {"qk_norm": True, "activation": "gelu_tanh"},
    "norms around": {"norm": "rmsnorm_offset", "norm_placement": "around"},
    "norms after": {"norm_placement": "after", "activation": "relu"},
    "learned positions": {"positions": "learned"},
    "a window that hides nothing": {"attention_window": 40},
    "two kinds of angles": {
        "attention_window": 40,
        "window_layers": [0],
        "window_rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "routed": {
        "mechanisms": [
            {"name": "mixture_of_depths", "layers": ":", "decision": "threshold", "weight": "raw", "router": "mlp"},
            {"name": "token_selective", "layers": "1:"},
        ],
        "activation": {"name": "polyglu"},
    },
    "routed after norms": {
        "mechanisms": [{"name": "early_exit"}, {"name": "mixture_of_depths", "on": "mlp", "decision": "threshold"}],
        "activation": {"name": "fixed_mix", "groups": {"silu": 0.5, "relu": 0.25, "gelu": 0.25}},
        "norm_placement": "around",
    },
}
CALLS = (9, 1, 1, 4, 2, 1, 8, 3)


def model(**options: Any) -> SkipstoneForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 61}
    return SkipstoneForCausalLM(SkipstoneConfig(**{"initializer_range": 0.1, **sizes, **options})).eval()


def ids() -> torch.Tensor:
    return torch.randint(0, 61, (1, sum(CALLS)), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tokens of the compiled calls."""
    found: list[int] = []
    run = decode_stack.run

    def counting(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        found.append(x.shape[1])
        return run(x, *rest)

    monkeypatch.setattr(decode_stack, "run", counting)
    return found


@torch.no_grad()
def logits(given: SkipstoneForCausalLM, change: Callable[[int], None] = lambda call: None) -> torch.Tensor:
    cache, found, at = DynamicCache(config=given.config), [], 0
    for i, count in enumerate(CALLS):
        change(i)
        found.append(given(ids()[:, at : at + count], past_key_values=cache, use_cache=True).logits)
        at += count
    return torch.cat(found, 1)


def general(given: SkipstoneForCausalLM, monkeypatch: pytest.MonkeyPatch, **more: Any) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(decode_stack, "MOST_TOKENS", 0)
        return logits(given, **more)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_it_equals_the_blocks(name: str, rounded: bool, counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    given = quantise(model(**OPTIONS[name])) if rounded else model(**OPTIONS[name])
    want = general(given, monkeypatch)
    assert not counted
    got = logits(given)
    assert counted == list(CALLS[1:])
    # int8: a sum that differs in its last bit may round a token to the next integer
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-3 if rounded else 1e-4)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(("threads", "name"), [(2, "norms around"), (3, "norms around"), (2, "routed"), (3, "routed")])
def test_several_threads_share_it(threads: int, name: str, rounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = model(num_key_value_heads=2, **OPTIONS[name])
    given = quantise(given) if rounded else given
    alone = logits(given)
    native, asked = decode_stack._native(), []
    share = native.share
    monkeypatch.setattr(native, "threads", lambda: threads)
    monkeypatch.setattr(native, "share", lambda run, given, parts: asked.append(parts) or share(run, given, parts))
    monkeypatch.setattr(decode_stack, "EACH", 1 << 10)
    torch.testing.assert_close(logits(given), alone, rtol=1e-4, atol=2e-3 if rounded else 1e-4)
    assert set(asked) == {threads}


def test_a_small_model_stays_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skipstone.ops.workers")
    native, asked = decode_stack._native(), []
    share = native.share
    monkeypatch.setattr(native, "threads", lambda: 64)
    monkeypatch.setattr(native, "share", lambda run, given, parts: asked.append(parts) or share(run, given, parts))
    logits(model())
    assert set(asked) == {1}


def test_what_changes_between_steps_is_seen(counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook, another weight, another module and another dtype, each in the middle of a text."""
    given, other = model(), model()

    def hook(call: int) -> None:
        if call == 3:
            handles.append(given.model.layers[1].mlp.register_forward_hook(lambda *a: (a[2][0] * 2, {})))

    def weight(call: int) -> None:
        if call == 3:
            given.model.layers[1].mlp.up_proj.weight = other.model.layers[1].mlp.up_proj.weight

    def module(call: int) -> None:
        if call == 4:
            given.model.layers[0].self_attn.o_proj = torch.nn.Identity()

    for change in (hook, weight, module):
        handles: list[Any] = []
        before, kept = logits(given), copy.deepcopy(given)
        got = logits(given, change=change)
        for handle in handles:
            handle.remove()
        given = kept
        handles = []
        want = general(given, monkeypatch, change=change)
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(got, before, rtol=1e-3, atol=1e-3)
    assert 1 in counted


@torch.no_grad()
def test_a_weight_with_another_memory_is_read_from_the_next_text_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given = quantise(model())
    before = logits(given)
    weight = given.model.layers[1].mlp.down_proj.weight
    weight.data = torch.zeros_like(weight.data)
    got = logits(given)
    assert not torch.allclose(got, before, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got, general(given, monkeypatch), rtol=1e-4, atol=2e-3)


@torch.no_grad()
def test_copies_and_files_do_not_carry_addresses(counted: list[int]) -> None:
    given = quantise(model())
    before = logits(given)
    twin = copy.deepcopy(given)
    for x in given.parameters():
        x.zero_()
    torch.testing.assert_close(logits(twin), before)
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    read = torch.load(file, weights_only=False)
    counted.clear()
    torch.testing.assert_close(logits(read), before)
    assert counted == [*CALLS[1:]]


@pytest.mark.parametrize(
    "options",
    [
        {"mechanisms": [{"name": "gate_skip", "layers": ":"}]},
        {"activation": {"name": "polyglu", "context": "chunk"}},
        {"norm": "layernorm"},
        {"mlp": "plain"},
        {"attention_window": 4},
        {"attention_soft_cap": 20.0},
        {"parallel_residual": True},
        {"residual_scale": 0.5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ],
)
def test_other_blocks_go_one_by_one(options: dict[str, Any], counted: list[int]) -> None:
    logits(model(**options))
    assert not counted


def test_gradients_training_and_several_rows_go_one_by_one(counted: list[int]) -> None:
    given = model()
    cache = DynamicCache(config=given.config)
    given(ids()[:, :4], past_key_values=cache, use_cache=True)
    assert given(ids()[:, 4:5], past_key_values=cache, use_cache=True).logits.requires_grad
    with torch.no_grad():
        cache = DynamicCache(config=given.config)
        for at in (0, 4):
            given(ids()[:, at : at + 4].expand(2, -1), past_key_values=cache, use_cache=True)
    assert not counted


def test_what_decides_is_read_in_every_step(counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A threshold, an option and a capacity that change in the middle of a text."""
    gates = [{"name": "mixture_of_depths", "layers": "1:"}, {"name": "token_selective", "layers": ":"}]

    def changed(call: int) -> None:
        mod = given.model.layers[1].mechanisms["mixture_of_depths"]
        if call == 2:
            mod.score_threshold().set(-9.0)
        elif call == 3:
            given.change_mechanism(1, threshold=0.2)
        elif call == 4:
            given.change_mechanism(1, execution="soft")
        elif call == 5:
            mod.set_capacity(1.0)

    start = given = model(mechanisms=gates)
    unchanged = logits(given)
    given = copy.deepcopy(start)
    counted.clear()
    got = logits(given, change=changed)
    assert counted == list(CALLS[1:])
    given = copy.deepcopy(start)
    torch.testing.assert_close(got, general(given, monkeypatch, change=changed), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, unchanged, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("what", ["decide", "_alone"])
def test_a_mechanism_that_computes_something_else_is_called(what: str, counted: list[int]) -> None:
    """A subclass, or a replaced method: neither may be taken for what its class has declared."""

    class Other(MixtureOfDepths):
        pass

    given = model(mechanisms=[{"name": "mixture_of_depths", "layers": ":"}])
    setattr(Other, what, getattr(MixtureOfDepths, what))
    given.model.layers[0].mechanisms["mixture_of_depths"].__class__ = Other
    mechanism = given.model.layers[1].mechanisms["mixture_of_depths"]
    setattr(mechanism, what, getattr(mechanism, what))
    logits(given)
    assert not counted


def test_blocks_of_the_general_way_do_not_keep_others_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gates = [{"name": "gate_skip", "layers": [2]}, {"name": "early_exit"}]
    given, ran = model(mechanisms=gates, num_hidden_layers=5), []
    run = decode_stack.run
    monkeypatch.setattr(
        decode_stack, "run", lambda x, program, *rest: ran.append(len(program.table_LC)) or run(x, program, *rest)
    )
    got = logits(given)
    assert ran == [2, 2] * (len(CALLS) - 1)
    torch.testing.assert_close(got, general(given, monkeypatch), rtol=1e-4, atol=1e-4)


def test_int8_weights_lie_next_to_each_other_and_stay_parameters() -> None:
    given = quantise(model())
    names = list(dict(given.named_parameters()))
    before = {name: x.detach().clone() for name, x in given.state_dict().items()}
    logits(given)
    assert list(dict(given.named_parameters())) == names
    assert all(torch.equal(x, before[name]) for name, x in given.state_dict().items())
    weights = [x for block in given.model.layers for x in block.parameters()]
    places = [x.data_ptr() for x in weights]
    assert places == sorted(places)
    assert places[-1] - places[0] < sum(x.numel() * x.element_size() + 64 for x in weights)
    found = [block for block in given.model.layers if compiled_blocks.KNOWN in vars(block)]
    assert found == [given.model.layers[0]]
