"""The page of real runs is complete, self-contained and well-formed, with everything escaped."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from skipstone.report.frontier_chart import Place, frontier
from skipstone.report.rendering import write_report
from skipstone.runs import distinct_names

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Fails on tags that do not nest; collects headings and tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2") and data.strip():
            self.headings.append(data.strip())


def page_of(runs: list[Path], out: Path, **options: object) -> tuple[str, Page]:
    text = write_report(runs, out / "report.html", **options).read_text(encoding="utf-8")  # type: ignore[arg-type]
    return text, Page(text)


def test_the_page_of_two_runs(runs: dict[str, Path], tmp_path: Path) -> None:
    samples = {"routed": [("O <b>", 1.0), ("x\n", 0.25)]}
    text, page = page_of(list(runs.values()), tmp_path, samples=samples)
    assert page.headings == [
        "Report on 2 runs",
        "Figures",
        "Loss",
        "Loss against executed FLOPs",
        "Where the compute went",
        "Which tokens got the compute",
        "Which activations the neurons chose",
        "Generated text",
        "Configuration",
    ]
    assert "O &lt;b&gt;" in text
    assert "mixture of depths on blocks 1; token selective on blocks 2; polyglu" in text
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe"}
    assert not re.search(r"https?://|url\(|@import", text.replace("http://www.w3.org/2000/svg", "")), (
        "it must fetch nothing"
    )


def test_the_one_script_is_the_one_that_the_policy_allows(runs: dict[str, Path], tmp_path: Path) -> None:
    text, page = page_of([runs["routed"]], tmp_path, samples={"routed": [("<script>alert(1)</script>", 0.5)]})
    (script,) = re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = (a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_every_picture_has_its_numbers(runs: dict[str, Path], tmp_path: Path) -> None:
    text, page = page_of(list(runs.values()), tmp_path)
    pictures = [a for tag, a in page.tags if tag == "svg" and a.get("role") == "img"]
    assert len(pictures) == text.count('<details class="numbers">') > 12
    assert "<td>mixture_of_depths</td><td>0.5</td><td>0.5</td>" in text, "the bar and what was configured"


def test_the_runs_that_no_other_one_beats_are_the_frontier() -> None:
    places = [
        Place(run=None, label=label, flops=flops, loss=loss)  # type: ignore[arg-type]
        for label, flops, loss in (("a", 2, 3), ("b", 1, 4), ("c", 2, 2.5), ("d", 3, 2.6), ("e", 4, 1), ("f", 1, 5))
    ]
    assert [place.label for place in frontier(places)] == ["b", "c", "e"]


def test_every_picture_is_valid_xml(runs: dict[str, Path], tmp_path: Path) -> None:
    text, _ = page_of(list(runs.values()), tmp_path)
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) > 8
    for picture in pictures:
        ElementTree.fromstring(picture)


def test_the_picture_shows_what_was_kept(runs: dict[str, Path], tmp_path: Path) -> None:
    _, page = page_of([runs["routed"]], tmp_path)
    cells = [attributes["class"] for tag, attributes in page.tags if tag == "rect" and "class" in attributes]
    # Layer 0 is not routed; layer 1 keeps every second token by position; layer 2's gates start open.
    assert cells.count("plain") == 1
    assert cells.count("skipped") >= 16
    assert cells.count("more") + cells.count("less") + cells.count("skipped") == 2 * 32


def test_what_neurons_chose_by_layer_neuron_and_kind(runs: dict[str, Path], tmp_path: Path) -> None:
    text, _ = page_of([runs["routed"]], tmp_path)
    for caption in (
        "entropy while it trained",
        "for letters",
        "for signs",
        "for white space",
        "how far routing shifts",
    ):
        assert caption in text, caption
    assert "for digits" not in text, "the text has none"
    assert "one of" not in text, "few enough neurons to show all"
    assert re.findall(r"layer 2, neurons 0 to \d+: \w+", text)
    assert "<figcaption>tau</figcaption>" in text


def test_a_dense_run_alone(runs: dict[str, Path], tmp_path: Path) -> None:
    text, page = page_of([runs["dense"]], tmp_path)
    assert page.headings == ["Report on one run", "Figures", "Loss", "Configuration"]
    assert "100.0%" in text


def test_the_same_run_twelve_times(runs: dict[str, Path], tmp_path: Path) -> None:
    text, _ = page_of([runs["dense"]] * 12, tmp_path)
    assert "dense (1)" in text
    assert "dense (12)" in text


def test_folders_of_one_name_are_told_apart(runs: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other" / "dense"
    shutil.copytree(runs["dense"], other)
    text, _ = page_of([runs["dense"], other], tmp_path)
    assert "other/dense" in text


def test_a_run_without_validation_or_data_still_has_a_page(runs: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(runs["routed"], copy)
    metrics = copy / "metrics.jsonl"
    kept = [line for line in metrics.read_text(encoding="utf-8").splitlines(True) if '"train"' in line]
    metrics.write_text("".join(kept), encoding="utf-8")
    result = json.loads((copy / "result.json").read_text(encoding="utf-8"))
    del result["metrics_lines"], result["sha256"]
    (copy / "result.json").write_text(json.dumps(result), encoding="utf-8")
    config = copy / "config.yaml"
    text = re.sub("text:/.*", "text:/nowhere/at all", config.read_text(encoding="utf-8"))
    config.write_text(re.sub("# sha256 of .*\n", "", text), encoding="utf-8")
    text, page = page_of([copy], tmp_path)
    assert page.headings == ["Report on one run", "Figures", "Loss", "Configuration"]
    assert "No pictures of copy: " in text
    assert "validation, causal decisions" not in text


def test_nothing_is_overwritten_unasked(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"report\.html' exists already"):
        write_report([runs["dense"]], out)
    assert out.read_text(encoding="utf-8") == "mine"
    write_report([runs["dense"]], out, replace=True)
    assert "Report on one run" in out.read_text(encoding="utf-8")


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write_report([tmp_path / "absent"], tmp_path / "a.html")
    with pytest.raises(ValueError, match="neither a run folder"):
        write_report([tmp_path], tmp_path / "a.html")
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path / "a.html")


def test_runs_are_named_by_as_many_folders_as_they_need(tmp_path: Path) -> None:
    assert distinct_names([]) == []
    assert distinct_names([tmp_path / "a/x", tmp_path / "a/y"]) == ["x", "y"]
    assert distinct_names([tmp_path / "a/seed0/x", tmp_path / "b/seed0/x"]) == ["a/seed0/x", "b/seed0/x"]
    assert distinct_names([tmp_path / "x", tmp_path / "x"]) == ["x (1)", "x (2)"]
