"""The web application of the live page, and the checks of every request; it serves the user of this machine only.

* Host must name the loopback, so that a foreign page cannot reach the server by a name that it resolves to 127.0.0.1.
* Origin, where a browser sends one, must be the page's own; and what starts work must be JSON, which a browser does not
  send to another origin without asking first.
* The page runs scripts of this server only, and text of a model or a prompt never becomes markup.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from skipstone.core.plain_text import parse_json
from skipstone.core.strict import PlainDict
from skipstone.view.live_model import LiveModel
from skipstone.view.live_session import (
    NEW_TOKENS,
    PROMPT,
    attention_events,
    events,
    read_attention_request,
    read_request,
)
from skipstone.view.saved_page import empty_page
from skipstone.view.work_queue import BusyError, Job, WorkQueue

LONGEST = 1 << 18  # bytes of a request
HOSTS = ("127.0.0.1", "localhost")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
# Files of the page, their package and type: nothing else is served.
FILES = {
    "": ("skipstone.view", "static/index.html", "text/html"),
    "static/style.css": ("skipstone.report", "templates/style.css", "text/css"),
    "static/saving.js": ("skipstone.report", "templates/saving.js", "text/javascript"),
    "static/view.css": ("skipstone.view", "static/view.css", "text/css"),
    "static/view.js": ("skipstone.view", "static/view.js", "text/javascript"),
    "static/panel.js": ("skipstone.view", "static/panel.js", "text/javascript"),
    "static/pictures.js": ("skipstone.view", "static/pictures.js", "text/javascript"),
}


class Guard:
    """ASGI middleware that refuses requests from other pages and adds security headers to every response.

    app: the application that it protects. port: the port on which it is served, with which the headers Host and Origin
    are checked.
    """

    def __init__(self, app: ASGIApp, port: int) -> None:
        self.app = app
        self.hosts = {f"{host}:{port}" for host in HOSTS}
        self.origins = {f"http://{host}" for host in self.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in HEADERS.items())]
            await send(message)

        refusal = self.refusal(Request(scope).headers)
        await (self.app if refusal is None else refusal)(scope, receive, send_guarded)

    def refusal(self, headers: Mapping[str, str]) -> Response | None:
        """Return the response that refuses a request with these headers, or None if the request is allowed.

        headers: the request's HTTP headers. Host must be 127.0.0.1 or localhost with the server's port (else status
        421); Origin, if present, must be the server itself (else status 403).
        """
        if headers.get("host") not in self.hosts:
            return answer(421, "this server answers to 127.0.0.1 only")
        if "origin" in headers and headers["origin"] not in self.origins:
            return answer(403, "requests from other pages are refused")
        return None


def answer(status: int, message: str, **headers: str) -> JSONResponse:
    """Return a JSON response {"error": message}.

    status: the HTTP status. message: one line. headers: further HTTP headers, by name.
    """
    return JSONResponse({"error": message}, status, headers=headers)


def application(models: Sequence[LiveModel], port: int, work: WorkQueue) -> ASGIApp:
    """Return the web server of the live page as an ASGI application.

    models: the loaded models. port: the port on which it is served. work: runs the computations, one at a time. Routes:
    the page's files, `/api/models`, `/api/neurons/N` (N: index of a model), `/api/saved-page`, and `/api/generate` and
    `/api/attention`, which accept JSON by POST and answer with server-sent events.
    """

    async def models_of(request: Request) -> Response:
        limits = {"prompt": PROMPT, "new_tokens": NEW_TOKENS}
        return JSONResponse({"models": [model.describe() for model in models], "limits": limits})

    async def saved_page(request: Request) -> Response:
        return PlainTextResponse(empty_page())

    async def neurons(request: Request) -> Response:
        number = request.path_params["number"]
        return JSONResponse(models[number].neurons()) if number < len(models) else answer(404, "no such model")

    async def generate(request: Request) -> Response:
        return await compute(request, read_request, events)

    async def attention(request: Request) -> Response:
        return await compute(request, read_attention_request, attention_events)

    async def compute(request: Request, read: Callable[..., Any], make: Callable[..., Iterator[PlainDict]]) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return answer(415, "a request must be application/json")
        try:
            wanted = read(await _json(request), len(models))
            job = work.submit(lambda: make(models, wanted))
        except OverflowError:
            return answer(413, f"a request may have at most {LONGEST:,} bytes")
        except ValueError as error:
            return answer(400, " ".join(str(error).split()))
        except BusyError:
            return answer(503, "too many requests wait already; try again in a moment", **{"retry-after": "1"})
        return StreamingResponse(_stream(job), media_type="text/event-stream")

    routes = [Route(f"/{name}", _file(*place), methods=["GET"]) for name, place in FILES.items()]
    routes += [
        Route("/api/models", models_of, methods=["GET"]),
        Route("/api/saved-page", saved_page, methods=["GET"]),
        Route("/api/neurons/{number:int}", neurons, methods=["GET"]),
        Route("/api/generate", generate, methods=["POST"]),
        Route("/api/attention", attention, methods=["POST"]),
    ]
    return Guard(Starlette(routes=routes), port)


async def _json(request: Request) -> object:
    """Read the body of a request and return the decoded JSON.

    Raises OverflowError for a body that is too long, and ValueError for one that is incomplete or no JSON.
    """
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > LONGEST:
                raise OverflowError
    except ClientDisconnect:
        raise ValueError("the request is incomplete") from None
    try:
        return parse_json(body)
    except (ValueError, RecursionError):
        raise ValueError("a request must be a JSON object") from None


async def _stream(job: Job) -> AsyncIterator[str]:
    """Yield a job's events as server-sent events, one text of `data: JSON` for each."""
    async for event in job.events():
        yield f"data: {_dumps(event)}\n\n"


def _dumps(event: PlainDict) -> str:
    return json.dumps(event, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _file(package: str, name: str, kind: str) -> Any:
    content = files(package).joinpath(name).read_bytes()

    async def serve_file(request: Request) -> Response:
        return Response(content, media_type=kind)

    return serve_file
