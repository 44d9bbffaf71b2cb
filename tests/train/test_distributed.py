"""DDP and FSDP2 on gloo processes: the losses of one process, whole checkpoints, and replicas that stay equal."""

from __future__ import annotations

import os
import shutil
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.train import parallel, router_watch
from skipstone.train.recipe import read_recipe
from skipstone.train.same_state import compare
from train.distributed_table import CASES, differences, losses
from train.ranks import on_ranks
from train.tool import MODELS, at_step, recipe, train


def config(folder: Path, model: dict[str, Any], **options: Any) -> dict[str, Any]:
    """A few steps; five validation rows, which no two processes share evenly."""
    short = {"steps": 4, "log_every": 1, "eval_every": 2, "eval_rows": 5, "save_every": 0, "compare_every": 1}
    return recipe(folder, model, **{**short, "device": "cpu", **options})


def test_two_processes_shard_a_model_and_train_it_as_one_does(tmp_path: Path) -> None:
    one = train(config(tmp_path, CASES["all"], gradient_accumulation=2, steps=2), tmp_path / "one")
    wanted = config(tmp_path, CASES["all"], parallel="fsdp2", steps=2)
    assert on_ranks(2, lambda rank: train(wanted, tmp_path / "two")) == [0, 0]
    assert differences(losses(one), losses(tmp_path / "two")) < 1e-5


def test_what_a_comparison_of_routers_gathers_is_not_used_after_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its passes lie between backward and the optimizer; the weights outside of blocks stayed those of before."""
    monkeypatch.setattr(router_watch, "FIRST_PAIR", 2)
    options = {"steps": 3, "eval_every": 1}
    found = {
        kind: losses(train(config(tmp_path, MODELS["topk"], parallel=kind, **options), tmp_path / kind))
        for kind in ("ddp", "fsdp2")
    }
    assert differences(found["ddp"], found["fsdp2"]) < 1e-5


def test_a_fork_gets_no_group_whose_threads_it_lacks() -> None:
    """DTensor's caches kept a finished training's group. A fork that dropped it waited for its threads: SIGABRT."""
    parallel.leave()  # what an earlier test may have left
    model = _model("topk")
    parallel.prepare(model, read_recipe({"train": {"parallel": "fsdp2"}}).train, torch.device("cpu"))
    ids = torch.zeros(1, 8, dtype=torch.long)
    model(ids, labels=ids).loss.backward()
    group = weakref.ref(dist.group.WORLD)
    parallel.leave()
    del model
    child = os.fork()
    if child == 0:
        os._exit(group() is not None)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_block_without_tokens_has_gradients_in_one_process_too() -> None:
    model = SkipstoneForCausalLM(SkipstoneConfig(**CASES["topk"], vocab_size=20, max_position_embeddings=32))
    block = model.model.layers[0]
    block.mlp.down_proj.weight.requires_grad_(False)
    block.mlp.up_proj.weight.grad = given = torch.ones_like(block.mlp.up_proj.weight)
    parallel.complete_gradients(model)
    assert block.mlp.up_proj.weight.grad is given
    assert block.mlp.down_proj.weight.grad is None
    assert not block.mlp.gate_proj.weight.grad.any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_two_processes_have_the_losses_of_one(name: str, kind: str, tmp_path: Path) -> None:
    one = train(config(tmp_path, CASES[name], gradient_accumulation=2, steps=20), tmp_path / "one")
    wanted = config(tmp_path, CASES[name], parallel=kind, steps=20)
    assert on_ranks(2, lambda rank: train(wanted, tmp_path / "two")) == [0, 0]
    assert differences(losses(one), losses(tmp_path / "two")) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["threshold", "polyglu", "layer_dropout", "boundary"])
def test_a_sharded_run_goes_on_on_other_numbers_of_processes(name: str, tmp_path: Path) -> None:
    """Stopped on 2, resumed on 1, stopped again, finished on 4: the curve of one process; the same bytes at the end."""
    wanted = config(tmp_path, CASES[name], parallel="fsdp2", steps=9, save_every=3)
    whole = train(config(tmp_path, CASES[name], parallel="fsdp2", steps=9, gradient_accumulation=4), tmp_path / "whole")
    run = tmp_path / "run"
    for count, until in ((2, 3), (1, 6)):
        assert on_ranks(count, partial(_until, wanted, run, until)) == [143] * count
    assert on_ranks(4, lambda rank: train(wanted, run, resume=True)) == [0] * 4
    assert differences(losses(whole), losses(run)) < 1e-5
    assert not list(run.rglob("*.distcp"))
    found = set()
    for count in (1, 2, 4):  # from the last checkpoint, which is that of the last step
        again = tmp_path / f"again-{count}"
        shutil.copytree(run, again)
        (again / "result.json").unlink()
        shutil.rmtree(again / "model")
        assert on_ranks(count, partial(_resumed, wanted, again)) == [0] * count
        found.add((again / "model" / "model.safetensors").read_bytes())
    assert len(found) == 1


def _until(wanted: dict[str, Any], run: Path, step: int, rank: int) -> None:
    def stop() -> None:
        import signal

        signal.raise_signal(signal.SIGTERM)

    with at_step(step, stop):
        train(wanted, run, resume=run.exists())


def _resumed(wanted: dict[str, Any], run: Path, rank: int) -> None:
    train(wanted, run, resume=True)


@pytest.mark.slow
def test_checkpoints_of_the_two_kinds_are_told_apart(tmp_path: Path) -> None:
    for kind, other in (("ddp", "fsdp2"), ("fsdp2", "ddp")):
        wanted = config(tmp_path, MODELS["topk"], parallel=kind, steps=4, save_every=2)
        run = tmp_path / kind
        assert on_ranks(1, partial(_until, wanted, run, 2)) == [143]
        changed = {**wanted, "train": {**wanted["train"], "parallel": other}}
        with pytest.raises(ValueError, match=r"differs from the run's in train.parallel"):
            train(changed, run, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_bf16_and_recomputed_blocks_repeat_their_decisions(kind: str, tmp_path: Path) -> None:
    options = {"precision": "bf16", "steps": 6}
    plain = config(tmp_path, CASES["all"], parallel=kind, **options)
    again = config(tmp_path, CASES["all"], parallel=kind, activation_checkpointing=True, **options)
    for name, wanted in (("plain", plain), ("again", again)):
        assert on_ranks(2, partial(_into, wanted, tmp_path / name)) == [0, 0]
    assert differences(losses(tmp_path / "plain"), losses(tmp_path / "again")) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_compiled_blocks_train_alike(kind: str, tmp_path: Path) -> None:
    for name, compiled in (("plain", False), ("compiled", True)):
        wanted = config(tmp_path, CASES["topk"], parallel=kind, steps=3, compile=compiled)
        assert on_ranks(2, partial(_into, wanted, tmp_path / name)) == [0, 0]
    assert differences(losses(tmp_path / "plain"), losses(tmp_path / "compiled")) < 1e-5


def _into(wanted: dict[str, Any], run: Path, rank: int) -> None:
    train(wanted, run)


@pytest.mark.slow
def test_a_slow_process_changes_nothing(tmp_path: Path) -> None:
    wanted = config(tmp_path, CASES["all"], parallel="fsdp2")
    train_slowly: Callable[[int], None] = partial(_slowly, wanted, tmp_path / "slow")
    assert on_ranks(2, partial(_into, wanted, tmp_path / "fast")) == on_ranks(2, train_slowly) == [0, 0]
    assert differences(losses(tmp_path / "fast"), losses(tmp_path / "slow")) == 0


def _slowly(wanted: dict[str, Any], run: Path, rank: int) -> None:
    with at_step(2, partial(time.sleep, 3.0 * rank)):
        train(wanted, run)


def _model(name: str) -> SkipstoneForCausalLM:
    torch.manual_seed(0)
    return SkipstoneForCausalLM(SkipstoneConfig(**CASES[name], vocab_size=64)).train()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_process_may_keep_no_token_where_another_keeps_some(kind: str, tmp_path: Path) -> None:
    """The gradients are those of one process with all rows; the second process leaves out a whole block."""
    ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(1))
    kept = torch.ones(4, 16, dtype=torch.bool)
    kept[2:] = False
    one = _model("threshold")
    one(ids, labels=ids, routing={1: kept}).loss.backward()
    wanted = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}

    def act(rank: int) -> None:
        dist.init_process_group("gloo")
        model, rows = _model("threshold"), slice(2 * rank, 2 * rank + 2)
        train_config = read_recipe({"train": {"parallel": kind}}).train
        parallel.prepare(model, train_config, torch.device("cpu"))
        called = model if kind == "fsdp2" else torch.nn.parallel.DistributedDataParallel(model)
        called(ids[rows], labels=ids[rows], routing={1: kept[rows]}).loss.backward()
        for name, p in model.named_parameters():
            grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            if name in wanted:
                assert torch.allclose(grad, wanted[name], atol=1e-6), name
            else:
                assert grad is None or not grad.any(), name

    assert on_ranks(2, act) == [0, 0]


@pytest.mark.slow
def test_replicas_that_have_parted_are_named(tmp_path: Path) -> None:
    wanted = config(tmp_path, MODELS["ema_threshold"])

    def act(rank: int) -> None:
        with at_step(2, lambda: None):
            from skipstone.train.callback import RoutingCallback

            before = RoutingCallback.on_step_end

            def part(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                before(self, args, state, control, **kwargs)
                if rank == 1 and state.global_step == 2:
                    kwargs["model"].model.layers[1].mechanisms["mixture_of_depths"].decision.threshold.add_(1e-7)

            RoutingCallback.on_step_end = part  # type: ignore[method-assign]
            with pytest.raises(ValueError, match=r"layers.1.mechanisms.*decision.threshold.*at step 2"):
                train(wanted, tmp_path / "run")

    assert on_ranks(2, act) == [0, 0]


@pytest.mark.slow
def test_hashes_see_one_bit_of_any_tensor() -> None:
    def act(rank: int) -> None:
        dist.init_process_group("gloo")
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
            value = torch.zeros(3, 5).to(dtype)
            compare({"x": value}, {"rate": 0.1}, torch.device("cpu"), 1)
            value[1, 3] = rank
            with pytest.raises(ValueError, match="'x' differed at step 7"):
                compare({"x": value}, {}, torch.device("cpu"), 7)
        with pytest.raises(ValueError, match="'rate' differed"):
            compare({}, {"rate": 0.1 + 1e-12 * rank}, torch.device("cpu"), 1)

    assert on_ranks(2, act) == [0, 0]


def test_what_cannot_be_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="keep_best needs parallel ddp"):
        read_recipe({"train": {"parallel": "fsdp2", "keep_best": True}})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"set train.parallel=fsdp2"):
        parallel.prepare(_model("topk"), read_recipe({}).train, torch.device("cpu"))
