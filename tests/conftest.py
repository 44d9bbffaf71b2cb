"""Every test runs with one thread, offline and with the same seed; real data come only from SKIPSTONE_DATA."""

from __future__ import annotations

import gc
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
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
    HF_DEACTIVATE_ASYNC_LOAD="1",  # by default transformers starts four threads for each model that it loads
    HF_HOME=_HOME.name,
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    WANDB_MODE="disabled",
)

import pytest  # noqa: E402

pytest_plugins = ["cpu_seconds"]


def pytest_configure(config: pytest.Config) -> None:
    """Import what is heavy here and in fixtures, so that the process that only hands out tests to others is light."""
    gc.set_threshold(10_000, 20, 50)  # by default so many collections begin that they take a twentieth of all CPU time
    if not hasattr(config, "workerinput") and config.getoption("numprocesses", None):
        return
    import torch
    from hypothesis import settings
    from hypothesis.internal.conjecture import providers

    torch.set_num_threads(1)
    # Without the constants of all sources imported by then, which are thousands and differ from process to process.
    providers._get_local_constants = lambda: providers._local_constants
    settings.register_profile("skipstone", derandomize=True, deadline=None, database=None)
    settings.register_profile("quick", settings.get_profile("skipstone"), max_examples=20)  # of 100; always the same
    settings.load_profile("quick" if config.getoption("markexpr") == "not slow" else "skipstone")
    if find_spec("numba") is None:  # then int8 weights are computed the slower way, of which a warning tells once
        config.addinivalue_line("filterwarnings", "ignore:int8 weights are restored:UserWarning")


@pytest.fixture(autouse=True)
def _seed() -> None:
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - third-party code still draws from the global state
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # the same without a tenth of a millisecond of looking for other devices
        torch.default_generator.manual_seed(0)


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
        import torch

        with torch.device(name):
            yield


@pytest.fixture
def coarse_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budget tables are calibrated with a third of the points; most tests only need some table."""
    monkeypatch.setattr("skipstone.budget.calibration.STEP", 1.3)
    monkeypatch.setattr("skipstone.budget.budget_table.GAP", 1.4)


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
    """Spare the tests what only long runs need: garbage collected by hand, files flushed, other devices' seeds.

    So do answers that stay the same while tests run: the state of the checkout, and which packages are installed.

    Imported modules and collected tests stay, so they are taken from the eyes of the garbage collector. Trainers
    collect garbage at the start of each run, to free memory of a GPU, which is a fifth of a small training.
    """
    import accelerate.utils.imports
    import accelerate.utils.memory
    import torch

    from skipstone.train import environment

    gc.collect()
    gc.freeze()
    if not torch.cuda.is_available():
        accelerate.utils.memory.gc = SimpleNamespace(collect=lambda *_: 0)  # type: ignore[attr-defined]
    os.fsync = lambda fd: None
    environment.git_state = cache(environment.git_state)
    accelerate.utils.imports._is_package_available = cache(accelerate.utils.imports._is_package_available)
    for device, seeds in ((torch.cuda, torch.cuda.random), (torch.xpu, torch.xpu.random), (torch.mtia, torch.mtia)):
        if not device.is_available():  # seeding would note the whole stack of calls, for when the device is there
            seeds._lazy_call = lambda *call, **kind: None  # type: ignore[attr-defined]
