"""A short version of `fuzz.py`: hostile input to every reader ends in one line, soon, and without much memory."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz import Target, attack, drawn, mutated
from skipstone.core.plain_text import check_yaml, parse_json
from skipstone.core.strict import is_folder_name
from skipstone.model.source_folder import check_room
from skipstone.model.weight_files import weight_files
from skipstone_studies.isoflop.spec import make_spec


@pytest.mark.slow
def test_no_input_breaks_a_reader(tmp_path: Path) -> None:
    from fuzz_targets import targets

    for target in targets(tmp_path):
        attack(target, 1000)
        drawn(target, 10)
        assert not target.faults, "\n".join(target.faults[:3])


@pytest.mark.slow
def test_no_input_that_coverage_finds_breaks_a_parser() -> None:
    pytest.importorskip("atheris", reason="needs atheris: pip install atheris")
    script = Path(__file__).with_name("fuzz_coverage.py")
    names = ["override, split", "recipe", "files.json", "header of safetensors, values", "fields of a configuration"]
    done = subprocess.run(
        [sys.executable, script, "--runs", "2000", *names], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "| **all** | 10,000 |" in done.stdout


def test_faults_are_found() -> None:
    target = Target("bad", [{"a": 1, "b": [2]}], lambda value: value["a"] + 1)
    attack(target, 300)
    assert target.counts["traceback"] > 0
    assert target.faults


def test_mutations_leave_their_seed_alone() -> None:
    seed = {"a": [1, {"b": "c"}], "d": 0.5}
    for number in range(200):
        mutated(seed, random.Random(number))
    assert seed == {"a": [1, {"b": "c"}], "d": 0.5}


def test_depth_and_aliases_have_bounds() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)
    doubled = "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    with pytest.raises(ValueError, match=r"aliases stand for more than 200,000 values"):
        check_yaml("a0: &a0 [1, 2]\n" + doubled)
    with pytest.raises(ValueError, match="an alias contains itself"):
        check_yaml("a: &a [*a]\n")
    check_yaml("a: &a [1]\nb: *a\n")


@pytest.mark.parametrize("name", ["..", ".", "", "../x", "/etc", "a/b", "a\\b", "a\0", "x" * 300, 3, None])
def test_paths_are_no_names(name: object) -> None:
    assert not is_folder_name(name)


def test_paths_out_of_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name must be the name of a folder, got '\.\./x'"):
        make_spec({"name": "../x"})
    with pytest.raises(ValueError, match=r"arm must be the name of a folder, got '\.\./x'"):
        make_spec({"name": "x", "arms": {"../x": {}}})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"metadata": {}, "weight_map": {"a": "../../secret.bin"}}')
    with pytest.raises(ValueError, match=r"names '../../secret.bin', which is no file of its folder"):
        weight_files(tmp_path)


def test_sizes_are_compared_before_anything_is_allocated(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    check_room(tmp_path, 400)
    with pytest.raises(ValueError, match=r"config.json' describes 1,000,000 weights, but the files .* 100 bytes"):
        check_room(tmp_path, 1_000_000)
    check_room(tmp_path / "on-the-hub", 1_000_000)
