"""The tail computes one batch at a time: decoded requests wait, those that must begin first go first, segments run one by one.

A thread of its own takes what waits. A request that finds nobody else may run on its caller's thread: two hand-overs less.
"""

import concurrent.futures
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cloud.tail.batching import LaneQueue
from cloud.tail.metrics import Metrics
from cloud.tail.pace import stacked
from cloud.tail.store import Loaded
from skills.errors import DeadlineExceeded, FormatError, Refused, SkerryError, Unreachable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

MAX_WAITING = 64
IDLE_WAKE_S = 60.0
END_S = 5.0  # a segment that runs is not interrupted: how long its end is waited for


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


class QueueFull(Refused):
    """As many requests wait as may."""


class Draining(Unreachable):
    """The tail ends: ask another one, or answer on the device."""


class Engine:
    """Runs jobs one batch after the other; full means refused at once, late means dropped, before and between segments."""

    def __init__(self, metrics: Metrics | None = None, bound: int = MAX_WAITING) -> None:
        self._bound = bound
        self._queue: LaneQueue[Job] = LaneQueue(bound)
        self._metrics = metrics or Metrics()
        self._ready = threading.Condition()
        self._busy = False  # somebody computes
        self._stop_at_s = float("inf")
        self._thread = threading.Thread(target=self._work, name="tail-compute", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many requests wait now."""
        return len(self._queue)

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken any more."""
        return self._stop_at_s != float("inf")

    def submit(
        self,
        loaded: Loaded,
        after: int,
        values: "Arrays",
        deadline_s: float,
        wanted: Callable[[], bool],
        *,
        here: bool = False,
    ) -> "concurrent.futures.Future[Result]":
        """Queue a request, or with `here` run it on this thread if nobody else computes or waits.

        Raises:
            QueueFull: as many wait as may.
            Draining: the server ends.
        """
        job = Job(loaded, after, values, deadline_s, wanted, time.monotonic(), concurrent.futures.Future())
        with self._ready:
            if self.draining:
                raise Draining("the tail is shutting down: answer on the device")
            here = here and not self._busy and not len(self._queue)
            if here:
                self._busy = True
            elif not self._queue.push(job, deadline_s - loaded.pace.least_s(after), _lane(job)):
                raise QueueFull(
                    f"the tail has {self._bound} requests waiting: try again later, or answer on the device"
                )
            elif not self._busy:
                self._ready.notify()
        if here:
            self._compute((job,))
        return job.result

    def drain(self, grace_s: float) -> None:
        """Take nothing new, finish what waits within `grace_s`, give up the rest, end the thread. Safe to call twice."""
        with self._ready:
            self._stop_at_s = min(self._stop_at_s, time.monotonic() + grace_s)
            self._ready.notify()
        self._thread.join(timeout=grace_s + END_S)

    def _work(self) -> None:
        while True:
            with self._ready:
                while self._busy or not (len(self._queue) or self.draining):
                    self._ready.wait(IDLE_WAKE_S)
                now = time.monotonic()
                if now > self._stop_at_s:
                    for left in self._queue.clear():
                        self._give_up(left, "drain", Draining("the tail shut down before the request's turn"))
                if not len(self._queue):
                    return
                turn = self._queue.pop(now, functools.partial(_how_many, now))
                self._busy = bool(turn.jobs)
            for late in turn.expired:
                self._give_up(late, "queue", DeadlineExceeded("the request's time ran out while it waited at the tail"))
            if turn.jobs:
                self._compute(turn.jobs)

    def _compute(self, jobs: Sequence[Job]) -> None:
        """Run a batch for which `_busy` was set."""
        try:
            self._run(jobs)
        finally:
            with self._ready:
                self._busy = False
                self._ready.notify()

    def _run(self, jobs: Sequence[Job]) -> None:
        start = time.monotonic()
        try:
            answered = self._segments(jobs)
        except Exception as error:  # noqa: BLE001  the outermost loop of the compute thread: one bad request must not end it
            if len(jobs) > 1:
                for job in jobs:  # whose fault it was shows when each runs by itself
                    if not job.result.done():
                        self._run((job,))
                return
            jobs[0].result.set_exception(error if isinstance(error, SkerryError) else SkerryError(repr(error)[:400]))
            return
        took_ms = (time.monotonic() - start) * 1e3
        if answered:
            self._metrics.batch(jobs[0].loaded.name, jobs[0].after, len(answered))
        for job, outputs in answered:
            job.result.set_result(Result(outputs, (start - job.arrived_s) * 1e3, took_ms))

    def _segments(self, jobs: Sequence[Job]) -> "Sequence[tuple[Job, Arrays]]":
        """Run the jobs as one and return those that are answered with their outputs; the late are dropped on the way.

        What is dropped between segments keeps its rows to the end: only what comes out is known to hold requests along its
        first axis, and of the tensors in between nothing is.

        Raises:
            FormatError: what came out has not one row for each request.
        """
        loaded, at = jobs[0].loaded, jobs[0].after
        batch = jobs = [job for job in jobs if self._in_time(job, at)]
        values = stacked([job.values for job in batch]) if batch else {}
        while jobs and at < len(loaded.plan.segments):
            began = time.monotonic()
            values, reached = loaded.run(values, at, max(job.deadline_s for job in jobs))
            if len(batch) == 1:
                loaded.pace.ran(at, time.monotonic() - began, reached)
            at = reached
            if at < len(loaded.plan.segments):
                jobs = [job for job in jobs if self._in_time(job, at)]
        if not jobs:
            return ()
        if len(batch) == 1:
            return ((jobs[0], values),)
        if any(len(array) != len(batch) for array in values.values()):
            raise FormatError(f"{len(batch)} requests as one gave another number of answers")
        answers = (
            (job, {name: array[row : row + 1] for name, array in values.items()}) for row, job in enumerate(batch)
        )
        return [(job, outputs) for job, outputs in answers if not job.result.done()]

    def _in_time(self, job: Job, segment: int) -> bool:
        now = time.monotonic()
        if now + job.loaded.pace.least_s(segment) > job.deadline_s:
            self._give_up(job, "segment", DeadlineExceeded("the request's time ran out between two segments"))
        elif now > self._stop_at_s:
            self._give_up(job, "drain", Draining("the tail shut down before the request was done"))
        elif not job.wanted():
            self._give_up(job, "gone", DeadlineExceeded("the caller has gone"))
        else:
            return True
        return False

    def _give_up(self, job: Job, where: str, error: SkerryError) -> None:
        self._metrics.expired(where)
        job.result.set_exception(error)


def _lane(job: Job) -> tuple[object, ...]:
    """Return what requests that may run as one have in common; what may not be stacked is in a lane for itself."""
    shapes = tuple((name, array.shape, str(array.dtype)) for name, array in sorted(job.values.items()))
    single = all(shape[:1] == (1,) for _, shape, _ in shapes)
    return (id(job.loaded), job.after, shapes) if single else (id(job),)


def _how_many(now_s: float, job: Job, waiting: int) -> int:
    return job.loaded.pace.how_many(job.after, waiting, job.deadline_s - now_s) if waiting > 1 else 1
