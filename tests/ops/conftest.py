"""Uninitialised memory holds NaN in these tests, so that values that a kernel forgets to write are noticed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Make PyTorch fill uninitialised tensors with NaN, or with the largest integer.

    It does so while its algorithms have to be deterministic.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
