"""A saved folder loads in a process that does not import the package itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import skipstone
from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.data.tokenizers import byte_tokenizer
from skipstone.model.shim import AUTO_MAP

STRANGER = """
import sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
source, out = sys.argv[1:]
assert "skipstone" not in sys.modules
config = AutoConfig.from_pretrained(source, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
assert type(AutoModel.from_pretrained(source, trust_remote_code=True)) is type(model.model)
assert type(config) is type(model.config)
with torch.no_grad():
    torch.save(model(torch.arange(12)[None]).logits, out + "/logits.pt")
model.save_pretrained(out + "/again")
"""


@pytest.mark.slow
def test_a_stranger_loads_with_trust_remote_code(tmp_path: Path) -> None:
    config = SkipstoneConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mechanisms=[{"name": "early_exit"}]
    )
    model = SkipstoneForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    package = str(Path(skipstone.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": package, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, str(tmp_path / "model"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(torch.arange(12)[None]).logits)
    again, before = tmp_path / "again", tmp_path / "model"
    assert {file.name for file in again.iterdir()} == {file.name for file in before.iterdir()}
    assert (again / "config.json").read_text() == (before / "config.json").read_text()
    assert (again / "modeling_skipstone.py").read_text() == (before / "modeling_skipstone.py").read_text()


LOADS = """
import builtins, sys, time
from transformers import AutoTokenizer
asked, ask = [], builtins.input
def waiting(question):
    began = time.monotonic()
    try:
        return ask(question)
    finally:
        asked.append(time.monotonic() - began)
builtins.input = waiting
given = {} if sys.argv[2] == "closed" else {"trust_remote_code": False}
found = AutoTokenizer.from_pretrained(sys.argv[1], **given)("hi").input_ids
assert found == [104, 105] and "skipstone" not in sys.modules
assert all(seconds < 5 for seconds in asked) and (sys.argv[2] == "closed") == bool(asked)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["closed", "False"])
def test_a_stranger_loads_the_tokenizer_without_waiting(how: str, tmp_path: Path) -> None:
    """An input that is open and never answers makes transformers wait 15 s, unless it must not run code at all."""
    SkipstoneConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    leader, follower = os.pipe()
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(tmp_path), how],
        stdin=subprocess.DEVNULL if how == "closed" else leader,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    os.close(leader)
    os.close(follower)
    assert done.returncode == 0, done.stderr


def test_what_the_folder_carries(tmp_path: Path) -> None:
    SkipstoneConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["auto_map"] == AUTO_MAP
    [line] = (tmp_path / "modeling_skipstone.py").read_text(encoding="utf-8").splitlines()
    assert line.startswith("from skipstone import ")
