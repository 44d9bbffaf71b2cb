"""Several processes run every block together: a segment that keeps no token in one of them runs there, too."""

from __future__ import annotations

import torch

from skipstone import SkipstoneConfig, SkipstoneForCausalLM


def test_a_segment_without_tokens_is_called_and_changes_nothing() -> None:
    torch.manual_seed(0)
    entry = {"name": "segment", "layers": "1:3", "decision": "threshold"}
    sizes = {"vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = SkipstoneForCausalLM(SkipstoneConfig(mechanisms=[entry], intermediate_size=48, **sizes)).train()
    ids, none = torch.arange(24).view(2, 12), torch.zeros(2, 12, dtype=torch.bool)
    calls: list[int] = []
    model.model.layers[2].register_forward_pre_hook(lambda module, given: calls.append(1))
    results = []
    for runs in (False, True):
        model.model.every_block_runs = runs
        model.zero_grad()
        out = model(ids, labels=ids, routing={1: none})
        out.loss.backward()
        gradient = model.model.layers[2].mlp.down_proj.weight.grad
        results.append((len(calls), out.logits.detach(), gradient))
    assert [count for count, _, _ in results] == [0, 1]
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2] is None
    assert results[1][2] is not None
    assert not results[1][2].any()
