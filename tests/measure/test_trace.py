"""Traces agree with the model's own records."""

from __future__ import annotations

import json

import pytest
import torch

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.measure.token_trace import CATEGORIES, TokenTrace
from skipstone.measure.trace import category_of, trace_tokens
from skipstone.report.token_picture import coloured, visible

IDS = torch.arange(12).view(2, 6)


def model(*mechanisms: dict[str, object], **options: object) -> SkipstoneForCausalLM:
    config = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **options}
    return SkipstoneForCausalLM(SkipstoneConfig.from_plain({**config, "mechanisms": list(mechanisms)}))


def seen(routed: SkipstoneForCausalLM, **options: torch.Tensor) -> TokenTrace:
    return trace_tokens(routed, {"input_ids": IDS}, list("abcdef"), **options)  # type: ignore[arg-type]


def test_a_dense_model_does_everything_for_everyone() -> None:
    trace = seen(model())
    assert trace.depth == 1.0
    assert trace.weight_LT == [[1.0] * 6] * 2
    assert (trace.routed, trace.capacity, trace.activations) == (frozenset(), {}, {})


def test_skipped_tokens_weigh_nothing() -> None:
    mod = {"name": "mixture_of_depths", "layers": [1], "capacity": 0.5, "decision": "positional", "weight": "sigmoid"}
    trace = seen(model(mod))
    assert trace.routed == {1}
    assert trace.capacity == {1: {"mixture_of_depths": 0.5}}
    assert [weight > 0 for weight in trace.weight_LT[1]] == trace.kept_LT[1]
    assert trace.depth == pytest.approx(0.75)
    assert 0 < trace.strongest < 1


def test_a_mechanism_on_the_mlp_counts_for_half_a_block() -> None:
    mod = {"name": "mixture_of_depths", "layers": [0], "on": "mlp", "capacity": 0.5, "decision": "positional"}
    trace = seen(model(mod))
    assert trace.depth == pytest.approx(1 - 0.5 / 4)
    assert all(trace.kept_LT[0]), "attention is computed for every token"


def test_decisions_that_need_the_row_are_made_with_it() -> None:
    trace = seen(model({"name": "mixture_of_depths", "layers": [1], "capacity": 0.5, "decision": "topk"}))
    assert trace.routing == "oracle"
    assert trace.capacity[1]["mixture_of_depths"] == 0.5


def test_imposed_decisions_are_shown_as_imposed() -> None:
    forced = model({"name": "mixture_of_depths", "layers": [1], "decision": "forced"})
    with pytest.raises(ValueError, match="forced"):
        seen(forced)
    known_BT = torch.tensor([[True, False, True, False, False, False]] * 2)
    trace = seen(forced, known_BT=known_BT)
    assert trace.routing == "forced"
    assert trace.kept_LT[1] == known_BT[0].tolist()


def test_shares_of_activations_sum_to_one_and_start_undecided() -> None:
    trace = seen(model(activation={"name": "polyglu"}))
    assert set(trace.activations) == {0, 1}
    for activations in trace.activations.values():
        assert sum(activations.shares) == pytest.approx(1.0)
        assert activations.entropy == pytest.approx(1.0, abs=1e-3)
        assert activations.by_category == {}, "nobody said what the tokens are"


def test_categories_of_tokens_and_neurons_that_differ() -> None:
    """A router that looks at the token alone and neurons that prefer by themselves: both must show."""
    routed = model(activation={"name": "polyglu", "context": "token"})
    activation = routed.model.layers[0].mlp.activation
    with torch.no_grad():
        activation.context_weight.normal_(0, 3)
        activation.mix_weight.normal_(0, 3)
        activation.preference_bias[:5, 1] = 1e4
        activation.preference_bias[5:, 3] = 1e4
    category_BT = (IDS >= 6).long()  # the first row is all letters, the second one all digits
    first, second = seen(routed, category_BT=category_BT).activations.values()
    assert first.strongest == [1] * 5 + [3] * (len(first.strongest) - 5)
    assert list(second.by_category) == ["letters", "digits"]
    mean = torch.tensor(list(second.by_category.values())).mean(0)
    assert mean.tolist() == pytest.approx(second.shares, abs=1e-6), "both rows have as many tokens"
    assert first.shift("letters") < 1e-3, "no context outweighs such preferences"
    assert second.shift("letters") == pytest.approx(second.shift("digits"), abs=1e-6)


@pytest.mark.parametrize(
    ("token", "category"),
    [(" the", "letters"), ("x1", "letters"), ("42", "digits"), ("=", "signs"), ("\n ", "white space")],
)
def test_categories(token: str, category: str) -> None:
    assert CATEGORIES[category_of(token)] == category


def test_padding_does_not_count() -> None:
    mask_BT = torch.tensor([[1] * 6, [1] * 2 + [0] * 4])
    mod = {"name": "mixture_of_depths", "layers": [1], "capacity": 0.5, "decision": "positional"}
    trace = trace_tokens(model(mod), {"input_ids": IDS, "attention_mask": mask_BT}, list("abcdef"))
    assert trace.capacity[1]["mixture_of_depths"] == 0.5
    assert trace.depth == pytest.approx(0.75)


def test_plain_values_come_back() -> None:
    mod = {"name": "mixture_of_depths", "layers": [1], "capacity": 0.5, "decision": "positional"}
    trace = seen(model(mod, activation="polyglu"), category_BT=torch.zeros(2, 6, dtype=torch.int64))
    assert set(trace.activations) == {0, 1}
    assert TokenTrace.from_dict(json.loads(json.dumps(trace.to_dict()))) == trace


def test_white_space_and_control_characters_are_made_visible() -> None:
    assert visible(" \n\t\x1b\x00a") == "·↵⇥��a"


def test_coloured_text_is_escaped_and_keeps_its_lines() -> None:
    html = coloured([("<a>\n", 0.5), ("\x00", 2.0)])
    assert "&lt;a&gt;\n" in html
    assert "\x00" not in html
    assert "--depth-share: 0.5" in html
    assert "--depth-share: 1" in html
