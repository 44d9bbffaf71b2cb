"""A queue of jobs of which one computes at a time, because a model has one state and a machine few cores.

A job is an iterator of events. It runs in one thread of its own, which hands each event to the event loop. A few jobs
may wait; more are refused.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator

from skipstone.core.strict import PlainDict

WAITING = 4  # jobs that may wait for the one that computes


class BusyError(Exception):
    """Raised by `WorkQueue.submit` when as many jobs are waiting as the queue allows."""


class Job:
    """An accepted job, whose events are delivered to the asyncio event loop in which it was created.

    make: a function that the queue's thread calls to start the computation; it returns an iterator of events. ahead:
    number of jobs that are computed before this one.
    """

    def __init__(self, make: Callable[[], Iterator[PlainDict]], ahead: int) -> None:
        self._make, self.ahead = make, ahead
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[PlainDict | None] = asyncio.Queue()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Ask the job to end after the event that it is computing; may be called from any thread."""
        self._stopped.set()

    def run(self) -> None:
        """Compute the job and deliver its events; the queue's thread calls this.

        A ValueError becomes an event of type "error" with its message; any other exception becomes one too, and is
        raised again.
        """
        try:
            if not self._stopped.is_set():
                for event in self._make():
                    self._tell(event)
                    if self._stopped.is_set():
                        break
        except ValueError as error:  # the library's one line for what users can change
            self._tell({"type": "error", "message": " ".join(str(error).split())})
        except Exception as error:
            self._tell({"type": "error", "message": f"{type(error).__name__}: the model could not be run"})
            raise

    def end(self) -> None:
        """Tell whoever reads the events that there are no more of them; the queue's thread calls this after `run`."""
        self._tell(None)

    def _tell(self, event: PlainDict | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed, so the events are not needed any more
            self.stop()

    async def events(self) -> AsyncIterator[PlainDict]:
        """Yield the job's events as they arrive; if other jobs are ahead, an event of type "waiting" comes first.

        That event has `ahead`, the number of these jobs. The job is stopped when the caller stops iterating, as when a
        browser disconnects.
        """
        try:
            if self.ahead:
                yield {"type": "waiting", "ahead": self.ahead}
            while (event := await self._events.get()) is not None:
                yield event
        finally:
            self.stop()


class WorkQueue:
    """A queue that computes jobs one after the other in a daemon thread, which does not keep the process alive.

    waiting: the largest number of jobs that may wait while another one is computed.
    """

    def __init__(self, waiting: int = WAITING) -> None:
        self._limit = 1 + waiting
        self._jobs: queue.Queue[Job] = queue.Queue()
        self._accepted: list[Job] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._work, name="skipstone-view", daemon=True).start()

    def submit(self, make: Callable[[], Iterator[PlainDict]]) -> Job:
        """Queue a job and return it; to be called inside a running asyncio event loop.

        make: a function that is called when it is the job's turn; it starts the computation and returns an iterator of
        events (dicts). Raises BusyError if the queue is full.
        """
        with self._lock:
            if len(self._accepted) >= self._limit:
                raise BusyError
            job = Job(make, ahead=len(self._accepted))
            self._accepted.append(job)
        self._jobs.put(job)
        return job

    def stop(self) -> None:
        """Ask all jobs, running and waiting, to end."""
        with self._lock:
            for job in self._accepted:
                job.stop()

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job.run()
            except Exception:  # a defect of ours: it is printed, and the next job runs
                traceback.print_exc()
            finally:
                with self._lock:
                    self._accepted.remove(job)
                job.end()  # not before: the next request of this reader would be told that a job is ahead of it
