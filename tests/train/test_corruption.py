"""Damaged files (flipped bits, cut, emptied, half zeros, longer, missing) are named, and never give a traceback."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from skipstone import runs
from skipstone.core import checksums
from skipstone.data import shards
from skipstone.data.sharding import write_shards
from skipstone.runs import Run
from skipstone.train import checkpoints
from train.tool import MODELS, recipe, train

KINDS = ("flip", "cut", "empty", "zeros", "longer", "gone")


@pytest.fixture(params=[2, pytest.param(16, marks=pytest.mark.slow)])
def times(request: pytest.FixtureRequest) -> int:
    """How often each file is damaged in each way; 16: more than two thousand times altogether."""
    return int(request.param)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return train(recipe(folder, MODELS["ema_threshold"], steps=2, warmup_steps=1, save_every=0), folder / "run")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    lines = folder / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": f"{i} {'x' * (i % 7)}"}) + "\n" for i in range(60)))
    write_shards(f"jsonl:{lines}", folder / "out", tokenizer="byte", split="80-20", shard_tokens=200)
    return folder / "out"


def corrupt(path: Path, kind: str, chance: random.Random) -> bool:
    """Damage a file; whether it differs from what it was."""
    whole = path.read_bytes()
    place = chance.randrange(len(whole))
    damaged = {
        "flip": whole[:place] + bytes([whole[place] ^ (1 << chance.randrange(8))]) + whole[place + 1 :],
        "cut": whole[:place],
        "empty": b"",
        "zeros": whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2),
        "longer": whole + bytes(chance.randrange(1, 9)),
    }
    if kind == "gone":
        path.unlink()
        return True
    path.write_bytes(damaged[kind])
    return damaged[kind] != whole


def attack(folder: Path, files: list[Path], times: int, use: Callable[[], object], named: bool) -> int:
    """Damage each file `times` times in each way, one at a time. named: `use` has to notice every time.

    What `use` raises has to be one line that names the file or its folder.
    """
    chance, tried = random.Random(0), 0
    for path in files:
        whole = path.read_bytes()
        for kind in KINDS * times:
            differs, line = corrupt(path, kind, chance), None
            try:
                use()
            except (ValueError, FileNotFoundError) as error:
                line = str(error)
            path.write_bytes(whole)
            tried += 1
            where = f"{path.relative_to(folder)}, {kind}"
            assert line is not None or not (named and differs), f"{where}: not noticed"
            assert line is None or ("\n" not in line and (path.name in line or str(path.parent) in line)), (
                f"{where}: {line}"
            )
    return tried


def test_checkpoints(run: Path, times: int) -> None:
    [folder] = runs.checkpoints(run)
    files = [path for path in folder.iterdir() if path.name != checksums.FILES]
    assert attack(run, files, times, lambda: checkpoints.check(folder), named=True) >= 7 * 6 * times
    attack(run, [folder / checksums.FILES], times, lambda: checkpoints.check(folder), named=False)


def test_checkpoints_without_hashes(run: Path, times: int) -> None:
    """Those of earlier releases: what cannot be read is named, before anything is loaded."""
    [folder] = runs.checkpoints(run)
    hashes = (folder / checksums.FILES).read_bytes()
    (folder / checksums.FILES).unlink()
    files = [path for path in folder.iterdir() if path.is_file()]
    attack(run, files, times, lambda: checkpoints.check(folder), named=False)
    (folder / checksums.FILES).write_bytes(hashes)


def test_weights(run: Path, times: int) -> None:
    attack(run, [run / "model" / "model.safetensors"], times, lambda: Run(run).load_model(), named=True)


def test_shards(made: Path, times: int) -> None:
    def use() -> None:
        opened = shards.open_shards(made)
        shards.check(made, opened.manifest, list(opened.manifest.splits))
        opened.tokenizer()

    files = [path for path in made.rglob("*") if path.is_file() and path.name != shards.MANIFEST]
    assert attack(made, files, times, use, named=True) == 8 * 6 * times
    attack(made, [made / shards.MANIFEST], 10 * times, use, named=False)


def test_what_carries_no_hashes(run: Path, times: int) -> None:
    def use() -> None:
        opened = Run(run)
        opened.config(), opened.environment(), opened.metrics(), opened.result(), opened.load_tokenizer()

    names = ("config.yaml", "environment.json", "metrics.jsonl", "result.json")
    files = [run / name for name in names] + sorted((run / "tokenizer").iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attack(run, files, times, use, named=False)
