"""`serve`: run the server of the live page on the loopback address until it is stopped."""

from __future__ import annotations

import errno
import socket
import threading
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from skipstone.view.live_session import open_models
from skipstone.view.server import application
from skipstone.view.work_queue import WorkQueue

ADDRESS = "127.0.0.1"


def serve(runs: Sequence[Path], *, port: int, browser: bool, announce: Callable[[str], None]) -> None:
    """Serve the live page of one or two runs on 127.0.0.1 until SIGINT or SIGTERM.

    runs: folders of runs or saved models. port: 0 chooses any free port. browser: whether to open the page in a
    browser. announce: called with the page's address as soon as it can be loaded. Raises ValueError, with a message of
    one line, for a port that is in use or not permitted, and ValueError or FileNotFoundError for a folder that cannot
    be shown.
    """
    with _bound(port) as listening:
        models = open_models(runs)
        chosen, work = listening.getsockname()[1], WorkQueue()
        address = f"http://{ADDRESS}:{chosen}/"
        config = uvicorn.Config(
            application(models, chosen, work),
            log_config=None,
            log_level="critical",  # what the user has to know is announced, or raised
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=0,
        )

        def ready() -> None:
            announce(address)
            if browser:
                threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

        _Server(config, work, ready).run(sockets=[listening])


class _Server(uvicorn.Server):
    """A uvicorn server that calls back when it listens, and stops the work as soon as a signal arrives."""

    def __init__(self, config: uvicorn.Config, work: WorkQueue, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._work, self._ready = work, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._work.stop()
        super().handle_exit(sig, frame)


def _bound(port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((ADDRESS, port))
    except OSError as error:
        listening.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            reason = "is taken" if error.errno == errno.EADDRINUSE else "may not be used"
            raise ValueError(f"port {port} {reason}; name another with --port, or 0 for any free one") from None
        raise
    return listening
