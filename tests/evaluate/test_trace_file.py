"""The file of a depth map contains the decisions and losses of the executed pass."""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models import tiny_model
from skipstone.data.tokenizers import byte_tokenizer
from skipstone.evaluate.trace_file import write_trace
from skipstone.measure.depth_map import depth_maps
from skipstone.measure.token_trace import COLUMNS
from skipstone.measure.trace import trace_tokens
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.report.trace_table import read_trace

TEXT = 'one, "two"\nthree <b>four</b> ' * 3


def model_of(**options: object) -> SkipstoneForCausalLM:
    mechanisms = [
        {"name": "mixture_of_depths", "layers": [1], "capacity": 0.5, "decision": "threshold"},
        {"name": "token_selective", "layers": [1, 2], "start_bias": 0.0},
    ]
    sizes = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    return tiny_model(**{**sizes, "mechanisms": mechanisms, "max_position_embeddings": 16, **options})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model_of().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_line_for_each_token_block_and_mechanism() -> None:
    model, ids = model_of(), list(range(40))
    lines = [line for part in depth_maps(model, ids, 16) for line in part.lines(str)]
    assert len(lines) == 40 * (1 + 2 + 1)
    table = [dict(zip(COLUMNS, line, strict=True)) for line in lines]
    assert [line["token"] for line in table[::4]] == [str(i) for i in ids]
    assert [line["position"] for line in table[::4]] == [*range(16), *range(16), *range(8)]
    assert [line["row"] for line in table[::4]] == [0] * 16 + [1] * 16 + [2] * 8
    assert [(line["layer"], line["mechanism"]) for line in table[:4]] == [
        (0, None),
        (1, "mixture_of_depths"),
        (1, "token_selective"),
        (2, "token_selective"),
    ]
    assert all(line["kept"] and line["weight"] == 1 and line["score"] is None for line in table[::4])
    for outer, inner in zip(table[1::4], table[2::4], strict=True):
        assert (outer["weight"] != 0) == outer["kept"]
        assert (inner["score"] is None) == (not outer["kept"]), "only tokens that the outer one kept have a score"
    assert {line["kept"] for line in table[1::4]} == {True, False}


def test_losses_are_those_of_the_next_token_across_rows() -> None:
    model, ids = model_of(), [5, 6, 7, 8, 9, 10]
    losses = [line[-2] for part in depth_maps(model, ids, 4) for line in part.lines(str)][::4]
    assert losses[-1] is None
    with torch.no_grad():
        for rows, targets, found in (([5, 6, 7, 8], [6, 7, 8, 9], losses[:4]), ([9, 10], [10], losses[4:5])):
            logits = model(input_ids=torch.tensor([rows]), routing="causal").logits[0, : len(targets)]
            expected = torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="none")
            assert found == pytest.approx(expected.tolist(), abs=1e-5)


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(ValueError, match="the text is empty"):
        next(depth_maps(model_of(), [], 4))


def test_three_formats_hold_the_same_lines(saved: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    text = tmp_path / "a.txt"
    text.write_text(TEXT, encoding="utf-8")
    counts = {suffix: write_trace(saved, text, tmp_path / f"map.{suffix}") for suffix in ("parquet", "csv", "jsonl")}
    table = parquet.read_table(tmp_path / "map.parquet").to_pylist()
    assert {*counts.values()} == {len(table)} == {len(TEXT) * 4}
    assert tuple(table[0]) == COLUMNS
    assert "".join(line["token"] for line in table[::4]) == TEXT
    with (tmp_path / "map.jsonl").open(encoding="utf-8") as file:
        plain = [json.loads(line) for line in file]
    with (tmp_path / "map.csv").open(encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    for one, two, three in zip(table, plain, written, strict=True):
        exact = ("row", "position", "token", "layer", "mechanism", "kept")
        assert [one[name] for name in exact] == [two[name] for name in exact]
        assert [str(two[name]) if two[name] is not None else "" for name in COLUMNS] == list(three.values())
        assert one["loss"] == two["loss"] or math.isclose(one["loss"], two["loss"], rel_tol=1e-6)


def test_what_cannot_be_written_is_told_in_one_line(saved: Path, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("abc", encoding="utf-8-sig")
    assert write_trace(saved, text, tmp_path / "marked.csv") == 3 * 4  # a mark of the encoding is no token
    with pytest.raises(ValueError, match=r"unknown suffix of the file '\.parket'; did you mean '\.parquet'\?"):
        write_trace(saved, text, tmp_path / "map.parket")
    with pytest.raises(ValueError, match="context must be from 1 to 16"):
        write_trace(saved, text, tmp_path / "map.csv", context=17)
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        write_trace(saved, text, text.rename(tmp_path / "a.csv"))


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_report_reads_what_was_written(saved: Path, tmp_path: Path, suffix: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    write_trace(saved, text, tmp_path / f"map{suffix}")
    read = read_trace(tmp_path / f"map{suffix}")
    ids = torch.tensor(list(TEXT.encode()))
    whole = trace_tokens(model_of(), {"input_ids": ids[:80].view(5, 16)}, list(TEXT[:16]))
    assert read.tokens == list(TEXT[:16])
    assert read.kept_LT == whole.kept_LT
    for one, other in zip(read.weight_LT, whole.weight_LT, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert read.depth_T == pytest.approx(whole.depth_T)
    assert read.routed == whole.routed == {1, 2}
    groups = read.allocation.by_kind
    assert sum(group.tokens for group in groups) == len(TEXT)
    kinds = {group.name: group.tokens for group in groups}
    assert kinds["letters"] == sum(map(str.isalpha, TEXT))
    assert kinds["white space"] == sum(map(str.isspace, TEXT))
    assert read.depth == pytest.approx(sum(group.compute * group.tokens for group in groups) / len(TEXT))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "", "unknown suffix of a depth map"),
        ("a.csv", "row,position\n0,0\n", "is no depth map of `skipstone trace`: it has no 'loss'"),
        ("a.csv", "", "its rows are not numbered from 0"),
        ("a.jsonl", "{", "is no depth map"),
        ("a.jsonl", "[1]", "is no depth map"),
        ("a.parquet", "PAR1", "is no depth map"),
    ],
)
def test_what_is_no_depth_map_is_refused_in_one_line(name: str, content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=says) as error:
        read_trace(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_map_says_whether_decisions_saw_the_whole_row(tmp_path: Path, suffix: str) -> None:
    text, topk = tmp_path / "text.txt", [{"name": "mixture_of_depths", "capacity": 0.5, "decision": "topk"}]
    text.write_text(TEXT, encoding="utf-8")
    for name, options in (("causal", {}), ("oracle", {"mechanisms": topk})):
        model_of(**options).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write_trace(tmp_path / name, text, tmp_path / f"{name}{suffix}")
        assert read_trace(tmp_path / f"{name}{suffix}").routing == name


def test_a_map_of_an_earlier_release_does_not_claim_causality(saved: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    write_trace(saved, text, tmp_path / "map.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "map.jsonl").read_text().splitlines()]
    old = [json.dumps({name: value for name, value in line.items() if name != "routing"}) for line in lines]
    (tmp_path / "old.jsonl").write_text("\n".join(old))
    assert read_trace(tmp_path / "old.jsonl").routing == "unknown"


@pytest.mark.parametrize(
    ("suffix", "change", "says"),
    [
        (".csv", lambda text: text[:-12], "too few or too many cells"),
        (".csv", lambda text: text.replace("causal", "causal,1", 1), "too few or too many cells"),
        (".csv", lambda text: text.replace("True", "yes", 1), "kept must be true or false, got 'yes'"),
        (".jsonl", lambda text: text.replace("true", '"False"', 1), "kept must be true or false, got 'False'"),
        (".jsonl", lambda text: text.replace('"causal"', "3", 1), "unknown routing 3"),
        (".jsonl", lambda text: text.replace('"layer": 1', '"layer": 7'), "a token lacks number 1"),
    ],
)
def test_a_map_that_was_cut_or_changed_is_refused(
    saved: Path, tmp_path: Path, suffix: str, change: Callable[[str], str], says: str
) -> None:
    text, path = tmp_path / "text.txt", tmp_path / f"map{suffix}"
    text.write_text("abc", encoding="utf-8")
    write_trace(saved, text, path)
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=says):
        read_trace(path)
