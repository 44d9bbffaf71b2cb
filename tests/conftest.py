"""Every test runs with one thread, offline and with the same seed; real data come only from SKIPSTONE_DATA."""

from __future__ import annotations

import gc
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

# Set before anything imports Hugging Face or OpenMP code: both read the environment only once.
_HOME = tempfile.TemporaryDirectory(prefix="skipstone-tests-")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HOME=_HOME.name,
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    WANDB_MODE="disabled",
)

import accelerate.utils.memory  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
pytest_plugins = ["cpu_seconds"]
settings.register_profile("skipstone", derandomize=True, deadline=None, database=None)
settings.register_profile("quick", settings.get_profile("skipstone"), max_examples=30)  # of 100; always the same ones
settings.load_profile("skipstone")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("markexpr") == "not slow":
        settings.load_profile("quick")  # before tests are imported, which takes the number of examples from it
    if find_spec("numba") is None:  # then int8 weights are computed the slower way, of which a warning tells once
        config.addinivalue_line("filterwarnings", "ignore:int8 weights are restored:UserWarning")


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - third-party code still draws from the global state
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    """Make tensors on the device that SKIPSTONE_TEST_DEVICE names: cuda, or pretend (`pretend_device.py`)."""
    name = os.environ.get("SKIPSTONE_TEST_DEVICE", "cpu")
    if name == "cpu":
        yield
    elif name == "pretend":
        from pretend_device import pretending

        with pretending(default=True):
            yield
    else:
        with torch.device(name):
            yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real corpora; the test is skipped where SKIPSTONE_DATA names none."""
    path = os.environ.get("SKIPSTONE_DATA")
    if not path or not Path(path).is_dir():
        pytest.skip("SKIPSTONE_DATA names no folder of corpora")
    return Path(path)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Decide which cases of the laws are slow, before `-m` looks at the marks."""
    if "laws.builders" in sys.modules:  # some law was collected
        from laws.selection import leave_out

        leave_out(items)


def pytest_collection_finish() -> None:
    """Spare the tests what only long runs need: garbage collected by hand, and files flushed to the disk.

    Imported modules and collected tests stay, so they are taken from the eyes of the garbage collector. Trainers
    collect garbage at the start of each run, to free memory of a GPU, which is a fifth of a small training.
    """
    gc.collect()
    gc.freeze()
    if not torch.cuda.is_available():
        accelerate.utils.memory.gc = SimpleNamespace(collect=lambda *_: 0)  # type: ignore[attr-defined]
    os.fsync = lambda fd: None
