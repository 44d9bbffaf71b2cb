"""`python -m skipstone MODULE` runs another tool's module where our classes are known."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from skipstone.__main__ import main


def test_the_module_sees_its_own_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import sys\nif __name__ == '__main__':\n    print(sys.argv[1:], 'skipstone' in sys.modules)\n"
    (tmp_path / "a_tool_of_others.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["skipstone", "a_tool_of_others", "--flag", "x"])
    main()
    assert capsys.readouterr().out == "['--flag', 'x'] True\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [([], "usage"), (["--help"], "usage"), (["no_such_tool.main"], "there is no module 'no_such_tool.main'")],
)
def test_mistakes(words: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["skipstone", *words])
    with pytest.raises(SystemExit, match=says):
        main()


def test_the_server_finds_the_class_by_name() -> None:
    import transformers

    import skipstone

    assert transformers.SkipstoneForCausalLM is skipstone.SkipstoneForCausalLM
