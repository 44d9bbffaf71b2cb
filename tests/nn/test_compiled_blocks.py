"""The compiled call for all blocks equals the blocks one after the other, and is left where it would not.

`tests/laws/test_compiled_steps.py` compares it for every mechanism.
"""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

from models import tiny_model
from skipstone import SkipstoneForCausalLM
from skipstone.mechanisms import MixtureOfDepths
from skipstone.model.quantise import quantise
from skipstone.nn import compiled_blocks
from skipstone.nn.mlp import FixedActivation
from skipstone.ops import decode_stack

pytest.importorskip("numba")

OPTIONS: dict[str, dict[str, Any]] = {
    "grouped heads": {"num_key_value_heads": 2},
    "biases": {"attention_bias": True, "mlp_bias": True, "attention_output_bias": True},
    "norms of queries and keys": {"qk_norm": True, "activation": "gelu_tanh"},
    "norms around": {"norm": "rmsnorm_offset", "norm_placement": "around"},
    "norms after": {"norm_placement": "after", "activation": "relu"},
    "learned positions": {"positions": "learned"},
    "a window that hides nothing": {"attention_window": 60},
    "a window that hides keys": {"attention_window": 7, "window_layers": [1]},
    "keys and values in 16 bits": {"qk_norm": True, "cache_format": "float16"},
    "two kinds of angles": {
        "attention_window": 60,
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
    "zeros": {"activation": "relu", "neuron_groups": {"decision": "zeros"}},
    "zeros of a mix, routed": {
        "mechanisms": [{"name": "mixture_of_depths", "on": "mlp", "decision": "threshold"}, {"name": "early_exit"}],
        "activation": {"name": "fixed_mix", "groups": {"silu": 0.25, "relu": 0.75}},
        "neuron_groups": {"decision": "zeros", "price": 0.1},
        "norm_placement": "around",
    },
    "by magnitude": {"neuron_groups": {"decision": "magnitude", "group_size": 1, "capacity": 0.5}},
    "by magnitude, twice": {
        "activation": {"name": "polyglu"},
        "neuron_groups": {"decision": "magnitude", "group_size": 4, "capacity": 0.6, "down_capacity": 0.3},
    },
}
CALLS = (17, 1, 1, 4, 2, 1, 8, 3, 13)
BITS = (32, 16, 8, 4)


def model(**options: Any) -> SkipstoneForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "initializer_range": 0.1}
    return tiny_model(None, **{**sizes, **options})


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


def with_bits(cases: list[tuple[Any, ...]]) -> list[Any]:
    """Return every case with every number of bits; each case is quick with one number, and each number in its turn."""
    return [
        pytest.param(*case, bits, marks=() if i % len(BITS) == j else pytest.mark.slow)
        for i, case in enumerate(cases)
        for j, bits in enumerate(BITS)
    ]


@pytest.mark.parametrize(("name", "bits"), with_bits([(name,) for name in OPTIONS]))
def test_it_equals_the_blocks(name: str, bits: int, counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    given = model(**OPTIONS[name]) if bits == 32 else quantise(model(**OPTIONS[name]), bits)
    want = general(given, monkeypatch)
    assert not counted
    got = logits(given)
    assert counted == list(CALLS[1:])
    # int8 and int4: a sum that differs in its last bit may round a token to the next integer
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 if bits >= 16 else 2e-3)


NEURONS = [(3, "keys and values in 16 bits"), (2, "zeros"), (3, "zeros of a mix, routed"), (3, "by magnitude, twice")]


@pytest.mark.parametrize(
    ("threads", "name", "bits"),
    with_bits([(2, "norms around"), (3, "norms around"), (2, "routed"), (3, "routed"), *NEURONS]),
)
def test_several_threads_share_it(threads: int, name: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = model(num_key_value_heads=2, **OPTIONS[name])
    given = given if bits == 32 else quantise(given, bits)
    alone = logits(given)
    native, asked = decode_stack._native(), []
    share = native.share
    monkeypatch.setattr(native, "threads", lambda: threads)
    monkeypatch.setattr(native, "share", lambda run, given, parts: asked.append(parts) or share(run, given, parts))
    monkeypatch.setattr(decode_stack, "EACH", 1 << 10)
    torch.testing.assert_close(logits(given), alone, rtol=1e-4, atol=1e-4 if bits >= 16 else 2e-3)
    assert set(asked) == {threads}


def test_a_small_model_stays_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skipstone.ops.workers")
    native, asked = decode_stack._native(), []
    share = native.share
    monkeypatch.setattr(native, "threads", lambda: 64)
    monkeypatch.setattr(native, "share", lambda run, given, parts: asked.append(parts) or share(run, given, parts))
    logits(model())
    assert set(asked) == {1}


def _halved(module: Any, given: Any, output: Any) -> Any:
    return (output[0] / 2, *output[1:]) if isinstance(output, tuple) else output / 2


def _around(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given, **named: _halved(None, given, call(*given, **named))


def _twice(x: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full_like(x, 2), requires_grad=False)


def _mlp(given: SkipstoneForCausalLM) -> Any:
    return given.model.layers[1].mlp


def _attention(given: SkipstoneForCausalLM) -> Any:
    return given.model.layers[0].self_attn


CHANGES: dict[str, Callable[[SkipstoneForCausalLM], Any]] = {
    "a hook": lambda given: _mlp(given).register_forward_hook(_halved),
    "a hook on a projection": lambda given: _attention(given).q_proj.register_forward_hook(_halved),
    "a hook on all modules": lambda given: register_module_forward_hook(
        lambda *call: _halved(*call) if call[0] is _mlp(given) else None
    ),
    "another forward": lambda given: setattr(_mlp(given), "forward", _around(_mlp(given).forward)),
    "another weight": lambda given: setattr(_mlp(given).up_proj, "weight", _twice(_mlp(given).up_proj.weight)),
    "a weight with another memory": lambda given: setattr(
        _mlp(given).down_proj.weight, "data", _twice(_mlp(given).down_proj.weight).data
    ),
    "a weight written by others": lambda given: _mlp(given).down_proj.weight.data.fill_(2),
    "another module": lambda given: setattr(_attention(given), "o_proj", torch.nn.Identity()),
    "another norm": lambda given: setattr(given.model.layers[1], "input_layernorm", torch.nn.Identity()),
    "another block": lambda given: setattr(given.model.layers, "0", copy.deepcopy(given.model.layers[1])),
    "another scale of scores": lambda given: setattr(_attention(given), "scaling", 0.9),
    "another eps": lambda given: setattr(given.model.layers[0].input_layernorm, "eps", 5.0),
    "another activation": lambda given: setattr(_mlp(given), "activation", FixedActivation("relu")),
}


ROUNDED = ("a hook on a projection", "a weight with another memory", "another module")  # quick with int8 weights, too


@pytest.mark.parametrize(
    ("name", "rounded"),
    [
        pytest.param(name, rounded, marks=pytest.mark.slow if rounded and name not in ROUNDED else ())
        for name in CHANGES
        for rounded in (False, True)
    ],
)
@torch.no_grad()
def test_what_changes_between_steps_is_seen(name: str, rounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of the second text, behind one that has noted where the weights lie."""

    def texts(run: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        given, handles = model(), []
        given = quantise(given) if rounded else given
        found = [run(given), run(given, change=lambda i: handles.append(CHANGES[name](given)) if i == 3 else None)]
        for handle in handles:
            if isinstance(handle, RemovableHandle):
                handle.remove()
        return found

    torch.manual_seed(0)
    before, got = texts(logits)
    torch.manual_seed(0)
    want = texts(lambda given, **more: general(given, monkeypatch, **more))[1]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=5e-3 if rounded else 1e-4)
    assert not torch.allclose(got, before, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_weights_lent_for_a_call_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    given = model()
    lent = {name: _twice(x).data for name, x in given.named_parameters() if "1.mlp.down_proj" in name}
    call, calls = given.forward, iter(range(100))

    def alternating(*args: Any, **named: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(given, "forward", call)
            return functional_call(given, lent, args, named) if next(calls) % 2 else call(*args, **named)

    monkeypatch.setattr(given, "forward", alternating)
    got = logits(given)
    calls = iter(range(100))
    torch.testing.assert_close(got, general(given, monkeypatch), rtol=1e-4, atol=1e-4)


def test_training_in_between_leaves_it_compiled(counted: list[int]) -> None:
    given = model()
    before = logits(given)
    assert not counted.clear()
    logits(given.train())
    assert not counted
    torch.testing.assert_close(logits(given.eval()), before)
    assert counted == [*CALLS[1:]]


def test_threads_that_begin_together_note_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given, noted = quantise(model()), []
    alone = logits(copy.deepcopy(given))
    settle = compiled_blocks.CompiledBlocks._settle

    def slowly(stack: Any, *weights: Any) -> bool:
        noted.append(stack)
        time.sleep(0.05)  # lets the other threads in
        return settle(stack, *weights)

    monkeypatch.setattr(compiled_blocks.CompiledBlocks, "_settle", slowly)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda i: logits(given), range(4)):
            torch.testing.assert_close(got, alone, rtol=0, atol=0)
    assert len(noted) == 1


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_copies_and_files_do_not_carry_addresses(bits: int, counted: list[int]) -> None:
    given = quantise(model(), bits)
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
        {"attention_soft_cap": 20.0},
        {"parallel_residual": True},
        {"residual_scale": 0.5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ],
)
def test_other_blocks_go_one_by_one(options: dict[str, Any], counted: list[int]) -> None:
    logits(model(**options))
    assert not counted


def test_gradients_and_several_tokens_of_several_rows_go_one_by_one(counted: list[int]) -> None:
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
