"""The command starts quickly: nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src"
HEAVY = ("torch", "transformers", "numpy", "datasets")
Command = Callable[..., tuple[str, list[str]]]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(SRC)},
    )


SERVER = f"""
import gc, importlib, io, json, os, sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache
from importlib.machinery import SourceFileLoader
import skipstone_cli.main as command
from skipstone.core.placeholders import checked_lightly
for name in (  # light, and what an answer spends its time on
    "omegaconf._impl", "pydantic.plugin._loader", "typer._adapters", "importlib.metadata",
    "skipstone.train.early", "skipstone.runs", "skipstone_cli.recipes", "skipstone_cli.overrides",
    "skipstone.data.corpora", "skipstone.adapt.adapt_recipe", "skipstone_studies.isoflop.spec",
):
    with suppress(ImportError):
        importlib.import_module(name)
SourceFileLoader.get_code = cache(SourceFileLoader.get_code)  # each command imports the same modules by itself
checked_lightly("skipstone.train.setup", "model_mistakes", {{"model": {{}}}})
assert not [name for name in {HEAVY!r} if name in sys.modules]
gc.disable()
for line in sys.stdin:
    if (child := os.fork()) == 0:
        sys.argv = ["skipstone", *json.loads(line)]
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as told:
            try:
                command.main()
            except SystemExit:
                pass
        heavy = [name for name in {HEAVY!r} if name in sys.modules]
        os.write(1, (json.dumps([told.getvalue(), heavy]) + "\\n").encode())
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        os.write(1, b"null\\n")
"""


@pytest.fixture(scope="module")
def command() -> Iterator[Command]:
    """A function that runs a command in a fork of a process which has imported the command line alone.

    It returns what the command wrote to stderr and the heavy modules that it has loaded.
    """
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def answer(*words: str) -> tuple[str, list[str]]:
            server.stdin.write(json.dumps(words) + "\n")
            server.stdin.flush()
            told, heavy = json.loads(server.stdout.readline())
            return told, heavy

        yield answer
        server.stdin.close()


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["eval", "no-such-folder"]])
def test_nothing_heavy_is_imported(words: list[str], command: Command) -> None:
    assert command(*words)[1] == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--resume", "--out", "absent"], ["run folder 'absent' does not exist: nothing to resume"]),
        (
            ["train.stpes=4", "data.contxt=4", "model.hidden_size=33", "nmae=x"],
            [
                "unknown key in train 'stpes'; did you mean 'steps'?",
                "did you mean 'context'?",
                "hidden_size (33) must be a multiple",
                "did you mean 'name'?",
            ],
        ),
        (
            ["data.corpus=text:/absent", "train.beta1=2", "train.steps=0", "model.hiden_size=4"],
            [
                "beta1 must be in [0, 1), got 2.0 (typed: train.beta1=2)",
                "/absent",
                "steps must be at least 1, got 0",
                "did you mean 'hidden_size'?",
            ],
        ),
        pytest.param(
            ["model.mechanisms.0.capacity=1.5", "model.mechanisms.0.decision=treshold", "train.batch_size=ten"],
            ["capacity must be in (0, 1], got 1.5", "did you mean 'threshold'?", "batch_size must be int, got 'ten'"],
            marks=pytest.mark.slow,
        ),
        (
            ["model.mechanisms.0.layers=9:", "train.stpes=4"],
            ["mechanisms[0].layers '9:' matches none of the model's 6 blocks", "did you mean 'steps'?"],
        ),
        pytest.param(
            ["model.mechanisms.0.name=mixture_of_depth"], ["did you mean 'mixture_of_depths'?"], marks=pytest.mark.slow
        ),
        (["model.neuron_groups={decision: zeros}"], ["needs an activation that is exactly 0"]),
        (["model.activation={name: polyglu, tau_end: -1}", "model.norm=rms"], ["tau_end must be in", "'rmsnorm'"]),
        pytest.param(["model.preset=gpt3"], ["unknown preset 'gpt3'; did you mean 'gpt2'?"], marks=pytest.mark.slow),
    ],
)
def test_a_mistake_in_a_recipe_is_answered_without_torch(words: list[str], says: list[str], command: Command) -> None:
    told, loaded = command("train", str(SRC.parent / "recipes" / "mod.yaml"), *words)
    lines = told.splitlines()
    assert loaded == []
    assert len(lines) == len(says)
    assert all(any(text in line for line in lines) for text in says)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data.contxt=4", "model.hiden_size=4"], ["did you mean 'context'?", "did you mean 'hidden_size'?"]),
        pytest.param(
            ["train.beta1=2", "--budgets=-1"],
            ["got 2.0 (typed: train.beta1=2)", "budgets must be above 0, got -1.0"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["model.mechanisms.0.capacity=7"], ["capacity must be in (0, 1], got 7.0"], marks=pytest.mark.slow
        ),
        (["arms={wide: {mechanisms: []}, deep: {nrom: rmsnorm}}"], ["arm 'deep': unknown key in model 'nrom'"]),
        (["arms={wide: {}}", "--arms=wdie", "data.corpus=txet:x"], ["did you mean 'wide'?", "did you mean 'text'?"]),
        (["--sizes=36,48x2"], ["size '36x4': the width must be a multiple of 8"]),
    ],
)
def test_a_mistake_in_a_grid_is_answered_without_torch(words: list[str], says: list[str], command: Command) -> None:
    told, loaded = command("isoflop", str(SRC.parent / "recipes" / "isoflop.yaml"), *words)
    lines = told.splitlines()
    assert loaded == []
    assert len(lines) == len(says)
    assert all(any(text in line for line in lines) for text in says)


@pytest.mark.parametrize("name", ["isoflop", "activations"])
def test_a_sound_grid_has_no_mistakes_without_torch(name: str, command: Command) -> None:
    told, loaded = command("isoflop", str(SRC.parent / "recipes" / f"{name}.yaml"), "train.stpes=4")
    assert loaded == []
    assert told.count("\n") == 1
    assert "'stpes'" in told


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["eval", "."], "'.' is neither a run folder (no config.yaml) nor a saved model (no config.json)"),
        (["report", "."], "'.' is neither a run folder"),
        (["compare", "."], "'.' is neither a run folder"),
        (["calibrate", "."], "'.' is neither a run folder"),
        (["draft-head", "."], "'.' is neither a run folder"),
        (["draft-head", ".", "--steps", "2", "--minutes", "1"], "--minutes and --steps both say how long to train"),
        (["draft-head", ".", "--minutes", "-1"], "--minutes must be above 0, got -1"),
        (["generate", ".", "--prompt", "x"], "'.' is neither a run folder"),
        (["trace", ".", "--text", __file__, "--out", "absent.csv"], "'.' is neither a run folder"),
        (["prepare", "jsnol:x", "--out", "absent"], "unknown corpus 'jsnol'; did you mean 'jsonl'?"),
        (["prepare", "jsonl:x", "--out", "absent", "--tokenizer", "bite"], "unknown tokenizer 'bite'"),
        (["reproduce", "dmeo"], "unknown study 'dmeo'; did you mean 'demo'?"),
        (["convert", "./absent", "out"], "source './absent' does not exist"),
        (["write", "absent.gguf", "out"], "source 'absent.gguf' does not exist"),
    ],
)
def test_what_is_no_run_or_corpus_is_told_without_torch(words: list[str], says: str, command: Command) -> None:
    told, loaded = command(*words)
    assert loaded == []
    assert told.startswith("skipstone: ")
    assert told.count("\n") == 1
    assert says in told


# Without those of the verb isoflop, whose models depend on the size.
RECIPES = sorted(path for path in (SRC.parent / "recipes").rglob("*.yaml") if "\narms:" not in path.read_text())
QUICK = ("all", "adapt-neurons", "mod-boundary")


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else pytest.mark.slow) for path in RECIPES],
)
def test_a_sound_model_has_no_mistakes_without_torch(recipe: Path, command: Command) -> None:
    verb = ["adapt", "x"] if recipe.stem.startswith("adapt-") else ["train"]
    told, loaded = command(*verb, str(recipe), "train.stpes=4", "train.warmup_steps=0")
    assert loaded == []
    expected = ("'stpes'", "there is no folder")  # the deliberate mistake, and a corpus that is not here
    assert [line for line in told.splitlines() if not any(text in line for text in expected)] == []


def test_adapt_answers_without_torch(command: Command) -> None:
    told, loaded = command(
        "adapt",
        "x",
        str(SRC.parent / "recipes" / "adapt-mod.yaml"),
        "adapt.budgt=4",
        "train.batch_size=0",
        "model.mechanisms.0.capacity=2",
    )
    assert loaded == []
    assert "did you mean 'budget'?" in told
    assert "batch_size must be at least 1" in told
    assert "capacity must be in (0, 1], got 2.0" in told


@pytest.mark.parametrize(
    ("word", "says"),
    [("--version", "skipstone "), pytest.param("calibrat", "Did you mean 'calibrate'?", marks=pytest.mark.slow)],
)
def test_the_package_run_as_a_module_is_the_command(word: str, says: str) -> None:
    done = run("-X", "importtime", "-m", "skipstone", word)
    assert says in done.stdout + done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "skipstone_cli.main" in loaded
    assert not loaded & {*HEAVY}


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        f"import sys, skipstone; print([name for name in {HEAVY!r} if name in sys.modules], len(dir(skipstone)) > 14)"
    )
    assert run("-c", code).stdout == "[] True\n"


CONFIGURED = """
found = AutoConfig.for_model("skipstone")
print(type(found) is skipstone.SkipstoneConfig, {*skipstone.__all__} <= {*dir(skipstone)})
"""
CLASSIFIER = """
from transformers import AutoModelForSequenceClassification
print(AutoModelForSequenceClassification._model_mapping[skipstone.SkipstoneConfig].__name__)
"""


# transformers is imported before the thread starts: two threads that import it at once fail without Skipstone, too.
IN_A_THREAD = """
import importlib, threading, skipstone, transformers
load = threading.Thread(target=importlib.import_module, args=["transformers.models.auto.modeling_auto"])
load.start()
from transformers import AutoConfig
load.join()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "before",
    [
        "import skipstone; from transformers import AutoConfig",
        "from transformers import AutoConfig; import skipstone",
        "import skipstone; from transformers import AutoTokenizer, AutoConfig",
        "import skipstone; from transformers import LlamaForCausalLM, AutoConfig",  # loads ours in its middle
        "import skipstone; from skipstone import Routed; from transformers import AutoConfig",
        "import skipstone, skipstone.model.decoder; from transformers import AutoConfig",
        "import skipstone, skipstone.runs, skipstone.nn.block; from transformers import AutoConfig",
        IN_A_THREAD,
    ],
)
def test_the_auto_classes_know_the_models(before: str) -> None:
    done = run("-c", before + CONFIGURED + CLASSIFIER)
    assert done.stdout == "True True\nSkipstoneForSequenceClassification\n", done.stderr
