"""A mixture of experts as the MLP: computed tokens, their weights, and auxiliary losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from skipstone.core.records import ExpertsRecord
from skipstone.core.tokens import Tokens
from skipstone.measure.flops import count_flops, count_host_syncs
from skipstone.nn.experts import ExpertsMLP
from skipstone.nn.mlp import FixedActivation

B, T, D, F = 2, 9, 16, 24


def part(**options: object) -> ExpertsMLP:
    torch.manual_seed(1)
    built = ExpertsMLP(D, 2 * F, FixedActivation("silu"), **{"count": 4, "top_k": 2, **options})
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(0, 0.4)
    return built


def tokens(real_BT: Tensor | None = None) -> Tokens:
    slot = torch.arange(T)[None]
    return Tokens(slot_BT=slot, position_BT=slot, real_BT=real_BT)


def run(built: ExpertsMLP, x: Tensor, real_BT: Tensor | None = None) -> tuple[Tensor, ExpertsRecord]:
    y, records = built(x, tokens(real_BT))
    assert list(records) == ["experts"]
    return y, records["experts"]


def real() -> Tensor:
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :3], mask[1, 6:] = False, False
    return mask


def test_equals_mixtral() -> None:
    """Renormalised top-k of a softmax is what transformers' Mixtral computes from the same weights."""
    config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    built, theirs, x = part(), MixtralSparseMoeBlock(config), torch.randn(B, T, D)
    theirs.load_state_dict(
        {
            "gate.weight": built.router.weight,
            "experts.gate_up_proj": torch.cat((built.gate_proj, built.up_proj), 1),
            "experts.down_proj": built.down_proj,
        }
    )
    torch.testing.assert_close(run(built, x)[0], theirs(x))


def test_weights_are_the_softmax_itself_unless_renormalised() -> None:
    built, x = part(renormalise=False), torch.randn(B, T, D)
    y, record = run(built, x)
    share = record.logits_BTX.softmax(-1)
    scale = (share * record.chosen_BTX).sum(-1, keepdim=True)
    torch.testing.assert_close(y, run(part(), x)[0] * scale)


def test_a_token_that_chose_no_ops_gets_nothing_and_costs_nothing() -> None:
    built, x = part(no_op=6), torch.randn(B, T, D)
    y, record = run(built, x)
    none = record.chosen_BTX[..., 4:].sum(-1) == 2
    one = record.chosen_BTX[..., 4:].sum(-1) == 1
    assert none.any()
    assert one.any()
    assert (y[none] == 0).all()
    assert (y[one].abs().amax(-1) > 0).all()
    choices = int(record.chosen_BTX[..., :4].sum())
    counted = count_flops(lambda: built(x, tokens()))
    assert counted.unknown == ()
    assert counted.total == 2 * choices * 3 * D * F + built.flops(B * T, "oracle")
    with torch.no_grad():
        built.router.weight.zero_()
        built.router.weight[4:] = 1
    everyone = torch.ones(B, T, D)
    assert (run(built, everyone)[0] == 0).all()
    assert count_flops(lambda: built(everyone, tokens())).total == built.flops(B * T, "oracle")


def test_no_op_shares_its_weight() -> None:
    """Renormalisation counts no-ops in: half a mind to do nothing is half the update."""
    built, x = part(no_op=3), torch.randn(B, T, D)
    y, record = run(built, x)
    share, chosen = record.logits_BTX.softmax(-1), record.chosen_BTX
    b, t = ((chosen[..., 4:].sum(-1) == 1).nonzero())[0].tolist()
    e = int(chosen[b, t, :4].nonzero())
    hidden = torch.nn.functional.silu(built.gate_proj[e] @ x[b, t]) * (built.up_proj[e] @ x[b, t])
    weight = share[b, t, e] / share[b, t][chosen[b, t]].sum()
    assert 0.01 < weight < 0.99
    torch.testing.assert_close(y[b, t], weight * (built.down_proj[e] @ hidden))


@pytest.mark.parametrize("no_op", [0, 2])
def test_padding_is_neither_routed_nor_counted(no_op: int) -> None:
    built, x = part(no_op=no_op, z_weight=0.3), torch.randn(B, T, D)
    y, record = run(built, x, real())
    assert (y[~real()] == 0).all()
    assert not record.chosen_BTX[~real()].any()
    assert record.chosen_BTX[real()].sum(-1).eq(2).all()
    assert record.logits_BTX[~real()].isnan().all()
    other = torch.where(real()[..., None], x, 7 * torch.randn(B, T, D))
    again, same = run(built, other, real())
    assert torch.equal(again, y)
    assert record.loss_BT is not None
    assert torch.equal(same.loss_BT, record.loss_BT)
    assert (record.loss_BT[~real()] == 0).all()
    choices = int(record.chosen_BTX[..., :4].sum())
    assert (
        count_flops(lambda: built(x, tokens(real()))).by_kind["other"] == built.flops(B * T, "") + 6 * choices * D * F
    )


def test_nobody_at_all() -> None:
    built, x = part(balance_rate=0.1), torch.randn(B, T, D, requires_grad=True)
    y, record = run(built, x, torch.zeros(B, T, dtype=torch.bool))
    (y.sum() + record.loss_BT.sum()).backward()
    assert all((p.grad == 0).all() for p in (x, *built.parameters()))
    assert built.statistics(record).isnan().all()


def test_balancing_loss_is_switch_transformers() -> None:
    """alpha N sum f P with one choice (arXiv 2101.03961, equations 4 to 6), over real tokens only."""
    built = part(top_k=1, renormalise=False, balance_weight=0.25)
    record = run(built, torch.randn(B, T, D), real())[1]
    probabilities = record.logits_BTX[real()].softmax(-1)
    f = torch.nn.functional.one_hot(probabilities.argmax(-1), 4).float().mean(0)
    assert record.loss_BT is not None
    torch.testing.assert_close(record.loss_BT[real()].mean(), 0.25 * 4 * (f * probabilities.mean(0)).sum())


def test_balanced_choices_cost_the_weight_itself_and_no_ops_take_part() -> None:
    built = part(count=3, no_op=1, top_k=4, balance_weight=0.25)
    record = run(built, torch.randn(B, T, D))[1]
    assert record.loss_BT is not None
    torch.testing.assert_close(record.loss_BT, torch.full((B, T), 0.25))  # all chosen, so that every f is 1/4


def test_z_loss_and_no_loss() -> None:
    x = torch.randn(B, T, D)
    record = run(part(balance_weight=0.0, z_weight=0.5), x)[1]
    torch.testing.assert_close(record.loss_BT, 0.5 * record.logits_BTX.logsumexp(-1).square())
    assert run(part(balance_weight=0.0), x)[1].loss_BT is None


def test_losses_reach_the_router_and_nothing_else() -> None:
    built = part(z_weight=0.1)
    run(built, torch.randn(B, T, D))[1].loss_BT.sum().backward()  # type: ignore[union-attr]
    assert built.router.weight.grad is not None
    assert built.router.weight.grad.norm() > 0
    assert built.gate_proj.grad is built.down_proj.grad is None


def test_the_bias_moves_choices_but_not_weights() -> None:
    built, x = part(balance_weight=0.0, balance_rate=0.005), torch.randn(64, T, D) + 0.5
    slot = torch.arange(T)[None]
    given = Tokens(slot_BT=slot, position_BT=slot)
    spread = []
    for _ in range(80):
        record = built(x, given)[1]["experts"]
        usage = built.statistics(record)
        assert usage is not None
        torch.testing.assert_close(usage.sum(), torch.tensor(1.0))
        spread.append(float(usage.max() - usage.min()))
        built.advance(0.5, usage)
    assert spread[-1] < 0.3 * spread[0]
    expert, weight = built.choose(record.logits_BTX.softmax(-1))
    share = record.logits_BTX.softmax(-1).gather(-1, expert)
    torch.testing.assert_close(weight, share / share.sum(-1, keepdim=True))
    built.advance(0.5, None)  # nothing was seen
    assert part().router.balance_bias is None


def test_the_host_never_waits() -> None:
    built, x = part(no_op=2), torch.randn(B, T, D)
    assert not count_host_syncs(lambda: built(x, tokens(real()))[0].sum().backward())


def test_unasked_record() -> None:
    built, x = part(no_op=2), torch.randn(B, T, D)
    record, asked = built.empty_record(x), run(built, x)[1]
    assert [f.shape for f in record[:3]] == [f.shape for f in asked[:3]]
    assert record.logits_BTX.isnan().all()
    assert not record.chosen_BTX.any()
    assert built.entropy(record).isnan().all()
    assert ((built.entropy(asked) > 0) & (built.entropy(asked) <= 1)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuont": 3}, "unknown key in ExpertsConfig 'cuont'; did you mean 'count'"),
        ({"top_k": 5}, "top_k must be at most count . no_op = 4, got 5"),
        ({"top_k": 1}, "renormalise must be false with top_k 1"),
        ({"no_op": -1}, "no_op must be at least 0, got -1"),
        ({"balance_weight": -0.1}, "balance_weight must not be negative, got -0.1"),
        ({"intermediate_size": 30}, "intermediate_size must be a multiple of 8, got 30"),
    ],
)
def test_options_that_make_no_experts(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        part(**options)
    assert "\n" not in str(error.value)


def test_an_expert_has_the_dense_neurons_by_the_choices() -> None:
    assert part().down_proj.shape == (4, D, F)
    assert part(top_k=3).down_proj.shape == (4, D, 16)
    assert part(intermediate_size=8).down_proj.shape == (4, D, 8)


def test_records_are_lifted() -> None:
    built, x = part(no_op=2), torch.randn(B, T, D)
    kept = torch.arange(T).expand(B, T) % 3 == 0
    chosen = replace(tokens(), real_BT=None).select_kept(kept)
    record = built(chosen.gather(x), tokens().select(chosen))[1]["experts"].lift(chosen, {})
    whole = run(built, x)[1]
    assert torch.equal(record.reached_BT, kept)
    assert torch.equal(record.chosen_BTX[kept], whole.chosen_BTX[kept])
    assert not record.chosen_BTX[~kept].any()
    torch.testing.assert_close(record.logits_BTX[kept], whole.logits_BTX[kept])
    assert record.logits_BTX[~kept].isnan().all()
