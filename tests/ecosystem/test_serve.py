"""`transformers serve` answers a chat request on loopback."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils.import_utils import is_serve_available

from ecosystem.tool import environment, load
from pages import Page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_serve_available(), reason="transformers[serving] is not installed"),
]

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
SECONDS = 600  # the first request compiles the decoding step, which takes minutes on a busy machine


def ask(port: int, path: str, **body: Any) -> str:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return answer.read().decode()


@pytest.fixture
def port(page: Page, work: Path) -> Iterator[int]:
    """Of a server with `chat-model`, started by the page's command, at a port that is free."""
    (work / "my-model").rename("chat-model")
    tokenizer = AutoTokenizer.from_pretrained("chat-model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained("chat-model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    words = [str(number) if word == "8000" else word for word in page.command("serve chat-model")]
    with (work / "log.txt").open("w") as log:
        server = subprocess.Popen(
            [str(Path(sys.executable).with_name(words[0])), *words[1:]], env=environment(), stdout=log, stderr=log
        )
        try:
            _wait(server, number, work / "log.txt")
            yield number
        finally:
            server.terminate()
            server.wait(30)


def _wait(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(4 * SECONDS):
        assert server.poll() is None, log.read_text()
        try:
            ask(port, "/health")
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.25)
        else:
            return
    pytest.fail(f"no answer in {SECONDS} s: {log.read_text()}")


def test_a_chat_request_is_answered(port: int) -> None:
    request = {"model": "chat-model", "messages": [{"role": "user", "content": "Once upon"}], "max_tokens": 6}
    request["temperature"] = 0.0
    whole = json.loads(ask(port, "/v1/chat/completions", **request, stream=False))
    said = whole["choices"][0]["message"]["content"]
    tokenizer = AutoTokenizer.from_pretrained("chat-model")
    given = tokenizer("Once upon", return_tensors="pt")
    row = load("chat-model").eval().generate(**given, max_new_tokens=6, do_sample=False)[0]
    assert said == tokenizer.decode(row[given.input_ids.shape[1] :], skip_special_tokens=True)
    lines = ask(port, "/v1/chat/completions", **request, stream=True).splitlines()
    parts = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "".join(p["choices"][0]["delta"].get("content", "") for p in parts) == said
