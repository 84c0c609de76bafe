"""Pulling one object in chunks: which to ask for, how many at once, when to give up hope. Pure but for its own counters.

The device asks (`Need`: request, acknowledgement and credit in one), the controller keeps no state. The window grows by a
half with every clean round and halves when a round stays empty; a lost chunk is simply asked for again.
"""

import dataclasses
from collections.abc import Iterable

from skills.report import MAX_CHUNKS_A_NEED, MAX_RANGES, Need

FIRST_WINDOW = 4
LARGEST_WINDOW = 16  # chunks of 64 KiB: 1 MiB in flight
EMPTY_ROUNDS_THAT_STALL = 5
FIRST_IDLE_S = 2.0
LONGEST_IDLE_S = 60.0
BAD_CHUNKS_THAT_REFUSE = 3


@dataclasses.dataclass(slots=True)
class Transfer:
    """The state of one object on its way in."""

    number: int
    sha256: str
    count: int
    have: set[int]
    window: int = FIRST_WINDOW
    in_flight: set[int] = dataclasses.field(default_factory=set)
    empty_rounds: int = 0

    @property
    def done(self) -> bool:
        return len(self.have) >= self.count

    def need(self) -> Need | None:
        """Return what to ask for now: enough to fill the window once half of it has come in, else nothing."""
        if self.done or len(self.in_flight) > self.window // 2:
            return None
        room = min(self.window, MAX_CHUNKS_A_NEED) - len(self.in_flight)
        missing = [index for index in range(self.count) if index not in self.have and index not in self.in_flight][
            :room
        ]
        ranges = list(_ranges(missing))[:MAX_RANGES]
        if not ranges:
            return None
        self.in_flight.update(index for first, last in ranges for index in range(first, last))
        return Need(self.number, self.sha256, tuple(ranges))

    def arrived(self, index: int) -> None:
        """A good chunk came."""
        self.have.add(index)
        self.in_flight.discard(index)
        self.empty_rounds = 0
        if not self.in_flight:
            self.window = min(self.window + max(self.window // 2, 1), LARGEST_WINDOW)

    def spoiled(self, index: int) -> None:
        """A chunk came with another hash than the manifest states: as if it had not come."""
        self.in_flight.discard(index)

    def idle(self) -> None:
        """Nothing came for `idle_s`: what was asked for is taken for lost."""
        self.in_flight.clear()
        self.window = max(self.window // 2, 1)
        self.empty_rounds += 1

    @property
    def stalled(self) -> bool:
        return self.empty_rounds >= EMPTY_ROUNDS_THAT_STALL

    def idle_s(self, jitter: float) -> float:
        """Return how long to wait for the next chunk; `jitter` from 0 to 1 keeps a fleet from asking in step."""
        return min(FIRST_IDLE_S * 2.0 ** min(self.empty_rounds, 10), LONGEST_IDLE_S) * (1 + 0.25 * jitter)


def _ranges(indices: Iterable[int]) -> Iterable[tuple[int, int]]:
    first = last = -1
    for index in indices:
        if index != last:
            if last > first >= 0:
                yield first, last
            first = index
        last = index + 1
    if last > first >= 0:
        yield first, last
