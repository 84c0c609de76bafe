"""The tail's one compute thread: takes decoded requests in order of deadline and runs their remaining segments."""

import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cloud.tail.batching import DeadlineQueue
from cloud.tail.store import Loaded
from skills.errors import DeadlineExceeded, Refused

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

MAX_WAITING = 64
IDLE_WAKE_S = 60.0


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """The outputs, and how long the request waited and ran."""

    outputs: "Arrays"
    queue_ms: float
    compute_ms: float


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """A request whose frame was decoded: run segments from `after` on, until `deadline_s` at the latest."""

    loaded: Loaded
    after: int
    values: "Arrays"
    deadline_s: float
    wanted: Callable[[], bool]  # False once the caller has gone
    arrived_s: float
    result: "concurrent.futures.Future[Result]"


class Engine:
    """Runs jobs one after the other; full means refused at once, late means dropped, before and between segments."""

    def __init__(self, bound: int = MAX_WAITING) -> None:
        self._queue: DeadlineQueue[Job] = DeadlineQueue(bound)
        self._ready = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="tail-compute", daemon=True)
        self._thread.start()

    def submit(
        self, loaded: Loaded, after: int, values: "Arrays", deadline_s: float, wanted: Callable[[], bool]
    ) -> "concurrent.futures.Future[Result]":
        """Queue a request.

        Raises:
            Refused: the queue is full, or the server is stopping.
        """
        job = Job(loaded, after, values, deadline_s, wanted, time.monotonic(), concurrent.futures.Future())
        with self._ready:
            if self._stopping:
                raise Refused("the tail is shutting down")
            if not self._queue.push(job, deadline_s):
                raise Refused(f"the tail has {MAX_WAITING} requests waiting: try again later, or answer on the device")
            self._ready.notify()
        return job.result

    def stop(self) -> None:
        """Finish what is queued, then end the thread."""
        with self._ready:
            self._stopping = True
            self._ready.notify()
        self._thread.join(timeout=30)

    def _work(self) -> None:
        while True:
            with self._ready:
                while not len(self._queue) and not self._stopping:
                    self._ready.wait(IDLE_WAKE_S)
                if not len(self._queue):
                    return
                turn = self._queue.pop(time.monotonic())
            for late in turn.expired:
                late.result.set_exception(DeadlineExceeded("the request's time ran out while it waited at the tail"))
            if turn.job is not None:
                self._run(turn.job)

    def _run(self, job: Job) -> None:
        start = time.monotonic()

        def still_wanted() -> None:
            if time.monotonic() > job.deadline_s:
                raise DeadlineExceeded("the request's time ran out between two segments")
            if not job.wanted():
                raise DeadlineExceeded("the caller has gone")

        try:
            outputs = job.loaded.chain.run(job.values, job.after, before_each=still_wanted)
        except Exception as error:  # noqa: BLE001  the outermost loop of the compute thread: one bad request must not end it
            job.result.set_exception(error)
            return
        job.result.set_result(Result(outputs, (start - job.arrived_s) * 1e3, (time.monotonic() - start) * 1e3))
