"""Plans of trainings on many GPUs, held against bytes that two processes hold and send."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.train import parallel
from skipstone.train.estimate import FP32
from skipstone.train.plan import ParameterCounts, messages, plan
from skipstone.train.recipe import read_recipe
from train.ranks import on_ranks
from train.tool import DENSE, mod

MODEL = {
    **DENSE,
    "num_hidden_layers": 4,
    "vocab_size": 300,
    "intermediate_size": 96,
    "mechanisms": [mod("topk", weight="raw")],
}


def wanted(**train: Any) -> dict[str, Any]:
    options = {"steps": 50, "batch_size": 64, "warmup_steps": 0, "parallel": "fsdp2", **train}
    return {"model": MODEL, "data": {"corpus": "python-stdlib", "context": 64}, "train": options}


@pytest.mark.slow
def test_more_gpus_hold_less_and_send_as_much() -> None:
    few, many = plan(wanted(), 2, "A100"), plan(wanted(), 32, "A100")
    assert few.memory["AdamW"] == pytest.approx(16 * many.memory["AdamW"])
    assert few.memory["gathered weights"] == many.memory["gathered weights"]
    assert many.sent["all-gather of weights"] / few.sent["all-gather of weights"] == pytest.approx((31 / 32) / (1 / 2))
    assert many.link == 50 < few.link
    assert many.compute == pytest.approx(few.compute / 16)
    assert few.memory["activations"] == pytest.approx(16 * many.memory["activations"])
    assert "DOES NOT FIT" not in "\n".join(many.lines())


def test_whole_gradients_wait_for_the_last_micro_batch() -> None:
    one, two = plan(wanted(), 2), plan(wanted(gradient_accumulation=2), 2)
    assert two.memory["whole gradients"] == FP32 * two.whole.parameters > one.memory["whole gradients"]
    assert two.sent["all-gather of weights"] == 2 * one.sent["all-gather of weights"]
    assert two.sent["reduce-scatter of gradients"] == one.sent["reduce-scatter of gradients"]


def test_what_does_not_fit_is_named() -> None:
    large = {**MODEL, "hidden_size": 16384, "num_attention_heads": 128, "intermediate_size": 57344}
    large |= {"num_hidden_layers": 3, "vocab_size": 32000}
    values = {**wanted(parallel="ddp", batch_size=1024), "model": large}
    found = plan(values, 1024)
    assert not found.fits
    assert "DOES NOT FIT" in found.lines()[-1]
    assert "train.parallel=fsdp2" in found.lines()[-1]
    assert plan({**values, "train": {**values["train"], "parallel": "fsdp2"}}, 1024).fits


def test_what_cannot_be_planned_is_one_line() -> None:
    with pytest.raises(ValueError, match="times the number of GPUs"):
        plan(wanted(), 3)
    with pytest.raises(ValueError, match="gpus and network must be above 0"):
        plan(wanted(), 0)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_state_and_messages_are_those_of_real_processes(
    kind: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of parameters, gradients and optimizer of one process, and of all collectives of one step."""

    def act(rank: int) -> None:
        dist.init_process_group("gloo")
        torch.manual_seed(0)
        model, sent = SkipstoneForCausalLM(SkipstoneConfig(**MODEL)).train(), [0.0]
        train = read_recipe({"train": {"parallel": kind}}).train
        sizes, part = ParameterCounts.of(model), (count - 1) / count
        parallel.prepare(model, train, torch.device("cpu"))
        called: Any = model
        if kind == "ddp":
            called = torch.nn.parallel.DistributedDataParallel(model)

            def hook(state, bucket):  # type: ignore[no-untyped-def]  # torch refuses annotations that are text
                sent[0] += 2 * part * bucket.buffer().nbytes
                done: torch.futures.Future[Tensor] = torch.futures.Future()
                done.set_result(bucket.buffer())
                return done

            called.register_comm_hook(None, hook)
        for name, whole in (("all_gather_single", 0), ("reduce_scatter_single", 1)):
            real = getattr(dist, name)

            def counted(*args: Any, real: Any = real, whole: int = whole, **kwargs: Any) -> Any:
                tensor = (
                    args[whole]
                    if args
                    else next(v for k, v in kwargs.items() if k.startswith("input" if whole else "output"))
                )
                sent[0] += part * tensor.nbytes
                return real(*args, **kwargs)

            monkeypatch.setattr(dist, name, counted)
        optimizer = torch.optim.AdamW(model.parameters())
        ids = torch.randint(0, 300, (2, 16))
        called(ids, labels=ids).loss.backward()
        optimizer.step()
        assert sent[0] == pytest.approx(sum(messages(sizes, count, train).values()), rel=0.15)
        tensors = [t for p in model.parameters() for t in (p, p.grad, *_moments(optimizer, p))]
        held = sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)
        share = count if kind == "fsdp2" else 1
        assert held == pytest.approx(4 * FP32 * sizes.total / share, rel=0.15)

    assert on_ranks(count, act) == [0] * count


def _moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    return [value for key, value in optimizer.state[parameter].items() if key != "step"]
