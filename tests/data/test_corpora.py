"""The registry of corpora: published ones with small test files, installed ones, and ways to split."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import skipstone.data
from skipstone.data import installed, published
from skipstone.data.corpora import CORPORA, find_entry, load_corpus
from skipstone.data.corpus import Corpus, by_hash, contiguous, parse_percent
from skipstone.data.fetch import SourceFile

DOCUMENTS = st.lists(st.text(max_size=20), min_size=1, max_size=8)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test here may find or write a file outside its own folder, or reach the network."""
    monkeypatch.setenv("SKIPSTONE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SKIPSTONE_OFFLINE", "1")


def corpus(readers: dict[str, object]) -> Corpus:
    return Corpus(name="made", description="", licence="", readers=readers)  # type: ignore[arg-type]


@given(DOCUMENTS, st.sampled_from([(90, 10), (50, 50), (80, 10, 10), (1, 98, 1)]))
def test_contiguous_splits_lay_end_to_end_are_the_text(documents: list[str], percent: tuple[int, ...]) -> None:
    parts = {split: "".join(read()) for split, read in contiguous(lambda: tuple(documents), percent).items()}
    whole = "".join(documents)
    assert list(parts) == ["train", "validation", "test"][: len(percent)]
    assert "".join(parts.values()) == whole
    assert len(parts["train"]) == len(whole) * percent[0] // 100


@given(DOCUMENTS)
def test_hash_splits_are_a_partition_that_other_documents_do_not_move(documents: list[str]) -> None:
    alone = {split: read() for split, read in by_hash(lambda: tuple(documents)).items()}
    beside = {split: read() for split, read in by_hash(lambda: ("another", *documents)).items()}
    assert sorted(text for part in alone.values() for text in part) == sorted(documents)
    for split, part in alone.items():
        assert tuple(text for text in beside[split] if text in documents) == part or "another" in documents


def test_hash_shares_are_90_5_5() -> None:
    documents = tuple(map(str, range(4000)))
    sizes = {split: len(read()) for split, read in by_hash(lambda: documents).items()}
    assert abs(sizes["train"] - 3600) < 80
    assert abs(sizes["validation"] - 200) < 50
    assert abs(sizes["test"] - 200) < 50


def test_hash_shares_may_be_small_and_leave_whole_per_cents_alone() -> None:
    documents = tuple(map(str, range(4000)))
    usual, fine = (by_hash(lambda: documents, parse_percent(text, "x")) for text in ("90-5-5", "89.5-0.5-10"))
    assert usual["train"]() == by_hash(lambda: documents)["train"]()
    assert 5 <= len(fine["validation"]()) <= 40
    assert set(fine["train"]()) | set(fine["validation"]()) == set(usual["train"]())
    assert sorted(fine["test"]()) == sorted(usual["validation"]() + usual["test"]())


@pytest.mark.parametrize(
    "text",
    ["", "100", "99.555-0.445", "99.5-.5.", "90-11", "90-0-10", "a-b", "-90-10", "25-25-25-25", "90 -10", "²0-80"],
)
def test_a_cut_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="per cent, sum 100"):
        parse_percent(text, "corpus x")


def test_missing_and_empty_splits_are_one_clear_line() -> None:
    with pytest.raises(ValueError, match=r"unknown split of corpus 'made' 'tests'; did you mean 'test'\?"):
        corpus({"test": lambda: ("a",)}).documents("tests")
    with pytest.raises(ValueError, match="corpus 'made' has no text in its split 'train'"):
        corpus({"train": lambda: ("", "")}).documents("train")
    assert corpus({"train": lambda: ("a", "", "b")}).documents("train") == ("a", "b")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny-shakespear", "did you mean 'tiny-shakespeare'"),
        ("enwik9", "did you mean 'enwik8'"),
        ("gcide:x", "takes nothing after a colon"),
        ("text", "write text:PATH"),
        ("hf:", "write hf:OWNER/NAME"),
        ("tiny-shakespeare:", "write tiny-shakespeare:80-10-10"),
        ("tiny-shakespeare:50-60", "'50-60' is not a split"),
        ("reset-s3", "is synthetic"),
    ],
)
def test_a_wrong_name_is_one_clear_line(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_corpus(name)
    assert "\n" not in str(caught.value)


def test_a_path_may_hold_colons() -> None:
    assert find_entry("text:C:/a:b.txt") == (CORPORA["text"], "C:/a:b.txt")


@pytest.mark.parametrize("name", ["tiny-shakespeare", "wikitext-2", "enwik8"])
def test_offline_and_absent_says_what_was_looked_for_where(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SKIPSTONE_DATA", str(tmp_path / "data"))
    with pytest.raises(FileNotFoundError, match="SKIPSTONE_OFFLINE is set") as caught:
        load_corpus(name).documents("train")
    message = str(caught.value)
    assert "\n" not in message
    for part in (f"{tmp_path / 'data' / name}", f"{tmp_path / 'cache' / name}", "$SKIPSTONE_DATA/"):
        assert part in message


def made(folder: Path, path: str, data: bytes, **fields: object) -> SourceFile:
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    return SourceFile(path=path, size=len(data), sha256=digest, url="http://127.0.0.1:9/none", **fields)  # type: ignore[arg-type]


def test_tiny_shakespeare_is_one_document_a_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SKIPSTONE_DATA", str(tmp_path))
    source = made(tmp_path, "tiny-shakespeare/input.txt", b"0123456789" * 10)
    two = published.tiny_shakespeare("", source)
    assert [len(two.documents(split)[0]) for split in two.splits] == [90, 10]
    three = published.tiny_shakespeare("80-10-10", source)
    assert [len(three.documents(split)[0]) for split in three.splits] == [80, 10, 10]


def test_wikitext_without_train_still_serves_evaluation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SKIPSTONE_DATA", str(tmp_path))
    here = {"validation": made(tmp_path, "wikitext-2/valid.txt", "a <unk> é\r\n".encode())}
    wikitext = published.wikitext_2("", published.WIKITEXT | here)
    assert wikitext.documents("validation") == ("a <unk> é\r\n",)
    with pytest.raises(FileNotFoundError, match=r"wikitext-2/train\.txt is not here"):
        wikitext.documents("train")


def test_enwik8_is_cut_at_bytes_but_never_inside_a_character(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SKIPSTONE_DATA", str(tmp_path))
    data = "aé€😀b".encode()  # 1 + 2 + 3 + 4 + 1 bytes
    source = made(tmp_path, "enwik8/enwik8", data)
    for low in range(1, len(data)):
        for high in range(low, len(data)):
            corpus = published.enwik8("", source, (low, high))
            parts = [read()[0].encode() for read in corpus.readers.values()]
            assert b"".join(parts) == data
            assert 0 <= low - len(parts[0]) < 4
            assert 0 <= high - len(parts[0] + parts[1]) < 4


def test_gcide_entries_are_documents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SKIPSTONE_DATA", str(tmp_path))
    head = b"\n\n00-database-short\n   A dictionary\n\n"
    text = head + b"Abc \\A*bc\\, n.\n   First.\n\n   Second\x92s.\n\nAbd \\Abd\\, a.\n   Third.\n"
    source = made(tmp_path, "gcide/gcide.dict.dz", gzip.compress(text))
    parts = {split: read() for split, read in published.gcide("", source).readers.items()}
    found = sorted(entry for part in parts.values() for entry in part)
    assert found == ["Abc \\A*bc\\, n.\n   First.\n\n   Second’s.\n", "Abd \\Abd\\, a.\n   Third.\n"]


def test_gcide_absent_names_the_package(tmp_path: Path) -> None:
    source = SourceFile(path="gcide/gcide.dict.dz", system=(str(tmp_path / "no"),), hint=published.GCIDE.hint)
    with pytest.raises(FileNotFoundError, match=r"looked for .*no; install Debian's package dict-gcide"):
        published.gcide("", source).documents("train")


def test_python_sources_are_ordered_and_ours_alone(tmp_path: Path) -> None:
    files = {
        "b.py": b"b",
        "a/c.py": "é".encode(),
        "a.py": b"a",
        "bad.py": b"\xff",
        "site-packages/x.py": b"x",
        "n.txt": b"n",
    }
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert installed.sources(tmp_path) == ("a", "é", "b")
    with pytest.raises(FileNotFoundError, match="no Python sources below"):
        installed.sources(tmp_path / "nothing")


@pytest.mark.slow
def test_the_standard_library_is_a_corpus_here() -> None:
    stdlib = load_corpus("python-stdlib")
    read = {split: tuple(stdlib.documents(split)) for split in stdlib.splits}
    sizes = {split: sum(map(len, documents)) for split, documents in read.items()}
    assert sum(sizes.values()) > 5_000_000
    assert sizes["train"] > 5 * sizes["validation"] > 0
    own = Path(subprocess.__file__).read_text(encoding="utf-8")
    assert sum(own in documents for documents in read.values()) == 1


def test_packages_are_found_without_importing_them() -> None:
    assert (installed.package_folder("transformers") / "trainer.py").is_file()
    with pytest.raises(FileNotFoundError, match="needs the package no_such_package"):
        installed.package_folder("no_such_package")


def test_naming_corpora_imports_nothing_heavy() -> None:
    """The package's own __init__ is stood in for: what it imports is not this floor's."""
    root = Path(skipstone.data.__file__).parents[1]
    code = (
        "import sys, types\n"
        f"for name, path in (('skipstone', {str(root)!r}), ('skipstone.core', {str(root / 'core')!r})):\n"
        "    package = types.ModuleType(name); package.__path__ = [path]; sys.modules[name] = package\n"
        "import skipstone.data.corpora\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'tokenizers', 'datasets'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]"


def test_the_published_checksums_are_those_of_the_real_files(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`locate` compares size and SHA-256, so reading is the test; 65 characters is what the literature says."""
    shakespeare = load_corpus("tiny-shakespeare")
    if not (data_dir / "tiny-shakespeare" / "input.txt").is_file():
        pytest.skip("no tiny-shakespeare in SKIPSTONE_DATA")
    text = "".join(shakespeare.documents("train") + shakespeare.documents("validation"))
    assert (len(text), len(set(text))) == (1_115_394, 65)
    wikitext = load_corpus("wikitext-2")
    for split, source in published.WIKITEXT.items():
        if (data_dir / source.path).is_file():
            assert len(wikitext.documents(split)[0].encode()) == source.size
