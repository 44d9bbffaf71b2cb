"""Each verb passes its arguments to one library function, which is replaced by one that records them."""

from __future__ import annotations

import json
import shutil
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.table import Table

from skipstone_cli.main import main

SRC = Path(__file__).resolve().parents[2] / "src"
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Figures:
    def to_dict(self) -> dict[str, Any]:
        return {"loss": 1.5}

    def markdown(self) -> str:
        return "| loss |\n"

    def table(self) -> Table:
        table = Table("loss")
        table.add_row("1.5")
        return table


def listen(monkeypatch: pytest.MonkeyPatch, module: str, function: str, answer: Any) -> list[Call]:
    calls: list[Call] = []

    def note(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return answer

    stand_in = ModuleType(module)
    setattr(stand_in, function, note)
    package, _, name = module.rpartition(".")
    monkeypatch.setitem(sys.modules, module, stand_in)
    monkeypatch.setattr(import_module(package), name, stand_in, raising=False)
    return calls


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["skipstone", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/config.yaml").touch()
    Path("run/config.yaml").write_text("model: {}\ndata: {}\ntrain: {}\n", encoding="utf-8")


def test_train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = listen(monkeypatch, "skipstone.train.training", "train", Path("runs/a"))
    Path("a.yaml").write_text("name: a\ntrain: {steps: 2}\n", encoding="utf-8")
    shutil.copytree("run", "runs/a")
    command(monkeypatch, "train", "a.yaml", "train.steps=3", "--out", "runs/a", "--resume")
    assert calls == [(({"name": "a", "train": {"steps": 3}},), {"out": Path("runs/a"), "resume": True})]
    assert capsys.readouterr().out == "run folder: runs/a\n"


def test_train_estimates(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Answer:
        def lines(self) -> list[str]:
            return ["hours 3"]

    calls = listen(monkeypatch, "skipstone.train.estimate", "estimate", Answer())
    sys.modules["skipstone.train"].estimate = sys.modules["skipstone.train.estimate"]  # type: ignore[attr-defined]
    sys.modules["skipstone.train.estimate"].MFU = 0.4  # type: ignore[attr-defined]
    Path("a.yaml").write_text("train: {steps: 2}\n", encoding="utf-8")
    command(monkeypatch, "train", "a.yaml", "train.steps=3", "--estimate", "--gpu", "L4")
    assert calls == [(({"train": {"steps": 3}},), {"gpu": "L4", "mfu": 0.4})]
    assert capsys.readouterr().out == "hours 3\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "a.yaml", "--gpu", "L4"], "--gpu would have no effect without --estimate"),
        (["train", "a.yaml", "--estimate", "--out", "x"], "--out would have no effect with --estimate"),
        (["prepare", "jsonl:x"], "--out is missing; name the folder for the shards"),
        (["prepare", "run", "--check", "--split", "90-10"], "--check writes nothing, so --split would have no effect"),
    ],
)
def test_options_without_effect(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["skipstone", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"skipstone: {message}")


def test_prepare_and_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "".join(json.dumps({"body": f"text {i}"}) + "\n" for i in range(20))
    Path("a.jsonl").write_text(lines, encoding="utf-8")
    words = ["prepare", "jsonl:a.jsonl", "--field", "body", "--split", "70-30", "--shard-tokens", "40"]
    command(monkeypatch, *words, "--out", "shards")
    told = capsys.readouterr()
    assert told.out.splitlines()[-1] == "shards: shards"
    assert sum(int(line.split()[1]) for line in told.out.splitlines()[:-1]) == 20
    assert len(told.err.splitlines()) > 2, "a line a shard"
    command(monkeypatch, "prepare", "shards", "--check")
    assert "shards agree with manifest.json" in capsys.readouterr().out
    path = Path("shards/train-00000.tokens")
    path.write_bytes(path.read_bytes()[::-1])
    monkeypatch.setattr("sys.argv", ["skipstone", "prepare", "shards", "--check"])
    with pytest.raises(SystemExit):
        main()
    assert "train-00000.tokens is damaged" in capsys.readouterr().err


def test_eval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = listen(monkeypatch, "skipstone.evaluate.evaluation", "evaluate", Figures())
    command(
        monkeypatch, "eval", "run", "--split", "test", "--batch-size", "2", "--json", "new/a.json", "--budget", ".5,.75"
    )
    options = {"split": "test", "batch_size": 2, "corpus": None, "context": None, "budgets": [0.5, 0.75]}
    assert calls == [((Path("run"),), options)]
    assert json.loads(Path("new/a.json").read_text(encoding="utf-8")) == {"loss": 1.5}
    assert "1.5" in capsys.readouterr().out


def test_eval_of_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = listen(monkeypatch, "skipstone.evaluate.harness", "evaluate_tasks", Figures())
    command(monkeypatch, "eval", "run", "--tasks", "a, b", "--include-path", "mine", "--limit", "3")
    options = {"include_path": Path("mine"), "limit": 3, "batch_size": 8}
    assert calls == [((Path("run"), ["a", "b"]), options)]


def test_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = listen(monkeypatch, "skipstone.evaluate.comparison", "compare", Figures())
    command(monkeypatch, "compare", "run", "run", "--markdown", "a.md")
    assert calls == [(([Path("run"), Path("run")],), {"dense": None, "forced": None})]
    assert Path("a.md").read_text(encoding="utf-8") == "| loss |\n"


def test_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = listen(monkeypatch, "skipstone.generate.text_generation", "stream_text", [])
    command(monkeypatch, "generate", "run", "--prompt", "O, ", "--max-new-tokens", "5", "--top-k", "3", "--seed", "7")
    options = {
        "max_new_tokens": 5,
        "temperature": None,
        "top_k": 3,
        "seed": 7,
        "greedy": False,
        "budget": None,
        "draft": None,
        "cache_bits": None,
    }
    assert calls == [((Path("run"), "O, "), options)]


def test_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = listen(monkeypatch, "skipstone.model.pretrained", "convert", None)
    command(monkeypatch, "convert", "gpt2", "out", "--dtype", "bfloat16")
    assert calls == [(("gpt2", Path("out")), {"dtype": "bfloat16"})]


def test_write(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = listen(monkeypatch, "skipstone.adapt.self_generated", "write", None)
    command(monkeypatch, "write", "source", "text", "--tokens", "900", "--start", "Once")
    (arguments, options), told = calls[0], capsys.readouterr()
    assert arguments == ("source", Path("text"))
    options.pop("report")(900)
    assert options == {"tokens": 900, "length": 256, "batch": 64, "start": "Once", "seed": 0, "dtype": None}
    assert told.out == "text: text\n"
    assert capsys.readouterr().err == "900 of 900 tokens\n"


def test_adapt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = listen(monkeypatch, "skipstone.adapt.adaptation", "adapt", Path("runs/a"))
    Path("a.yaml").write_text("adapt: {budget: 0.8}\n", encoding="utf-8")
    command(monkeypatch, "adapt", "source", "a.yaml", "adapt.budget=0.7", "--out", "runs/a")
    assert calls == [(("source", {"adapt": {"budget": 0.7}}), {"out": Path("runs/a"), "resume": False})]
    assert capsys.readouterr().out == "run folder: runs/a\n"


def test_reproduce(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = listen(monkeypatch, "skipstone_studies.run", "reproduce", Path("results/demo.md"))
    asked = ("--scale", "paper", "--arms", "dense, tsa", "--seeds", "0, 2", "--readme", "a.md", "--render")
    command(monkeypatch, "reproduce", "demo", *asked)
    chosen = {"scale": "paper", "arms": ["dense", "tsa"], "seeds": [0, 2]}
    places = {"out": None, "runs": Path("runs"), "readme": Path("a.md")}
    assert calls == [(("demo",), {**chosen, **places, "render_only": True, "jobs": 1, "html": False})]
    assert capsys.readouterr().out == "table: results/demo.md\n"


def test_the_list_of_experiments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    listen(monkeypatch, "skipstone_studies.run", "describe", {"demo": "five models side by side"})
    command(monkeypatch, "reproduce", "--list")
    assert capsys.readouterr().out.split(maxsplit=1) == ["demo", "five models side by side\n"]


def test_report(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = listen(monkeypatch, "skipstone.report.rendering", "write_report", None)
    Path("a.json").touch()
    Path("a.csv").touch()
    command(monkeypatch, "report", "run", "--out", "a.html", "--evaluation", "a.json", "--trace", "a.csv")
    assert calls == [(([Path("run")], Path("a.html")), {"evaluations": [Path("a.json")], "traces": [Path("a.csv")]})]


def test_trace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = listen(monkeypatch, "skipstone.evaluate.trace_file", "write_trace", 1200)
    Path("a.txt").touch()
    command(monkeypatch, "trace", "run", "--text", "a.txt", "--out", "a.csv", "--limit", "3")
    (args, options) = calls[0]
    options.pop("report")(2, 3)
    assert args == (Path("run"), Path("a.txt"), Path("a.csv"))
    assert options == {"context": None, "limit": 3}
    assert capsys.readouterr().out == "written: a.csv, 1,200 lines\n"


def test_view(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = listen(monkeypatch, "skipstone.view.serving", "serve", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    command(monkeypatch, "view", "run", "run", "--port", "0", "--no-browser")
    (args, options) = calls[0]
    options.pop("announce")("http://127.0.0.1:1/")
    assert args == ([Path("run"), Path("run")],)
    assert options == {"port": 0, "browser": False}
    assert capsys.readouterr().out == "http://127.0.0.1:1/  (Ctrl-C stops)\n"


def test_view_saves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = listen(monkeypatch, "skipstone.view.saved_page", "save_page", Path("a.html"))
    command(monkeypatch, "view", "run", "--save", "a.html", "--prompt", "once", "--new-tokens", "8")
    assert calls == [(([Path("run")], Path("a.html"), "once"), {"new_tokens": 8})]
    assert capsys.readouterr().out == "written: a.html\n"


@pytest.mark.parametrize(
    ("words", "installed", "says"),
    [
        (["run"] * 3, True, "view shows one or two models side by side, got 3"),
        (["run", "--prompt", "a"], True, "--prompt and --new-tokens belong to --save"),
        (["run", "--save", "a.html"], True, "--save needs --prompt TEXT"),
        (["run", "--save", "run", "--prompt", "a"], True, "exists already"),
        (["run"], False, "(starlette, uvicorn missing): pip install 'skipstone[view]'"),
    ],
)
def test_view_refuses(
    words: list[str], installed: bool, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if installed else None)
    monkeypatch.setattr("sys.argv", ["skipstone", "view", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
