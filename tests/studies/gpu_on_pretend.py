"""Parts of the GPU study on the pretended device: whatever mixes devices fails here, as it would on a GPU.

`test_gpu_on_pretend.py` runs this file in a process of its own, because autograd counts the devices at its first use.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache

from laws.builders import KINDS, case, entry, ids, lively
from pretend_device import pretending, uploads, waits
from skipstone_studies.speed.gpu.bench import Bench
from skipstone_studies.speed.gpu.parts import arms
from skipstone_studies.speed.gpu.training import ROUTED, model_of


@pytest.fixture
def device() -> Iterator[torch.device]:
    with pretending() as found:
        yield found


def sizes(part: str) -> dict[str, Any]:
    return {**arms("laptop")[part], "seed": 0}


# Compilers do not know the device, and Triton's kernels read its memory.
EXPECTED = {"compiled", "PolyGLU mixture, times in bf16", "2 x 12 tokens, compiled"}


@pytest.mark.parametrize(
    "part",
    [
        "kernels",
        "training, d 1024",
        "PolyGLU beside SwiGLU",
        "decoding",
        "prompts of an adapted model",
        "the 597M recipe",
    ],
)
def test_a_part_never_mixes_devices(
    device: torch.device, tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = sizes(part)
    if "recipe" in given:  # chunks of the loss take no weight that is a tensor of another class, as it is here
        given["recipe"] = {**given["recipe"], "train": {**given["recipe"]["train"], "loss_chunk": 0}}
    bench = Bench(out=tmp_path / "part.json", device=device, sizes=given)
    module = import_module(f"skipstone_studies.speed.gpu.{given['module']}")
    if part == "PolyGLU beside SwiGLU":
        monkeypatch.setattr(module, "saved_bytes", lambda *given: 1)  # it reads addresses, of which there are none
    module.measure(bench)
    failed = {
        name: text
        for name, text in bench.failures.items()
        if name not in EXPECTED and not name.startswith("PolyGLU mixture")
    }
    assert failed == {}
    assert bench.found


@pytest.mark.parametrize("mechanisms", [[], [ROUTED]], ids=["dense", "routed"])
def test_a_training_step_can_be_a_graph(device: torch.device, tmp_path: Path, mechanisms: list[Any]) -> None:
    """The host neither waits nor sends: a CUDA graph could hold neither."""
    bench = Bench(out=tmp_path / "part.json", device=device, sizes=sizes("training, d 1024"))
    model = model_of(bench, mechanisms)
    given = torch.randint(0, 64, (2, 16)).to(device)
    for _ in range(2):
        waits.clear()
        uploads.clear()
        with bench.bf16():
            loss = model(input_ids=given, labels=given, use_cache=False).loss
        loss.backward()
    assert not waits
    assert not +uploads


CASES = [
    case(),
    *(case(entry(kind)) for kind in KINDS),
    case(entry("mixture_of_depths", decision="ema_threshold", kv="full")),
    case(*map(entry, KINDS), activation="polyglu"),
]


@pytest.mark.parametrize("chosen", CASES, ids=str)
@torch.no_grad()
def test_a_step_with_a_cache_of_fixed_size_can_be_a_graph(device: torch.device, chosen: Any) -> None:
    with device:
        model = lively(chosen)
        cache = StaticCache(config=model.config, max_cache_len=20)
        token = model(ids(), past_key_values=cache).logits[:, -1:].argmax(-1)
        for _ in range(2):
            waits.clear()
            uploads.clear()
            token.copy_(model(token, past_key_values=cache).logits[:, -1:].argmax(-1))
    assert not waits
    assert not +uploads
