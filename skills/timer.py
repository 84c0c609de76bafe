"""The only way to get milliseconds: run work, learn how long it took on the device that it stands for; or end it early."""

import dataclasses
import re
import threading
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from skills.errors import UsageError

T = TypeVar("T")

PAUSE_S = 0.02  # before a timed run: a device is asked now and then, and what rests is up to a fifth slower than run after run


class Halted(Exception):
    """Work was ended before it was done, because somebody set its `Halt`."""


class Halt:
    """Ends work that is under way from another thread; once set it stays set."""

    def __init__(self) -> None:
        self._set = threading.Event()
        self._calls: list[Callable[[], None]] = []

    def set(self) -> None:
        """End the work."""
        self._set.set()
        for call in self._calls:
            call()

    def check(self) -> None:
        """Raise Halted once it is set."""
        if self._set.is_set():
            raise Halted

    def then(self, call: Callable[[], None]) -> None:
        """Have `call` made when it is set, now if it is; it may be made twice."""
        self._calls.append(call)
        if self._set.is_set():
            call()

    def sleep(self, seconds: float) -> None:
        """Sleep so long; raise Halted as soon as it is set."""
        self._set.wait(seconds)
        self.check()


@dataclasses.dataclass(frozen=True, slots=True)
class Timed(Generic[T]):
    """What the work returned, and its milliseconds on the clock of that device."""

    value: T
    ms: float


class Timer(Protocol):
    """Runs work as a device would."""

    def run(self, work: Callable[[], T], halt: Halt | None = None) -> Timed[T]:
        """Run `work` on the calling thread, to its end or until `halt` is set; then, if `work` looks at it, Halted is raised."""

    def device_ms(self, wall_ms: float, cpu_ms: float) -> float:
        """Return what a run that took this long here takes on the device, without waiting for it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Local:
    """This machine as it is."""

    def run(self, work: Callable[[], T], halt: Halt | None = None) -> Timed[T]:
        start = time.perf_counter()
        value = work()
        return Timed(value, (time.perf_counter() - start) * 1000)

    def device_ms(self, wall_ms: float, cpu_ms: float) -> float:
        return wall_ms


@dataclasses.dataclass(frozen=True, slots=True)
class Dilated:
    """A device `k` times slower: after each run, sleep (k-1) times the CPU time of the calling thread.

    Only one thread's work is slowed: run models with one thread.
    """

    k: float

    def run(self, work: Callable[[], T], halt: Halt | None = None) -> Timed[T]:
        start, cpu = time.perf_counter(), time.thread_time()
        value = work()
        (halt.sleep if halt is not None else time.sleep)(max(0.0, (self.k - 1) * (time.thread_time() - cpu)))
        return Timed(value, (time.perf_counter() - start) * 1000)

    def device_ms(self, wall_ms: float, cpu_ms: float) -> float:
        return wall_ms + (self.k - 1) * cpu_ms


def parse_timer(text: str) -> Timer:
    """Read `local` or `dilated(10)`.

    Raises:
        UsageError: neither of the two, or a factor below 1 or above 1000.
    """
    if text == "local":
        return Local()
    found = re.fullmatch(r"dilated\((\d+(?:\.\d+)?)\)", text)
    if not found or not 1 <= float(found[1]) <= 1000:
        raise UsageError(f"the timer {text!r} is not known: write local or dilated(K), K from 1 to 1000")
    return Dilated(float(found[1]))
