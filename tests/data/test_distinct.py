"""`distinct:CORPUS` drops passages that a later split nearly repeats; `python-code` keeps packages in one split."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from skipstone.data import installed
from skipstone.data.corpora import find_entry, load_corpus
from skipstone.data.corpus import Corpus
from skipstone.data.distinct import GRAM, PASSAGE, distinct, grams, passages, share_known


def text(seed: int, words: int = 1200) -> str:
    draw = random.Random(seed)
    return "".join(f"w{draw.randrange(10_000)}" + (" " if i % 9 else "\n") for i in range(words))


def corpus(**splits: tuple[str, ...]) -> Corpus:
    readers = {split: (lambda documents=documents: documents) for split, documents in splits.items()}
    return Corpus(name="made", description="made", licence="", readers=readers)


def test_grams_ignore_case_and_what_lies_between_words() -> None:
    one = "The quick (brown) fox jumps over the lazy dog and then it runs away again"
    assert len(grams(one)) == len(one.split()) - GRAM + 1
    assert np.array_equal(grams(one), grams(one.upper().replace(" ", "\n\t- ")))
    assert not np.intersect1d(grams(one), grams(one.replace("brown", "red")))[1:].size
    assert not len(grams("too few words"))


def test_passages_are_the_document() -> None:
    document = text(0)
    parts = list(passages(document))
    assert "".join(parts) == document
    assert all(len(part) >= PASSAGE and part.endswith("\n") for part in parts[:-1])


def test_copies_of_later_splits_are_dropped_and_the_rest_stays() -> None:
    own, copied, other = text(1), text(2), text(3)
    header = " ".join(f"licence{i}" for i in range(40)) + "\n"
    edited = "\n".join(line if i % 4 else line + " edited" for i, line in enumerate(copied.split("\n")))
    made = corpus(
        train=(header + own, edited, text(4) + copied, other),
        validation=(text(5), other),
        test=(header + copied,),
    )
    found = distinct(made)
    assert found.documents("test") == made.documents("test")
    assert found.documents("validation") == made.documents("validation")
    train = found.documents("train")
    assert train[0] == header + own  # a common header alone drops nothing
    known = np.unique(grams(copied))
    assert all(share_known(grams(document), known) < 0.2 for document in train)
    assert not any(other[:500] in document for document in train)
    assert len(train) == 2
    assert train[1].startswith(text(4)[:4000])


def test_the_name_wraps_any_text_corpus(tmp_path: Path) -> None:
    for split, seed in (("train", 1), ("validation", 2), ("test", 1)):
        (tmp_path / f"{split}.txt").write_text(text(seed), encoding="utf-8")
    found = load_corpus(f"distinct:text:{tmp_path}")
    assert found.splits == ("train", "validation", "test")
    assert found.documents("validation") == (text(2),)
    with pytest.raises(ValueError, match="no text in its split 'train'"):
        found.documents("train")
    with pytest.raises(ValueError, match="is synthetic"):
        load_corpus("distinct:copy")
    with pytest.raises(ValueError, match="write distinct:CORPUS"):
        find_entry("distinct")


def test_python_code_keeps_packages_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("large", 900), ("skipstone_own", 15), *((f"small{i}", 12) for i in range(8))):
        for i in range(2):
            path = tmp_path / "site" / name / f"m{i}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# {name}\n" + "x" * size, encoding="utf-8")
    library = tmp_path / "lib"
    library.mkdir()
    (library / "os.py").write_text("# os\n", encoding="utf-8")
    monkeypatch.setattr(
        installed.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path / "site"), "stdlib": str(library)}
    )
    for name, value in (("TEST_BYTES", 100), ("VALIDATION_BYTES", 90), ("MOST_OF_ONE", 1000)):
        monkeypatch.setattr(installed, name, value)
    found = load_corpus("python-code")
    splits_of: dict[str, set[str]] = {}
    for split in found.splits:
        for document in found.documents(split):
            splits_of.setdefault(document.split()[1], set()).add(split)
    assert set(splits_of) == {"large", "os", *(f"small{i}" for i in range(8))}
    assert all(len(splits) == 1 for splits in splits_of.values())
    assert splits_of["large"] == splits_of["os"] == {"train"}
    large = [document for document in found.documents("train") if "large" in document]
    assert len(large) == 1  # the other file would exceed the share of one package
