"""`skipstone.route` puts mechanisms around the blocks of foreign decoders."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

import skipstone
from damage import damage
from in_place.conftest import CONFIGS, SIZES, built
from skipstone.measure.flops import count_flops

SHOWN = ("mixtral", "qwen2_vl", "cohere", "falcon")
OTHERS = tuple(name for name in CONFIGS if name not in SHOWN)
MOD = {
    "name": "mixture_of_depths", "layers": ":", "capacity": 0.5, "decision": "threshold", "weight": "sigmoid",
    "router_norm": True,
}  # fmt: skip
ENTRIES: dict[str, list[dict[str, Any]]] = {
    "mixture_of_depths": [MOD],
    "gates": [{"name": "token_selective", "layers": ":", "start_bias": 0.0}, {"name": "early_exit", "layers": "1:"}],
}
TRAINED: dict[str, list[dict[str, Any]]] = {
    "top-k": [{**MOD, "decision": "topk"}],
    "guided": [{"name": "mixture_of_depths", "layers": ":", "capacity": 0.5}],
    "keys of kept alone": [{**MOD, "kv": "kept"}],
    "both": [{**MOD, "kv": "kept"}, {"name": "token_selective", "layers": "1:", "training": "hard", "start_bias": 0.0}],
    "gate, executed hard": [{"name": "token_selective", "layers": ":", "training": "hard", "start_bias": 0.0}],
}


def every(names: tuple[str, ...], slow: tuple[str, ...]) -> list[Any]:
    return [*names, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


def routed(name: str, entries: list[dict[str, Any]], **options: Any) -> tuple[Any, Any]:
    model = built(name)
    torch.manual_seed(1)
    return model, skipstone.route(model, entries, **options)


@torch.no_grad()
def test_a_routed_decoder_skips_what_it_says(ids: Tensor, mask: Tensor) -> None:
    """Against the definition, written out: x + w (block(x) - x) for kept tokens, all keys and values in place."""
    model, handle = routed("llama", [{**MOD, "layers": [1]}])
    block, seen = model.model.layers[1], {}
    block.register_forward_pre_hook(lambda _, args, kwargs: seen.update(x=args[0], kwargs=kwargs), with_kwargs=True)
    block.register_forward_hook(lambda _, args, out: seen.update(out=out))
    model(ids, attention_mask=mask, use_cache=False)
    record = handle.records[1]["mixture_of_depths"]
    handle.undo()
    plain = type(block).forward(block, seen["x"], **seen["kwargs"])
    expected = torch.where(
        record.kept_BT[..., None], seen["x"] + record.weight_BT[..., None] * (plain - seen["x"]), seen["x"]
    )
    assert 0 < record.kept_BT.sum() < mask.sum()
    torch.testing.assert_close(seen["out"], expected)


@pytest.mark.parametrize("name", every(SHOWN, OTHERS))
@torch.no_grad()
def test_skipping_equals_computing_and_throwing_away(name: str, ids: Tensor, mask: Tensor) -> None:
    model, handle = routed(name, ENTRIES["mixture_of_depths"])
    gathered = model(ids, attention_mask=mask).logits[mask.bool()]
    assert 0.1 < handle.kept_share() < 0.9
    handle.executor = "masked"
    torch.testing.assert_close(gathered, model(ids, attention_mask=mask).logits[mask.bool()])


@pytest.mark.parametrize("entries", ["mixture_of_depths", pytest.param("gates", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", every(("mixtral",), (*SHOWN[1:], *OTHERS)))
def test_generation_is_that_of_whole_passes(name: str, entries: str, ids: Tensor, mask: Tensor) -> None:
    """With the model's own cache, the second row among padding or alone; by beams, which reorder the cache."""
    model, _ = routed(name, ENTRIES[entries])
    wanted: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    both = model.generate(ids, attention_mask=mask, **wanted)
    assert torch.equal(both, model.generate(ids, attention_mask=mask, use_cache=False, **wanted))
    assert torch.equal(both[0, 4:], model.generate(ids[:1, 4:], **wanted)[0])
    beams = [model.generate(ids[1:], num_beams=2, use_cache=cached, **wanted) for cached in (True, False)]
    assert torch.equal(*beams)


@pytest.mark.parametrize("name", every(SHOWN[:1], (*SHOWN[1:], *OTHERS)))
@torch.no_grad()
def test_neutral_mechanisms_and_none_leave_the_model_as_it_is(name: str, ids: Tensor, mask: Tensor) -> None:
    model = built(name)
    state = list(model.state_dict())
    plain = model(ids, attention_mask=mask).logits
    handle = skipstone.route(model, [MOD, {"name": "token_selective", "layers": "1:"}])
    handle.set_identity()
    neutral = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(neutral[mask.bool()], plain[mask.bool()], rtol=1e-2, atol=1e-2)  # gates of 1 - 1e-4
    assert list(model.state_dict()) != state
    handle.undo()
    assert torch.equal(model(ids, attention_mask=mask).logits, plain)
    assert list(model.state_dict()) == state
    assert not hasattr(model, "routing_modules")


def test_a_dense_start_changes_nothing_and_learns(ids: Tensor) -> None:
    plain = built("llama").train()(ids, labels=ids).loss
    model, handle = routed("llama", [{"name": "mixture_of_depths", "layers": ":"}], dense_start=True)
    out = model.train()(ids, labels=ids)
    torch.testing.assert_close(out.loss, plain)
    assert handle.entries[0].options.weight == "tanh"
    out.loss.backward()
    assert all(p.grad is not None for p in handle.parameters())
    for _ in range(20):  # the threshold follows the scores
        handle.advance(1.0)
        model(ids, labels=ids)
    assert handle.kept_share() < 0.5


@pytest.mark.parametrize("entries", every(("guided",), tuple(n for n in TRAINED if n != "guided")))
@pytest.mark.parametrize("name", every(("mixtral",), ("llama", "gemma3", "falcon")))
def test_training_skips_exactly_and_teaches_routers(name: str, entries: str, ids: Tensor, mask: Tensor) -> None:
    """Every gradient is the masked executor's, and the same with activation checkpointing."""
    model, handle = routed(name, TRAINED[entries])
    model.train()
    labels = ids.masked_fill(mask == 0, -100)
    found = []
    for executor in ("masked", "gathered", "checkpointed"):
        handle.executor = "masked" if executor == "masked" else "gathered"
        if executor == "checkpointed":
            model.activation_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(5)
        out = model(ids, attention_mask=mask, labels=labels, use_cache=False)
        out.loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert 0.05 < handle.kept_share() < 0.9
    routers = [g for n, g in found[0].items() if "mechanisms" in n and n.endswith("router.weight")]
    assert len(routers) >= 3
    assert max(float(g.abs().max()) for g in routers) > 1e-6
    for other in found[1:]:
        for n in {*other, *found[0]}:  # a block that no token needs is not called, and its weights have no gradient
            pair = (grads.get(n, torch.zeros_like(model.get_parameter(n))) for grads in (other, found[0]))
            torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-5, msg=lambda text, n=n: f"{n}: {text}")


def test_the_loss_holds_what_mechanisms_add_in_training_alone(ids: Tensor) -> None:
    model, handle = routed("llama", [{**MOD, "decision": "predictor"}])
    out = model.train()(ids, labels=ids, use_cache=False)
    alone = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert handle.auxiliary_loss() > 0
    torch.testing.assert_close(out.loss, alone + handle.auxiliary_loss())
    items = torch.tensor(4 * ids[:, 1:].numel())  # of a step of four such batches
    torch.testing.assert_close(model(ids, labels=ids, use_cache=False, num_items_in_batch=items).loss, out.loss / 4)
    with torch.no_grad():
        scored = model.eval()(ids, labels=ids)
    alone = torch.nn.functional.cross_entropy(scored.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(scored.loss, alone)


@torch.no_grad()
def test_flops_are_those_of_kept_tokens_and_of_everyones_keys(ids: Tensor) -> None:
    model, handle = routed("llama", [MOD])
    T, D, F, H, E = 10, SIZES["hidden_size"], SIZES["intermediate_size"], 4, 8
    row = ids[:1]
    plain = count_flops(lambda: built("llama")(row))
    counted = count_flops(lambda: model(row))
    expected = plain.total
    for records in handle.records:
        skipped = T - int(records["mixture_of_depths"].kept_BT.sum())
        expected -= skipped * (2 * 2 * D * D + 3 * 2 * D * F)  # queries, output, MLP
        expected -= skipped * 4 * H * E * T  # scores and their sums
        expected += T * 2 * D  # the router
    assert counted.unknown == ()
    assert counted.total == expected < 0.8 * plain.total


@torch.no_grad()
def test_saved_mechanisms_are_put_into_another_copy(tmp_path: Path, ids: Tensor) -> None:
    model, handle = routed("mixtral", [{**MOD, "decision": "ema_threshold"}])
    for mechanism in handle.routing_modules():
        mechanism.decision.threshold.fill_(0.2)
    expected = model(ids).logits
    handle.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["skipstone_routing.json", "skipstone_routing.safetensors"]
    other = built("mixtral")
    again = skipstone.route(other, tmp_path)
    assert torch.equal(other(ids).logits, expected)
    assert 0 < again.kept_share() < 1
    state = model.state_dict()
    third, _ = routed("mixtral", [{**MOD, "decision": "ema_threshold"}])
    third.load_state_dict(state)  # as a Trainer's checkpoint does
    assert torch.equal(third(ids).logits, expected)
    twin = copy.deepcopy(model)  # as TRL makes a reference
    twin.model.layers[0].mechanisms["mixture_of_depths"].decision.threshold.fill_(1e9)
    assert torch.equal(model(ids).logits, expected)
    assert not torch.equal(twin(ids).logits, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "skipstone_routing.json").unlink(), "skipstone_routing.json': no such file"),
        (
            lambda folder: (folder / "skipstone_routing.json").write_text("[]"),
            "routing.json' cannot be read: it does not",
        ),
        (lambda folder: (folder / "skipstone_routing.safetensors").write_bytes(b"x"), "safetensors' is damaged"),
        (lambda folder: damage(folder / "skipstone_routing.json", "flip", Random(3)), "skipstone_routing.json'"),
        (lambda folder: damage(folder / "skipstone_routing.safetensors", "flip", Random(3)), "is damaged: its SHA-256"),
    ],
)
def test_a_broken_folder_is_one_line_and_leaves_the_model_alone(tmp_path: Path, change: Any, message: str) -> None:
    model, handle = routed("llama", [MOD])
    handle.save(tmp_path)
    handle.undo()
    state = list(model.state_dict())
    change(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        skipstone.route(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert list(model.state_dict()) == state


def refusals() -> dict[str, tuple[Any, str]]:
    from transformers import BertConfig, BertModel, BloomConfig, T5Config, T5ForConditionalGeneration

    small = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2}

    def with_attention(name: str) -> Any:
        model = built("llama")
        model.config._attn_implementation = name
        return model

    def twice() -> Any:
        return routed("llama", [MOD])[0]

    return {
        "no model": (lambda: torch.nn.Linear(2, 2), "needs a decoder of transformers, got Linear"),
        "ours": (
            lambda: skipstone.SkipstoneForCausalLM(skipstone.SkipstoneConfig(**small, mechanisms=[MOD])),
            "carries mechanisms already",
        ),
        "twice": (twice, "carries mechanisms already; undo"),
        "encoder and decoder": (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=64, d_model=16, num_layers=1, num_heads=2, d_ff=16, d_kv=8)
            ),
            "has an encoder",
        ),
        "encoder": (
            lambda: BertModel(BertConfig(**small, num_hidden_layers=1, intermediate_size=16)),
            "no list of 1 blocks",
        ),
        "alibi": (
            lambda: _causal(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)),
            "alibi is not supported",
        ),
        "kernel": (lambda: with_attention("flash_attention_2"), "'flash_attention_2' takes no mask for single queries"),
    }


def _causal(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("what", list(refusals()))
def test_what_cannot_be_exact_is_refused_in_one_line(what: str) -> None:
    make, message = refusals()[what]
    model = make()
    state = list(model.state_dict())
    with pytest.raises(ValueError, match=message) as caught:
        skipstone.route(model, [{**MOD, "layers": [0]}])
    assert "\n" not in str(caught.value)
    assert list(model.state_dict()) == state


@pytest.mark.slow
def test_blocks_without_keys_are_refused_and_others_of_the_same_model_are_not(ids: Tensor) -> None:
    from transformers import Qwen3NextConfig

    linear = {f"linear_{kind}": 2 for kind in ("num_key_heads", "num_value_heads")}
    heads = {f"linear_{kind}_head_dim": 8 for kind in ("key", "value")}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Qwen3NextConfig(
        **{**SIZES, "num_hidden_layers": 4, "head_dim": 8, "shared_expert_intermediate_size": 16},
        **experts, **linear, **heads,
    )  # fmt: skip
    model = _causal(config).eval()
    with pytest.raises(ValueError, match=r"block 0 \(Qwen3NextDecoderLayer\) hands no keys and values"):
        skipstone.route(model, [{**MOD, "layers": ":"}])
    handle = skipstone.route(model, [{**MOD, "layers": [config.layer_types.index("full_attention")]}])
    assert torch.isfinite(model(ids).logits).all()
    assert handle.kept_share() < 1


def test_a_block_that_depends_on_its_neighbours_is_found_out() -> None:
    """Its MLP looks at the token before, which is not there when tokens are skipped."""
    model = built("llama")
    mlp = model.model.layers[1].mlp
    mlp.register_forward_hook(lambda _, args, out: out + torch.roll(args[0], 1, dims=1))
    with pytest.raises(ValueError, match=r"block 1 \(LlamaDecoderLayer\) computes something else for some"):
        skipstone.route(model, [MOD])
    assert skipstone.route(model, [{**MOD, "layers": [0, 2]}]).records


def test_arguments_that_mean_nothing_to_skipped_tokens_are_one_line(ids: Tensor) -> None:
    model, _ = routed("mixtral", [MOD])
    for name in ("output_attentions", "output_router_logits"):
        with pytest.raises(ValueError, match=f"{name} is not supported by a routed model"):
            model(ids, **{name: True})
    with pytest.raises(ValueError, match=r"mechanisms\[0\].on must be 'block', as route wraps whole blocks"):
        skipstone.route(built("llama"), [{**MOD, "on": "mlp"}])
    with pytest.raises(ValueError, match="did you mean 'capacity'"):
        skipstone.route(built("llama"), [{"name": "mixture_of_depths", "capcity": 0.5}])


@torch.no_grad()
def test_keys_of_kept_tokens_alone_are_for_passes_without_a_cache(ids: Tensor) -> None:
    model, handle = routed("llama", [{**MOD, "kv": "kept"}])
    model(ids, use_cache=False)
    assert 0 < handle.kept_share() < 1
    with pytest.raises(ValueError, match="block 0: kv 'kept' leaves no keys of skipped tokens"):
        model(ids)


@torch.no_grad()
def test_decisions_do_not_look_ahead(ids: Tensor) -> None:
    model, _ = routed("cohere", [MOD])
    other = ids.clone()
    other[:, 6:] = 5
    torch.testing.assert_close(model(other).logits[:, :6], model(ids).logits[:, :6])


@torch.no_grad()
def test_low_precision_and_low_rank(ids: Tensor) -> None:
    model = built("llama").to(torch.bfloat16)
    plain = model(ids).logits
    handle = skipstone.route(model, [{**MOD, "skip": "low_rank"}])
    mechanism = next(handle.routing_modules())
    assert mechanism.router.weight.dtype == torch.float32
    assert model(ids).logits.dtype == torch.bfloat16
    handle.set_identity()
    assert mechanism.skip is not None
    assert torch.equal(model(ids).logits, plain)  # all are kept: the very numbers, in bf16 too


@pytest.mark.parametrize("mechanisms", [None, 3, [3], {"name": "mixture_of_depths"}], ids=str)
def test_mechanisms_are_a_list_of_mappings(mechanisms: Any) -> None:
    with pytest.raises(ValueError, match="mechanisms must be a list of mappings"):
        skipstone.route(built("llama"), mechanisms)


def test_our_own_models_are_configured_instead() -> None:
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="takes mechanisms in its configuration"):
        skipstone.route(skipstone.SkipstoneForCausalLM(skipstone.SkipstoneConfig(**sizes)), [MOD])


@torch.no_grad()
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_routed_once_and_can_be_undone(way: Any, ids: Tensor, mask: Tensor) -> None:
    """A pickled model (`torch.save(model)`) ran its mechanisms inside each other."""
    model, _ = routed("llama", [MOD])
    twin = way(model)
    assert torch.equal(twin(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    twin.skipstone_routing.undo()
    assert torch.equal(twin(ids, attention_mask=mask).logits, built("llama")(ids, attention_mask=mask).logits)
