"""Whose turn it is at the tail. Pure: what must begin first is next, what is late is handed back, what is too much refused.

Jobs wait in lanes: one lane holds the requests that may run as one batch (the same plan, the same first segment, the same
shapes). How many of a lane are taken at once is the caller's to say.
"""

import dataclasses
import heapq
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Turn(Generic[T]):
    """What comes out of the queue: the jobs to run together, if any, and those that can no longer be in time."""

    jobs: tuple[T, ...]
    expired: tuple[T, ...]


def alone(_first: object, _waiting: int) -> int:
    """Take one job at a time."""
    return 1


class LaneQueue(Generic[T]):
    """A bounded queue in order of the latest start that is still in time; equal ones in order of arrival."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._lanes: dict[Hashable, list[tuple[float, int, T]]] = {}
        self._arrivals = 0
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def push(self, job: T, latest_start_s: float, lane: Hashable = None) -> bool:
        """Add a job; False when the queue is full, and then nothing changed."""
        if self._waiting >= self._bound:
            return False
        self._arrivals += 1
        self._waiting += 1
        heapq.heappush(self._lanes.setdefault(lane, []), (latest_start_s, self._arrivals, job))
        return True

    def pop(self, now_s: float, how_many: Callable[[T, int], int] = alone) -> Turn[T]:
        """Take the job that must begin first, and as many of its lane as `how_many` (that job, how many wait) says."""
        expired = []
        for lane, heap in list(self._lanes.items()):
            while heap and heap[0][0] <= now_s:
                expired.append(self._take(heap))
            if not heap:
                del self._lanes[lane]
        if not self._lanes:
            return Turn((), tuple(expired))
        lane, heap = min(self._lanes.items(), key=lambda item: item[1][0][:2])
        count = max(1, min(len(heap), how_many(heap[0][2], len(heap))))
        jobs = tuple(self._take(heap) for _ in range(count))
        if not heap:
            del self._lanes[lane]
        return Turn(jobs, tuple(expired))

    def clear(self) -> tuple[T, ...]:
        """Take all that waits, in no order that matters."""
        left = tuple(job for heap in self._lanes.values() for _, _, job in heap)
        self._lanes.clear()
        self._waiting = 0
        return left

    def _take(self, heap: list[tuple[float, int, T]]) -> T:
        self._waiting -= 1
        return heapq.heappop(heap)[2]
