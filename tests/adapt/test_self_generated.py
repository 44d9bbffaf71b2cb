"""Sampling text from the source model."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapt.sources import recipe, save_source, tokenizer
from skipstone.adapt.adaptation import adapt
from skipstone.adapt.self_generated import write


@pytest.mark.slow
def test_a_source_is_adapted_on_what_it_wrote(tmp_path: Path) -> None:
    source = str(save_source(tmp_path / "source"))
    told: list[int] = []
    write(source, tmp_path / "text", tokens=900, length=40, batch=8, start="the", seed=1, report=told.append)
    assert told[-1] >= 900 > told[-2]
    write(source, tmp_path / "again", tokens=900, length=40, batch=8, start="the", seed=1)
    for name in ("train.txt", "validation.txt"):
        text = (tmp_path / "text" / name).read_text(encoding="utf-8")
        assert text == (tmp_path / "again" / name).read_text(encoding="utf-8")
        assert text.strip()
    train = (tmp_path / "text" / "train.txt").read_text(encoding="utf-8").split("\n\n")
    assert len(set(train)) > 15, "texts differ"
    write(source, tmp_path / "next", tokens=900, length=40, batch=8, start="the", seed=2)
    other = (tmp_path / "next" / "train.txt").read_text(encoding="utf-8").split("\n\n")
    assert len(set(train) & set(other)) < 3, "the next seed does not write the same"
    words = recipe(tmp_path, {})
    words["data"]["corpus"] = f"text:{tmp_path / 'text'}"
    assert (adapt(source, words, out=tmp_path / "run", progress=False) / "result.json").is_file()


def test_it_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    source = str(save_source(tmp_path / "source"))

    def cut(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path / "text", tokens=900, length=40, batch=8, start="the", report=cut)
    (tmp_path / ".text.partial").mkdir()  # what SIGKILL leaves
    (tmp_path / ".text.partial" / "train.txt").write_text("half a te")
    assert not (tmp_path / "text").exists()
    write(source, tmp_path / "text", tokens=100, length=40, batch=8, start="the")
    assert "half a te" not in (tmp_path / "text" / "train.txt").read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "text"}


def test_the_token_that_ends_a_text_is_the_start_and_is_not_written(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    write(str(source), tmp_path / "text", tokens=200, length=40, batch=8)
    texts = (tmp_path / "text" / "train.txt").read_text(encoding="utf-8").strip().split("\n\n")
    end = tokenizer().eos_token
    assert end
    assert all(end not in text for text in texts)
    assert len({len(text) for text in texts}) > 1, "some ended before they were cut"
    bare = tokenizer()
    bare.eos_token = None
    bare.save_pretrained(source)
    with pytest.raises(ValueError, match="no token that begins or ends a text; name a start"):
        write(str(source), tmp_path / "other", length=40)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 10**12, "length": 8}, r"batch \(1,000,000,000,000\) is too large: texts of 9 tokens take .* GiB"),
        ({"batch": 10**30, "length": 8}, "batch .* is too large"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"length": 64}, r"length \(64\) and start \(1\) are longer than the source's context, 64 tokens"),
        ({"dtype": "int8"}, "dtype"),
        ({"start": "\udcff"}, "start is no Unicode text: surrogates not allowed at character 0"),
        ({"start": ""}, "start must not be empty, got ''; leave it out for the token that begins a text"),
    ],
)
def test_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    source = str(save_source(tmp_path / "source"))
    with pytest.raises(ValueError, match=message):
        write(source, tmp_path / "text", **{"start": "t", **options})  # type: ignore[arg-type]
    assert not (tmp_path / "text").exists()
