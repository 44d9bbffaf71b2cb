"""Stop signals, the progress line, metrics lines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from skipstone.runs import Run, last_checkpoint
from skipstone.train.watch import MetricsFile, ProgressReporter, StopSignals, metrics_line
from skipstone_cli.main import main
from train.tool import DENSE, MODELS, equal, lines, recipe, train, weights

SOURCE = Path(__file__).resolve().parents[2] / "src"


def test_lines_of_metrics() -> None:
    assert metrics_line(3, {"loss": 1.0, "epoch": 0.5}) == {"step": 3, "split": "train", "loss": 1.0}
    assert metrics_line(4, {"eval_oracle_loss": 2.0, "epoch": 1}) == {
        "step": 4, "split": "validation", "oracle_loss": 2.0, "causal_loss": None,
    }  # fmt: skip


def test_progress_is_a_line_a_validation_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ProgressReporter()
    before = [{"eval_oracle_loss": 3.5}, {"eval_oracle_loss": 2.75}, {"loss": 2.6}]
    state = SimpleNamespace(is_world_process_zero=True, max_steps=9, global_step=3, log_history=before)
    progress.on_train_begin(None, state, None)
    progress.on_log(None, state, None, {"loss": 2.5, "tokens_per_second": 1234.5})
    progress.on_log(None, state, None, {"eval_oracle_loss": 2.25})
    progress.on_train_end(None, state, None)
    kept, line = capsys.readouterr().err.splitlines()
    assert kept == (
        "resuming after step 3 of 9: weights, optimizer, schedules and the order of the rows are kept; "
        "the last validation: 2.7500"
    )
    assert line == "3 of 9 steps  loss 2.5000  tokens/s 1,234  oracle 2.2500"


def test_progress_is_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    progress = ProgressReporter()
    state = SimpleNamespace(is_world_process_zero=True, max_steps=9, global_step=0)
    progress.on_train_begin(None, state, None)
    state.global_step = 4
    progress.on_step_end(None, state, None)
    progress.on_log(None, state, None, {"loss": 2.5})
    progress.close()
    progress.close()
    shown = capsys.readouterr().err
    assert "4 of 9 steps" in shown
    assert "loss 2.5000" in shown


def test_a_second_signal_is_not_held_back() -> None:
    stop = StopSignals()
    before = signal.getsignal(signal.SIGTERM)
    with stop.installed():
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_says_how_to_go_on(number: signal.Signals, tmp_path: Path) -> None:
    config = recipe(tmp_path, MODELS["all"], steps=200, save_every=0, eval_every=0)
    file, out = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "skipstone_cli.main", "train", str(file), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        while not (out / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    checkpoint = last_checkpoint(out)
    assert checkpoint is not None
    step = checkpoint.name.rpartition("-")[2]
    assert f"stopped by {number.name} after step {step}; a checkpoint is saved. Go on with" in errors
    assert f"--resume --out {out}" in errors
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=environment, check=True)
    assert f"run folder: {out}" in done.stdout
    whole = train(config, tmp_path / "whole")
    assert equal(weights(whole), weights(out))
    assert lines(whole) == lines(out)


def test_a_mistake_on_the_command_line_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(tmp_path, DENSE)))
    monkeypatch.setattr("sys.argv", ["skipstone", "train", str(file), "train.lerning_rate=1"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.splitlines() == [said.strip()]
    assert "did you mean 'learning_rate'" in said


def test_a_signal_in_the_last_step_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is complete, but a caller that runs several of them must learn of the signal."""
    log = MetricsFile.on_log

    def signalled(self: MetricsFile, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        log(self, args, state, control, **kwargs)
        if state.global_step == state.max_steps and not raised:
            raised.append(state.global_step)
            signal.raise_signal(signal.SIGINT)

    raised: list[int] = []
    monkeypatch.setattr(MetricsFile, "on_log", signalled)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            train(recipe(tmp_path, DENSE), tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, before)
    assert raised
    assert Run(tmp_path / "run").finished
