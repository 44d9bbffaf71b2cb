"""A hub that cannot be reached is found out at once, by one request, and only where it is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import FileMetadataError

from skipstone.core import hub
from skipstone.data.tokenizers import build_tokenizer
from skipstone.data.users import load_dataset
from skipstone.model.pretrained import load_pretrained, load_tokenizer

NAME = "nobody/nothing"


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Every request fails as without a network; their addresses are returned."""
    found: list[str] = []

    def fail(url: str, **options: object) -> None:
        found.append(url)
        raise RuntimeError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", fail)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("SKIPSTONE_OFFLINE", raising=False)
    return found


@pytest.mark.parametrize("load", [load_pretrained, load_tokenizer, lambda n: build_tokenizer(f"pretrained:{n}", None)])
def test_a_name_is_refused_after_one_request(load: object, requests: list[str]) -> None:
    with pytest.raises(FileNotFoundError, match="the hub cannot be reached: Name or service not known"):
        load(NAME)  # type: ignore[operator]
    assert len(requests) == 1


@pytest.mark.parametrize("load", [load_pretrained, load_tokenizer, lambda n: build_tokenizer(f"pretrained:{n}", None)])
def test_a_name_is_refused_without_a_request_where_that_is_asked(
    load: object, requests: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set"):
        load(NAME)  # type: ignore[operator]
    assert not requests


def test_a_dataset_is_looked_for_in_the_cache_alone(requests: list[str]) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    with pytest.raises(
        FileNotFoundError, match="corpus hf:nobody/nothing could not be loaded: the hub cannot be reached"
    ):
        load_dataset(NAME)
    assert len(requests) == 1


def test_what_is_cached_or_answered_is_left_to_the_library(
    requests: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models--nobody--nothing" / "snapshots").mkdir(parents=True)
    assert hub.why_unreachable(NAME) is None
    assert not requests
    assert hub.why_unreachable(NAME, "dataset") is not None

    def answer(url: str, **options: object) -> None:
        raise FileMetadataError("an answer")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", answer)
    assert hub.why_unreachable("nobody/other") is None
    assert hub.why_unreachable("a name that is none") is None
