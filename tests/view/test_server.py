"""The server answers the page of this machine, refuses others in one line, and computes one request at a time."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="starlette is not installed")
testclient = pytest.importorskip("starlette.testclient", reason="the client of starlette's tests is not installed")

from skipstone.view.live_model import LiveModel  # noqa: E402
from skipstone.view.saved_page import save_page  # noqa: E402
from skipstone.view.server import FILES, LONGEST, application  # noqa: E402
from skipstone.view.work_queue import BusyError, WorkQueue  # noqa: E402

PORT = 8000
ASK = {"prompt": "a <b>", "models": [0], "new_tokens": 3, "twin": False}


@pytest.fixture(scope="module")
def client(saved: Path) -> Iterator[Any]:
    app = application([LiveModel(saved, "small-<model>")], PORT, WorkQueue())
    with testclient.TestClient(app, base_url=f"http://127.0.0.1:{PORT}") as found:
        yield found


def test_the_page_its_files_and_nothing_else(client: Any) -> None:
    for name, (_, _, kind) in FILES.items():
        answer = client.get(f"/{name}")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "innerHTML" not in answer.text
    for name in ("static/../server.py", "static/%2e%2e/server.py", "static/", "server.py", "api/neurons/1"):
        assert client.get(f"/{name}").status_code == 404


def test_the_models(client: Any) -> None:
    (model,) = client.get("/api/models").json()["models"]
    assert model["name"] == "small-<model>"
    assert model["slots"] == [[0, None], [1, "mixture_of_depths"], [1, "token_selective"], [2, "token_selective"]]
    assert model["budgets"] == [0.4, 0.46]
    assert len(client.get("/api/neurons/0").json()["layers"]) == 3


def test_the_page_to_save_is_text_with_one_script_and_an_empty_place(client: Any) -> None:
    answer = client.get("/api/saved-page")
    assert answer.headers["content-type"].startswith("text/plain")
    (script,) = re.findall(r'<script type="module">(.*?)</script>', answer.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in answer.text
    assert answer.text.count(">null</script>") == 1
    assert not re.search(r"^(import|export) ", script, re.MULTILINE)
    assert not re.search(r"https?://|url\(|@import", answer.text.replace("http://www.w3.org/2000/svg", ""))


def test_a_saved_page_holds_what_the_models_did(saved: Path, tmp_path: Path) -> None:
    out = save_page([saved, saved], tmp_path / "page.html", "</script><b>", new_tokens=3)
    text = out.read_text(encoding="utf-8")
    assert "</script><b>" not in text
    (state,) = re.findall(r'<script id="saved" type="application/json">(.*?)</script>', text, re.DOTALL)
    found = json.loads(state)
    assert found["request"]["prompt"] == "</script><b>"
    assert [model["name"] for model in found["models"]] == [f"{saved.name} ({i})" for i in (1, 2)]
    assert sum(event["type"] == "pass" for event in found["events"]) == 6
    with pytest.raises(ValueError, match="new_tokens must be from 1"):
        save_page([saved], tmp_path / "b.html", "a", new_tokens=0)


def test_a_request_streams_events(client: Any) -> None:
    answer = client.post("/api/generate", json=ASK)
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
    assert [event["type"] for event in found] == ["start", "pass", "pass", "pass", "end"]
    assert "".join(token["text"] for token in found[0]["prompt"]) == "a <b>"


def test_nothing_is_ahead_of_whoever_has_read_a_job_to_its_end() -> None:
    async def scenario() -> list[int]:
        work, ahead = WorkQueue(), list[int]()
        for _ in range(200):
            job = work.submit(lambda: iter([{"type": "end"}]))
            ahead.append(job.ahead)
            assert [event async for event in job.events()][-1] == {"type": "end"}
        return ahead

    assert not any(asyncio.run(scenario()))


def test_attention_is_an_event_and_what_cannot_be_asked_is_refused(client: Any) -> None:
    answer = client.post("/api/attention", json={"model": 0, "tokens": [97, 98, 99]})
    event = json.loads(answer.text.removeprefix("data: "))
    assert (event["type"], event["at"]) == ("attention", 2)
    assert len(event["layers"]) == 3
    assert all(len(row) == 3 for row in event["layers"] if row is not None)
    for tokens in ([], [10**6], [1] * 97):
        answer = client.post("/api/attention", json={"model": 0, "tokens": tokens})
        assert "tokens must be from 1 to 96 ids of the vocabulary" in answer.text
    assert client.post("/api/attention", json={"model": 1, "tokens": [1]}).status_code == 400
    assert client.post("/api/attention", json={"model": 0, "tokens": "1"}).status_code == 400


def test_what_a_model_cannot_do_is_an_event(client: Any) -> None:
    answer = client.post("/api/generate", json={**ASK, "prompt": "x" * 96})
    event = json.loads(answer.text.removeprefix("data: "))
    assert event["type"] == "error"
    assert "leaves no room" in event["message"]


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"host": "evil.example"}, None, 421),
        ({"host": f"evil.example:{PORT}"}, None, 421),
        ({"host": "127.0.0.1"}, None, 421),
        ({"origin": "http://evil.example"}, None, 403),
        ({"origin": "null"}, None, 403),
        ({"origin": f"http://127.0.0.1:{PORT + 1}"}, None, 403),
        ({"content-type": "text/plain"}, None, 415),
        ({}, b"not json", 400),
        ({}, b"[1]", 400),
        ({}, b"[" * 100_000, 400),
        ({}, b"x" * (LONGEST + 1), 413),
        ({}, json.dumps({**ASK, "new_tokens": 10**9}).encode(), 400),
    ],
)
def test_others_are_refused_in_one_line(client: Any, headers: dict[str, str], body: bytes | None, status: int) -> None:
    content = json.dumps(ASK).encode() if body is None else body
    answer = client.post("/api/generate", content=content, headers={"content-type": "application/json", **headers})
    assert answer.status_code == status
    assert answer.json()["error"].count("\n") == 0
    assert "content-security-policy" in answer.headers


def test_own_origins_are_welcome(client: Any) -> None:
    for host in ("127.0.0.1", "localhost"):
        headers = {"host": f"{host}:{PORT}", "origin": f"http://{host}:{PORT}"}
        assert client.post("/api/generate", json=ASK, headers=headers).status_code == 200


def test_a_full_queue_says_so_and_empties(client: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = WorkQueue(waiting=0)
    app = application([], PORT, work)
    held, begun = threading.Event(), threading.Event()

    def slow(*args: object) -> Iterator[dict[str, Any]]:
        begun.set()
        held.wait(20)
        yield {"type": "end"}

    monkeypatch.setattr("skipstone.view.server.events", slow)
    monkeypatch.setattr("skipstone.view.server.read_request", lambda values, models: values)
    with testclient.TestClient(app, base_url=f"http://127.0.0.1:{PORT}") as found:
        answers: list[Any] = []
        first = threading.Thread(target=lambda: answers.append(found.post("/api/generate", json=ASK)))
        first.start()
        assert begun.wait(20)
        refused = found.post("/api/generate", json=ASK)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "try again" in refused.json()["error"]
        held.set()
        first.join(20)
        assert answers[0].status_code == 200
        assert found.post("/api/generate", json=ASK).status_code == 200


def test_a_stopped_job_computes_no_further_and_a_defect_does_not_end_the_queue() -> None:
    computed: list[int] = []
    listening = threading.Event()

    def numbers() -> Iterator[dict[str, Any]]:
        for i in range(1000):
            computed.append(i)
            yield {"i": i}
            if i == 1:
                listening.wait(20)

    def broken() -> Iterator[dict[str, Any]]:
        raise ValueError("two\nlines")
        yield {}

    async def scenario() -> list[dict[str, Any]]:
        work = WorkQueue(waiting=1)
        job = work.submit(numbers)
        second = work.submit(broken)
        with pytest.raises(BusyError):
            work.submit(numbers)
        stream = job.events()
        assert await anext(stream) == {"i": 0}
        await stream.aclose()
        listening.set()
        return [event async for event in second.events()]

    assert asyncio.run(scenario()) == [{"type": "waiting", "ahead": 1}, {"type": "error", "message": "two lines"}]
    assert len(computed) <= 3, "the pass that was computing, and none after it"
