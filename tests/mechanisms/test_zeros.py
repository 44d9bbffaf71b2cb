"""Neurons at zero: the output is that of the whole MLP, and what is 0 is not multiplied in decoding one row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from models import tiny_model
from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.measure.flops import count_flops
from skipstone.mechanisms.zeros import ZeroNeuronsConfig
from skipstone.model.cost import kept_from_records
from skipstone.model.pretrained import load_pretrained
from skipstone.ops import magnitude

MIX = {"name": "fixed_mix", "groups": {"relu": 0.75, "silu": 0.25}}


def model(activation: Any = "relu", groups: Any = "zeros", **options: Any) -> SkipstoneForCausalLM:
    sizes = {"vocab_size": 64, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    wanted = {"neuron_groups": {"decision": groups}} if groups else {}
    return tiny_model(**sizes, pad_token_id=0, initializer_range=0.2, activation=activation, **wanted, **options)


def ids(count: int) -> torch.Tensor:
    return torch.arange(count)[None] * 7 % 60 + 3


@torch.no_grad()
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("activation", ["relu", MIX])
def test_decoding_equals_the_whole_mlp_and_multiplies_what_is_on(
    activation: Any, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native:
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(magnitude, "_kernels", lambda: None)
    ours, whole = model(activation), model(activation, groups=None)
    whole.load_state_dict(ours.state_dict())
    caches = [DynamicCache(config=built.config) for built in (ours, whole)]
    for begin, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
        given = ids(9)[:, begin:end]
        found: list[Any] = []
        count = count_flops(
            lambda given=given, found=found: found.append(  # type: ignore[misc]
                ours(given, past_key_values=caches[0], output_records=True)
            )
        )
        assert torch.allclose(found[0].logits, whole(given, past_key_values=caches[1]).logits, atol=1e-5)
        records = found[0].records
        on = [int(layer["neuron_groups"].kept_BTG.sum()) for layer in records]
        kept = kept_from_records(ours, records)
        assert count.total == ours.cost(end - begin, past=begin, kept=kept).forward.total
        if end - begin == 1:
            saved = sum(2 * (48 - n) * 2 * 32 for n in on)
            assert 0 < saved == whole.cost(1, past=begin).forward.total - count.total


@torch.no_grad()
def test_a_token_without_any_neuron(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = model()
    for block in ours.model.layers:
        block.mlp.gate_proj.weight.zero_()
    for native in (True, False):
        if not native:
            monkeypatch.setattr(magnitude, "_kernels", lambda: None)
        cache = DynamicCache(config=ours.config)
        ours(ids(3), past_key_values=cache)
        out = ours(ids(4)[:, 3:], past_key_values=cache, output_records=True)
        assert out.logits.isfinite().all()
        assert not any(layer["neuron_groups"].kept_BTG.any() for layer in out.records)


@torch.no_grad()
def test_what_is_not_a_number_is_not_hidden() -> None:
    ours = model()
    ours.model.layers[1].mlp.gate_proj.weight[5].fill_(float("nan"))
    cache = DynamicCache(config=ours.config)
    ours(ids(3), past_key_values=cache)
    assert ours(ids(4)[:, 3:], past_key_values=cache).logits.isnan().all()


def test_gradients_are_those_of_the_whole_mlp() -> None:
    ours, whole = model().train(), model(groups=None).train()
    for built in (ours, whole):
        built(ids(12), labels=ids(12)).loss.backward()
    for (name, found), wanted in zip(ours.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(found.grad, wanted.grad), name  # type: ignore[arg-type]


def test_the_price_is_the_mean_magnitude_of_the_activations() -> None:
    priced, plain = model().train(), model().train()
    priced.load_state_dict(plain.state_dict())
    for block in priced.model.layers:
        block.mlp.router.config = ZeroNeuronsConfig(price=0.5)
    seen: list[torch.Tensor] = []
    for block in priced.model.layers:
        block.mlp.activation.register_forward_hook(lambda module, given, out: seen.append(out[0]))
    losses = [built(ids(12), labels=ids(12)).loss.item() for built in (priced, plain)]
    predicting = [0.5 * a[0, :-1].abs().mean().item() for a in seen]  # the last token predicts nothing
    assert losses[0] - losses[1] == pytest.approx(sum(predicting), rel=1e-4)


def test_any_model_with_relu_is_loaded_with_it(tmp_path: Any) -> None:
    whole = model(groups=None)
    whole.save_pretrained(tmp_path)
    ours = SkipstoneForCausalLM.from_pretrained(tmp_path, neuron_groups={"decision": "zeros"}).eval()
    assert not [name for name in ours.state_dict() if "typical" in name]
    assert torch.allclose(ours(ids(9)).logits, whole(ids(9)).logits, atol=1e-6)
    ours.save_pretrained(tmp_path / "again")
    assert load_pretrained(tmp_path / "again").config.neuron_groups == {"decision": "zeros"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"activation": "silu"}, "needs an activation that is exactly 0 for some inputs, relu or a fixed_mix.*'silu'"),
        ({"activation": {"name": "polyglu"}}, "got 'polyglu'"),
        ({"activation": {"name": "fixed_mix", "groups": {"silu": 1.0}}}, "got 'fixed_mix'"),
        ({"neuron_groups": {"decision": "zeros", "price": -1.0}}, "price must not be negative, got -1.0"),
        ({"neuron_groups": {"decision": "zeros", "capacity": 0.5}}, "capacity is read with decision .* alone"),
        ({"activation": MIX, "neuron_groups": {"capacity": 0.5, "group_size": 8}}, "decision 'zeros' can"),
    ],
)
def test_what_cannot_be_is_one_line(options: dict[str, Any], says: str) -> None:
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    with pytest.raises(ValueError, match=says):
        SkipstoneConfig(**{**shape, "neuron_groups": {"decision": "zeros"}, "activation": "relu", **options})
