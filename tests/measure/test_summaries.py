"""Summaries of records agree with numbers counted by hand on small examples."""

from __future__ import annotations

import math

import pytest
import torch

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.core.records import ActivationRecord, DepthRecord
from skipstone.measure.losses import OVERALL, Accuracy
from skipstone.measure.summaries import PrecisionRecall, Summaries


def model(activation: str = "silu") -> SkipstoneForCausalLM:
    config = SkipstoneConfig(
        vocab_size=9,
        hidden_size=16,
        num_hidden_layers=1,
        activation=activation,
        mechanisms=[{"name": "mixture_of_depths", "layers": ":"}],
    )
    return SkipstoneForCausalLM(config)


def depth(kept: list[list[int]], asked: list[list[int]], weight: float) -> DepthRecord:
    kept_BT, reached_BT = torch.tensor(kept).bool(), torch.tensor(asked).bool()
    return DepthRecord(torch.zeros(kept_BT.shape), kept_BT, kept_BT * weight, reached_BT)


ROW = torch.ones(1, 16)


def test_depth_by_hand() -> None:
    statistics = Summaries(model())
    statistics.add([{"mixture_of_depths": depth([[1, 0, 1, 0], [0, 0, 0, 0]], [[1, 1, 1, 1], [1, 1, 0, 0]], 0.5)}])
    statistics.add([{"mixture_of_depths": depth([[1, 1, 1], [0, 0, 0]], [[1, 1, 1], [0, 0, 0]], 2.0)}])
    statistics.add([{}])  # nobody reached it
    assert statistics.layers() == [
        {
            "mixture_of_depths": {
                "capacity": 5 / 9,
                "capacity_p99": 1.0,
                "weight": pytest.approx((2 * 0.5 + 3 * 2) / 5),
                "precision": 0.0,
                "recall": None,  # an eighth of so few tokens is none
                "f1": 0.0,
            }
        }
    ]


def test_nobody_asked_is_no_capacity_of_zero() -> None:
    statistics = Summaries(model())
    statistics.add([{"mixture_of_depths": depth([[0]], [[0]], 1.0)}])
    assert set(statistics.layers()[0]["mixture_of_depths"].values()) == {None}


def test_activations_leave_out_tokens_that_were_not_asked() -> None:
    built = model("polyglu")
    polyglu = built.model.layers[0].mlp.activation
    with torch.no_grad():
        polyglu.preference_bias.zero_()
    logits = torch.tensor([[[0.0, 0, 0, math.log(3)], [math.nan] * 4]])
    statistics = Summaries(built)
    statistics.add([{"polyglu": ActivationRecord(logits, torch.tensor([[True, False]]))}])
    statistics.add([{"polyglu": ActivationRecord(torch.zeros(1, 1, 4), torch.ones(1, 1, dtype=torch.bool))}])
    found = statistics.layers()[0]["polyglu"]
    assert list(found["shares"].values()) == pytest.approx([(1 / 6 + 1 / 4) / 2] * 3 + [(1 / 2 + 1 / 4) / 2])
    entropy = -(3 / 6 * math.log(1 / 6) + 1 / 2 * math.log(1 / 2)) / math.log(4)
    assert found["entropy"] == pytest.approx((entropy + 1) / 2)
    assert found["dynamic_entropy"] == pytest.approx((entropy + 1) / 2 * math.log(4))
    assert found["static_entropy"] == pytest.approx(math.log(4))


def test_neurons_are_counted_by_their_strongest_activation() -> None:
    built = model("polyglu")
    preference_FA = built.model.layers[0].mlp.activation.preference_bias.data
    preference_FA.zero_()
    preference_FA[:3, 1] = 5.0
    statistics, logits = Summaries(built), torch.tensor([[[1.0, 0, 0, 0], [9, 0, 0, 0]]])
    statistics.add([{"polyglu": ActivationRecord(logits, torch.tensor([[True, True]]))}])
    found, minority = statistics.layers()[0]["polyglu"], 3 / len(preference_FA)
    assert list(found["neurons"].values()) == pytest.approx([1 - minority / 2, minority / 2, 0, 0])
    assert found["diversity"] == pytest.approx(minority / 2)


def test_a_context_shared_by_the_row_counts_for_each_of_its_tokens() -> None:
    built = model("polyglu")
    once, each = Summaries(built), Summaries(built)
    logits, asked = torch.randn(2, 1, 4), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    once.add([{"polyglu": ActivationRecord(logits, asked)}])
    each.add([{"polyglu": ActivationRecord(logits.expand(2, 3, 4), asked)}])
    assert once.layers() == each.layers()
    few = Summaries(built, activation_rows=1)
    few.add([{"polyglu": ActivationRecord(logits, asked)}])
    assert few.layers() != once.layers()
    assert Summaries(built, activation_rows=0).layers() == [{}]


def test_accuracy_counts_operations_only() -> None:
    accuracy = Accuracy()
    logits = torch.eye(5)[torch.tensor([[1, 2, 3, 4]])]
    accuracy.add(logits, torch.tensor([[1, 2, 0, 0]]), torch.tensor([[-1, 2, 5, 20]]))
    accuracy.add(logits, torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0, 3, -1, 5]]))
    found = accuracy.by_bin()
    assert (found["0-3"], found["4-7"], found["16+"], found[OVERALL]) == (1.0, 0.5, 0.0, 4 / 6)
    assert math.isnan(found["8-15"])


def test_agreement_counts_only_the_asked() -> None:
    agreement = PrecisionRecall()
    kept, wanted, asked = (
        torch.tensor([row], dtype=torch.bool) for row in ([1, 1, 0, 0, 1], [1, 0, 1, 0, 1], [1] * 4 + [0])
    )
    agreement.add(kept, wanted, asked)
    assert agreement.result() == {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert PrecisionRecall().result() == {"precision": None, "recall": None, "f1": None}


def test_the_kept_are_judged_by_the_scores_or_by_what_is_known() -> None:
    record = DepthRecord(
        torch.tensor([[3.0, 2.0, 1.0, 0.0] * 4]), torch.tensor([[True, False] * 8]), torch.ones(1, 16), ROW.bool()
    )
    by_scores, known = Summaries(model()), Summaries(model())
    by_scores.add([{"mixture_of_depths": record}])  # two of sixteen at capacity .125: the first two threes
    known.add([{"mixture_of_depths": record}], torch.tensor([[False, True] * 8]))
    assert by_scores.layers()[0]["mixture_of_depths"]["recall"] == 1.0
    assert by_scores.layers()[0]["mixture_of_depths"]["precision"] == 2 / 8
    assert known.layers()[0]["mixture_of_depths"]["f1"] == 0.0
