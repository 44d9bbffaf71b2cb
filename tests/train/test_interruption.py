"""A run interrupted anywhere continues with --resume, and damaged or missing files are named and not used."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from skipstone.core import atomic_write, checksums
from skipstone.core.atomic_write import WriteError
from skipstone.runs import Run
from skipstone.train import folder as folders
from train.tool import MODELS, at_step, lines, recipe, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A recipe and its finished run, with two checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    config = recipe(folder, MODELS["ema_threshold"], steps=6, save_every=3)
    return config, train(config, folder / "whole")


@pytest.fixture
def run(finished: tuple[dict[str, Any], Path], tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """The same, to be damaged, and not finished."""
    shutil.copytree(finished[1], tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    return finished[0], tmp_path / "run"


def text_of(folder: Path) -> dict[str, Any]:
    """The files of a finished run that hold no times, and their bytes."""
    names = [*(folder / "tokenizer").iterdir(), *(folder / "model").iterdir(), folder / "config.yaml"]
    return {path.name: path.read_bytes() for path in names if path.name != "README.md"} | {"lines": lines(folder)}


def test_a_finished_run_is_not_longer_than_its_recipe(
    finished: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder = finished
    longer = {**config, "train": {**config["train"], "steps": 9}}
    with pytest.raises(ValueError, match=r"the recipe differs from the run's in train.steps: 6 there, 9 now"):
        train(longer, folder, resume=True)
    assert "finished already" not in capsys.readouterr().err
    assert train(config, folder, resume=True) == folder


def test_killed_between_model_and_result(run: tuple[dict[str, Any], Path], finished: tuple[Any, Path]) -> None:
    config, folder = run
    (folder / "checkpoints" / ".partial").mkdir()  # killed just after its last checkpoint had got its name
    shutil.copytree(folder / "checkpoints" / "checkpoint-3", folder / "checkpoints" / "checkpoint-1")
    train(config, folder, resume=True)
    assert text_of(folder) == text_of(finished[1])
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"checkpoint-3", "checkpoint-6"}
    assert {path.name for path in folder.iterdir()} == {path.name for path in finished[1].iterdir()}


def test_killed_while_the_folder_is_made(finished: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    def cut(partial: Path) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        folders.create(folder, {"model": {}}, 0, {"tokenizer": cut})
    assert list(tmp_path.iterdir()) == [], "nothing that would be in the way"
    (tmp_path / ".run.partial").mkdir()  # what SIGKILL leaves
    folder.mkdir()  # what earlier releases left
    assert train(finished[0], folder) == folder
    assert not (tmp_path / ".run.partial").exists()


def test_a_tokenizer_that_was_never_written_is_written(run: tuple[dict[str, Any], Path]) -> None:
    config, folder = run
    shutil.rmtree(folder / "tokenizer")
    train(config, folder, resume=True)
    assert AutoTokenizer.from_pretrained(folder / "tokenizer")
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").write_text("")
    with pytest.raises(ValueError, match="tokenizer' is a file"):
        train(config, folder, resume=True)


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "window.json")
QUICK = {(FILES[0], True), (FILES[4], True), (FILES[1], False), (FILES[3], False)}  # hashes look at all files alike
DAMAGED = [
    pytest.param(name, hashed, id=f"{'hashed' if hashed else 'of an earlier release'}-{name}",
                 marks=() if (name, hashed) in QUICK else pytest.mark.slow)
    for hashed in (True, False) for name in FILES
]  # fmt: skip


@pytest.mark.parametrize(("name", "hashed"), DAMAGED)
def test_a_damaged_checkpoint_is_named(name: str, hashed: bool, run: tuple[dict[str, Any], Path]) -> None:
    """Absent, empty, cut, half zeros and, with hashes, one flipped bit: each is one line with the way out."""
    config, folder = run
    path = folder / "checkpoints" / "checkpoint-6" / name
    if not hashed:
        (path.parent / checksums.FILES).unlink()
    whole = path.read_bytes()
    half = len(whole) // 2
    kinds: list[bytes | None] = [None, b"", whole[:half]]
    if hashed:
        kinds += [whole[:half] + bytes(len(whole) - half), whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:]]
    for damaged in kinds:
        path.unlink(missing_ok=True)
        if damaged is not None:
            path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=rf"checkpoint-6/{name}' is .*; remove .* to continue from checkpoint-3"
        ) as caught:
            train(config, folder, resume=True)
        assert "\n" not in str(caught.value)


def test_the_checkpoint_before_is_as_good(run: tuple[dict[str, Any], Path], finished: tuple[Any, Path]) -> None:
    config, folder = run
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    train(config, folder, resume=True)
    assert text_of(folder) == text_of(finished[1])


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    finished: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    rename, sync = Path.rename, atomic_write.sync

    def watched_sync(folder: Path) -> None:
        done.append(("sync", folder.name))
        sync(folder)

    def watched_rename(self: Path, target: Path) -> Path:
        done.append(("rename", target.name))
        return rename(self, target)

    monkeypatch.setattr(atomic_write, "sync", watched_sync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    train(finished[0], tmp_path / "run")
    ours = [(what, name) for what, name in done if "checkpoint" in name]
    assert ours == [(what, f"checkpoint-{step}") for step in (3, 6) for what in ("sync", "rename")]


def test_weights_with_a_flipped_bit_are_not_loaded(run: tuple[dict[str, Any], Path]) -> None:
    path = run[1] / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors' is damaged or was edited: its SHA-256"):
        Run(run[1]).load_model()
    path.write_bytes(content[:-8])
    with pytest.raises(ValueError, match=r"model.safetensors' is damaged: it has \d+ bytes"):
        Run(run[1]).load_model()
    path.write_bytes(content)
    (run[1] / "model" / checksums.FILES).unlink()
    assert Run(run[1]).load_model(), "as models of earlier releases"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", b"\xff\xfe", r"config.yaml' cannot be read"),
        ("config.yaml", b"model: {a", r"config.yaml' cannot be read"),
        ("config.yaml", b"\0" * 60, r"config.yaml' cannot be read"),
        ("environment.json", b"[]", r"environment.json' cannot be read: it does not contain a JSON object"),
        ("environment.json", b"", r"environment.json' cannot be read"),
        ("metrics.jsonl", b'{"step": 1}\n', r"metrics.jsonl', line 1, is not a line of metrics"),
        ("metrics.jsonl", b"\xff\n", r"metrics.jsonl' cannot be read"),
        ("metrics.jsonl", b"", r"metrics.jsonl' has lost lines: 0 are left of \d up to step 6"),
        ("tokenizer/tokenizer.json", b"", r"tokenizer.json' cannot be read"),
        ("tokenizer/tokenizer.json", b"{}", r"tokenizer.json' is no definition of a tokenizer"),
        ("tokenizer/tokenizer_config.json", b"\xff", r"tokenizer_config.json' cannot be read"),
    ],
)
def test_a_line_names_the_file(name: str, content: bytes, message: str, run: tuple[dict[str, Any], Path]) -> None:
    (run[1] / name).write_bytes(content)
    (run[1] / "tokenizer" / "files.json").unlink()  # as in runs of earlier releases
    with pytest.raises(ValueError, match=message) as caught:
        train(run[0], run[1], resume=True)
    assert "\n" not in str(caught.value)


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class ForeignError(Exception):
    """As safetensors and tokenizers raise."""


def full_elsewhere(*args: Any, **kwargs: Any) -> None:
    raise ForeignError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "error", "named"),
    [
        ("skipstone.core.atomic_write.os.fsync", full, r"run"),
        ("transformers.PreTrainedTokenizerBase.save_pretrained", full_elsewhere, r"run"),
        ("transformers.Trainer._save_optimizer_and_scheduler", full, r"checkpoints/checkpoint-3"),
        ("skipstone.model.causal_lm.SkipstoneForCausalLM.save_pretrained", full_elsewhere, r"checkpoints/checkpoint-3"),
        ("skipstone.model.card.write_card", full, r"model"),
    ],
)
def test_a_full_disk_is_one_line(
    where: str,
    error: Callable[..., None],
    named: str,
    finished: tuple[dict[str, Any], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(where, error)
        with pytest.raises(WriteError, match=rf"cannot write '.*{named}': no space left"):
            train(finished[0], folder)
    assert not list(tmp_path.rglob("*.partial")), "what fills the disk is not kept"
    train(finished[0], folder, resume=folder.is_dir())
    assert text_of(folder) == text_of(finished[1])


def test_metrics_that_do_not_fit(finished: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def block() -> None:
        (folder / "metrics.jsonl").unlink()
        (folder / "metrics.jsonl").symlink_to("/dev/full")

    with at_step(2, block), pytest.raises(WriteError, match=r"cannot write '.*metrics.jsonl': no space left"):
        train(finished[0], folder)


def test_code_that_a_tokenizer_brings_is_not_run(
    run: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run[1] / "tokenizer"
    (folder / "files.json").unlink()  # a stranger's would fit
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(run[1] / 'ran')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with suppress(ValueError):  # one line, or another class that is known
        Run(run[1]).load_tokenizer()
    assert not (run[1] / "ran").exists()
