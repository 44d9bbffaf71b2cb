"""`skipstone run-module MODULE` runs another tool's module with our classes registered."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from skipstone_cli.main import main

TOOL = """
import sys
from transformers import AutoConfig
if __name__ == '__main__':
    if sys.argv[1:] == ["fail"]:
        raise ValueError("the tool's own")
    print(sys.argv[1:], type(AutoConfig.for_model("skipstone")).__name__)
"""


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_tool_of_others.py").write_text(TOOL, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return "a_tool_of_others"


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    monkeypatch.setattr(sys, "argv", ["skipstone", "run-module", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


@pytest.mark.parametrize("words", [["--flag", "x"], ["--help"], ["a", "--", "b"], []])
def test_the_module_sees_its_own_arguments(
    tool: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tool, *words) == 0
    assert capsys.readouterr().out == f"{words} SkipstoneConfig\n"


def test_a_fault_of_the_tool_keeps_its_traceback(
    tool: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tool, "fail") == 1
    assert capsys.readouterr().err.startswith("Traceback")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "Missing argument 'MODULE'"),
        (["no_such_tool.main"], "there is no module 'no_such_tool.main'"),
        (["os.path.x"], "there is no module 'os.path.x'"),
        (["os..path"], "there is no module 'os..path'"),
        (["xml.etree"], "module 'xml.etree' is a package without __main__"),
    ],
)
def test_mistakes(
    words: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *words) == 2
    told = capsys.readouterr().err
    assert says in told
    assert "Traceback" not in told


def test_the_server_finds_the_class_by_name() -> None:
    import transformers

    import skipstone

    assert transformers.SkipstoneForCausalLM is skipstone.SkipstoneForCausalLM
