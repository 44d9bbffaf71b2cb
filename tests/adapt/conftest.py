from __future__ import annotations

from pathlib import Path

import pytest

from adapt.sources import save_source


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("source"))
