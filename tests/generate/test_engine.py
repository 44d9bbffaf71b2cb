"""Law 11: our greedy decoding equals `model.generate` for every mechanism and order; and errors of the engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from models import tiny_model
from skipstone import SkipstoneForCausalLM
from skipstone.generate.engine import generate, stream
from skipstone.mechanisms.decisions import causal_decisions

MOD: dict[str, Any] = {"name": "mixture_of_depths", "layers": "1::2", "capacity": 0.5, "decision": "threshold"}
TSA: dict[str, Any] = {"name": "token_selective", "start_bias": 0.0}
EXIT: dict[str, Any] = {"name": "early_exit", "start_bias": 0.8}
DEPTH = [MOD, TSA, EXIT]
ORDERS = [list(order) for n in range(4) for order in itertools.permutations(DEPTH, n)]
SITES = [[{**mechanism, "on": site}] for mechanism in DEPTH for site in ("attention", "mlp")]
PAD = 0


def tiny(mechanisms: list[dict[str, Any]], activation: str = "silu", **options: Any) -> SkipstoneForCausalLM:
    """A model so far from uniform that argmax is no toss-up and routers disagree."""
    sizes = {"intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"max_position_embeddings": 48, "pad_token_id": PAD}
    return tiny_model(1, **sizes, initializer_range=0.4, activation=activation, mechanisms=mechanisms, **options)


def prompts() -> tuple[Tensor, Tensor]:
    """Three rows, two of them padded on the left."""
    ids = torch.randint(1, 61, (3, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    for row, padding in ((1, 3), (2, 8)):
        mask[row, :padding] = 0
        ids[row, :padding] = PAD
    return ids, mask


def described(mechanisms: list[dict[str, Any]]) -> str:
    return "-".join(m["name"] + m.get("on", "") for m in mechanisms) or "dense"


def compositions() -> Iterator[Any]:
    """Those of two mechanisms, most of three and one site twice are slow: the laws of generation hold their pairs."""
    for i, (activation, mechanisms) in enumerate(itertools.product(("silu", "polyglu"), ORDERS + SITES)):
        again = activation == "polyglu" and len(mechanisms) == 1 and "on" in mechanisms[0]
        slow = again or len(mechanisms) == 2 or (len(mechanisms) == 3 and i % 3)
        marks = pytest.mark.slow if slow else ()
        yield pytest.param(mechanisms, activation, id=f"{described(mechanisms)}-{activation}", marks=marks)


@pytest.mark.parametrize(("mechanisms", "activation"), [*compositions()])
def test_greedy_equals_transformers(mechanisms: list[dict[str, Any]], activation: str) -> None:
    model = tiny(mechanisms, activation)
    ids, mask = prompts()
    for rows in (slice(0, 3), slice(0, 1)):
        expected = model.generate(ids[rows], attention_mask=mask[rows], do_sample=False, max_new_tokens=6)
        assert torch.equal(generate(model, ids[rows], mask[rows], max_new_tokens=6), expected)
    assert torch.equal(generate(model, ids[:1], max_new_tokens=6), expected)


@pytest.mark.parametrize("decision", [d for d in causal_decisions() if d != "ema_threshold"])
def test_every_causal_decision_generates_as_transformers_does(decision: str) -> None:
    model = tiny([{**MOD, "decision": decision}])
    ids, mask = prompts()
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=6)
    assert torch.equal(generate(model, ids, mask, max_new_tokens=6), expected)


def test_a_row_does_not_depend_on_its_batch() -> None:
    model = tiny([TSA, MOD], "polyglu")
    ids, mask = prompts()
    together = generate(model, ids, mask, max_new_tokens=8)
    for row in range(3):
        alone = generate(model, ids[row : row + 1, mask[row].bool()], max_new_tokens=8)
        assert torch.equal(alone[0, -8:], together[row, -8:])


def test_rows_end_by_themselves_and_are_filled_with_pad() -> None:
    model = tiny([MOD])
    ids, mask = prompts()
    free = generate(model, ids, mask, max_new_tokens=8)[:, 9:]
    end = int(free[0, 2])
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8, eos_token_id=end)
    actual = generate(model, ids, mask, max_new_tokens=8, eos_token_id=end)
    assert torch.equal(actual, expected)
    assert actual[0, 12:].tolist() == [PAD] * (actual.shape[1] - 12)
    assert generate(model, ids[:1], max_new_tokens=8, eos_token_id=[end]).shape[1] <= 12


def test_training_mode_generates_the_same() -> None:
    model = tiny([MOD, TSA], "polyglu")
    ids, mask = prompts()
    expected = generate(model, ids, mask, max_new_tokens=6)
    assert torch.equal(generate(model.train(), ids, mask, max_new_tokens=6), expected)
    assert model.training


def test_a_seed_makes_samples_again() -> None:
    model = tiny([MOD])
    ids, mask = prompts()
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 2.0}
    first = generate(model, ids, mask, seed=3, **options)
    state = torch.get_rng_state()
    assert torch.equal(first, generate(model, ids, mask, seed=3, **options))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, generate(model, ids, mask, seed=4, **options))
    greedy = generate(model, ids, mask, max_new_tokens=12)
    assert torch.equal(generate(model, ids, mask, seed=9, top_k=1, **options), greedy)
    assert torch.equal(generate(model, ids, mask, seed=9, max_new_tokens=12, temperature=1e-8), greedy)


@pytest.mark.parametrize("mechanisms", [[MOD], [TSA, MOD], [EXIT]], ids=described)
def test_samples_of_a_seed_are_those_of_transformers(mechanisms: list[dict[str, Any]]) -> None:
    """Every row draws, also where only some rows pass a block."""
    model = tiny(mechanisms, "polyglu")
    ids, mask = prompts()
    torch.manual_seed(3)
    options: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 0}
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=8, **options)
    assert torch.equal(generate(model, ids, mask, max_new_tokens=8, temperature=0.8, seed=3), expected)


def test_top_k_samples_among_the_likeliest() -> None:
    model = tiny([])
    ids, _ = prompts()
    best = model(ids[:1]).logits[0, -1].topk(3).indices
    drawn = {
        int(generate(model, ids[:1], max_new_tokens=1, temperature=9.0, top_k=3, seed=s)[0, -1]) for s in range(40)
    }
    assert drawn == set(best.tolist())


@pytest.mark.parametrize("mechanisms", [[], [MOD], [TSA], [MOD, TSA], [{**MOD, "on": "mlp"}]], ids=described)
def test_compute_is_the_share_of_block_work(mechanisms: list[dict[str, Any]]) -> None:
    """A count by hand: this config's matrices, and the tokens kept when the same pass runs by itself."""
    model = tiny(mechanisms, "polyglu")
    ids, _ = prompts()
    kv, qo, mlp = 2 * 32 * 16, 2 * 32 * 32, 3 * 32 * 48
    steps = list(stream(model, ids[:1], max_new_tokens=5))
    row = torch.cat([ids[:1], *(s.token_B[:, None] for s in steps)], dim=1)
    records = model(row, routing="causal", output_records=True).records
    for n, step in enumerate(steps):
        work = 0
        for decided in records:
            mod = next((bool(r.kept_BT[0, 8 + n]) for name, r in decided.items() if name.startswith("mix")), True)
            tsa = bool(decided["token_selective"].kept_BT[0, 8 + n]) if "token_selective" in decided else True
            if "mixture_of_depths_on_mlp" in decided:
                work += kv + qo + mod * mlp
            else:
                work += mod * (kv + tsa * (qo + mlp))
        assert float(step.compute_B[0]) == pytest.approx(work / (4 * (kv + qo + mlp)))
    shares = {round(float(s.compute_B[0]), 4) for s in steps}
    assert shares == {1.0} if not mechanisms else min(shares) < 1


def refusals() -> list[tuple[dict[str, Any], str]]:
    ids, mask = prompts()
    return [
        ({"input_ids": ids, "max_new_tokens": 40}, "prompt of 9 tokens and 40 new tokens exceed .* context of 48"),
        ({"input_ids": ids[:, :0], "max_new_tokens": 4}, r"at least one row and one token, got shape \[3, 0\]"),
        ({"input_ids": ids, "attention_mask": torch.zeros_like(mask), "max_new_tokens": 4}, "the prompt is empty"),
        ({"input_ids": ids, "attention_mask": mask.flip(1), "max_new_tokens": 4}, "padded on the right"),
        ({"input_ids": ids, "attention_mask": mask[:, 1:], "max_new_tokens": 4}, "same shape"),
        ({"input_ids": ids, "max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"input_ids": ids, "max_new_tokens": 4, "temperature": -1.0}, "temperature must be 0"),
        ({"input_ids": ids, "max_new_tokens": 4, "top_k": 0}, "top_k must be at least 1, got 0"),
    ]


@pytest.mark.parametrize(("arguments", "message"), refusals())
def test_wrong_input_is_one_clear_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        stream(tiny([]), **arguments)  # on the call, not at the first step
    assert "\n" not in str(caught.value)


def test_top_k_routing_is_refused_by_name() -> None:
    ids, _ = prompts()
    with pytest.raises(ValueError, match=r"decision 'topk' .* cannot be made while generating"):
        stream(tiny([{**MOD, "decision": "topk"}]), ids, max_new_tokens=4)


def test_a_threshold_that_was_never_trained_warns() -> None:
    ids, _ = prompts()
    with pytest.warns(UserWarning, match="ema_threshold was never advanced"):
        stream(tiny([{**MOD, "decision": "ema_threshold"}]), ids, max_new_tokens=1)
