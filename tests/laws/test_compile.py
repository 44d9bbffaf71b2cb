"""Law 9: torch.compile compiles the static training pass of every mechanism as one graph."""

from __future__ import annotations

import pytest
import torch

from laws.builders import DEPTH, Case, assert_close, case, entry, gradients, ids, lively

STATIC = [case(entry(name), activation=a) for name in DEPTH for a in ("silu", "polyglu")]
STATIC.append(case(*map(entry, DEPTH), activation="polyglu"))
STATIC.append(case(entry("mixture_of_depths", kv="full", skip="low_rank", router="mlp", router_norm=True, z_loss=0.1)))


@pytest.mark.slow
@pytest.mark.parametrize("chosen", STATIC, ids=str)
def test_one_graph_without_breaks(chosen: Case) -> None:
    model = lively(chosen).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for run in (model, compiled):
        model.zero_grad()
        out = run(ids(), labels=ids(), noise=False)
        out.loss.backward()
        results.append((out, gradients(model)))
    (plain, expected), (fast, got) = results
    assert_close(fast.logits, plain.logits)
    assert_close(fast.loss, plain.loss)
    for name, gradient in expected.items():
        assert_close(got[name], gradient, name)
