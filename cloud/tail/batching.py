"""Which request the tail computes next. Pure: earliest deadline first; what is late is handed back, what is too much refused.

On one CPU thread a batch of several requests takes as long per item as one alone, so a turn is one request.
"""

import dataclasses
import heapq
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Turn(Generic[T]):
    """What comes out of the queue: the next job, if any, and those whose time ran out while they waited."""

    job: T | None
    expired: tuple[T, ...]


class DeadlineQueue(Generic[T]):
    """A bounded queue in order of deadline; equal deadlines in order of arrival."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._heap: list[tuple[float, int, T]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, job: T, deadline_s: float) -> bool:
        """Add a job; False when the queue is full, and then nothing changed."""
        if len(self._heap) >= self._bound:
            return False
        self._count += 1
        heapq.heappush(self._heap, (deadline_s, self._count, job))
        return True

    def pop(self, now_s: float) -> Turn[T]:
        """Take the job with the earliest deadline that can still be met."""
        expired: list[T] = []
        while self._heap:
            deadline, _, job = heapq.heappop(self._heap)
            if deadline > now_s:
                return Turn(job, tuple(expired))
            expired.append(job)
        return Turn(None, tuple(expired))
