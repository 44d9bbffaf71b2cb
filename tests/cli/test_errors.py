"""Mistakes of users give one line on stderr and exit code 2; internal errors keep their traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from skipstone_cli.errors import describe, one_line_errors
from skipstone_cli.main import main


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["skipstone", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, captured.out, captured.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "absent.yaml"], "recipe 'absent.yaml' does not exist"),
        (["train", "."], "recipe '.' is a folder"),
        (["eval", "absent"], "run folder 'absent' does not exist"),
        (["eval", "taken.txt"], "run folder 'taken.txt' is a file"),
        (["eval", ".", "--json", "taken.txt"], "--json 'taken.txt' exists already"),
        (["eval", ".", "--tasks", "a", "--corpus", "b"], "--corpus would have no effect with --tasks"),
        (["eval", ".", "--limit", "3"], "--limit would have no effect without --tasks"),
        (["convert", "a", "b", "--to", "hardned"], "did you mean 'hardened'?"),
        (["compare", ".", "absent"], "run folder 'absent' does not exist"),
        (["compare", ".", "--markdown", "taken.txt"], "--markdown 'taken.txt' exists already"),
        (["generate", "absent", "--prompt", "a"], "run folder 'absent' does not exist"),
        (["generate", ".", "--prompt", "a", "--greedy", "--seed", "1"], "--seed would have no effect"),
        (["generate", ".", "--prompt", "a", "--temperature", "0"], "--temperature must be above 0, got 0"),
        (["generate", ".", "--prompt", "a", "--temperature", "nan"], "--temperature must be above 0, got nan"),
        (["convert", "gpt2", "taken.txt"], "output folder 'taken.txt' exists already"),
        (["prepare", "jsonl:taken.txt", "--out", "a", "--tokenizer", ""], "unknown tokenizer ''"),  # was byte, silently
        (["reproduce"], "name a study"),
        (["generate", ".", "--prompt", "a", "--cache-bits", "8"], "--cache-bits must be 32 or 16, got 8"),
        (["quantise", ".", "out", "--cache-bits", "4"], "--cache-bits must be 32 or 16, got 4"),
        (["reproduce", "demo", "--out", "taken.txt"], "--out 'taken.txt' must be a folder, but"),
        (["reproduce", "demo", "--runs", "taken.txt/a"], "--runs 'taken.txt/a' must be a folder, but"),
        (["compare", ".", "--json", "a", "--markdown", "./a"], "--json and --markdown name the same file, 'a'"),
        (["view", ".", "--save", "a", "--prompt", "b", "--port", "80"], "--save starts no server, so --port"),
        (["reproduce", "demo", "--seeds", "0,x"], "--seeds must be different whole numbers"),
        (["reproduce", "demo", "--seeds", "1,1"], "--seeds must be different whole numbers"),
        (["report", ".", "--out", "taken.txt"], "--out 'taken.txt' exists already"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken.txt").write_text("mine", encoding="utf-8")
    code, out, err = command(monkeypatch, capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("skipstone: ")
    assert err.count("\n") == 1
    assert says in err
    assert Path("taken.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian"], "Did you mean 'train', 'trace'?"),
        (["train", "x.yaml", "--resum"], "--resume"),
        (["generate", "x"], "--prompt"),
        (["reproduce", "demo", "--scale", "big"], "laptop"),
        (["eval", "x", "--batch-size", "0"], "--batch-size"),
    ],
)
def test_an_unknown_verb_or_option_is_answered_by_the_parser(
    words: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = command(monkeypatch, capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("Usage: skipstone")
    assert says in err


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from skipstone import __version__

    assert command(monkeypatch, capsys, "--version") == (0, f"skipstone {__version__}\n", "")


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="ours"), one_line_errors():
        raise RuntimeError("ours")


def test_a_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPSTONE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="theirs"), one_line_errors():
        raise ValueError("theirs")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (ValueError(), "ValueError"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "No such file or directory: a.txt"),
        (FileExistsError("run folder 'a' exists"), "run folder 'a' exists"),
    ],
)
def test_an_error_is_described_in_one_line(error: Exception, text: str) -> None:
    assert describe(error) == text


def test_memory_that_is_refused_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    for ask in (lambda: torch.empty(1 << 60), lambda: bytearray(1 << 62)):
        with pytest.raises(SystemExit) as stop, one_line_errors():
            ask()
        assert stop.value.code == 2
        told = capsys.readouterr().err
        assert told.startswith("skipstone: not enough memory")
        assert told.count("\n") == 1
