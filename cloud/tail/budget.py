"""How many bytes of requests a tail holds at once: what would go beyond is refused before it is decoded."""

import threading

from skills.errors import Refused

MAX_HELD_BYTES = 192 << 20  # two of the largest requests there may be, or thousands of usual ones


class OverBudget(Refused):
    """The bytes of a request have no room here now."""


class ByteBudget:
    """Counts bytes from `take` to `give`; for use from many threads."""

    def __init__(self, limit: int = MAX_HELD_BYTES) -> None:
        self._limit, self._held = limit, 0
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """Bytes that are taken now."""
        return self._held

    def take(self, size: int) -> None:
        """Count `size` bytes as held.

        Raises:
            OverBudget: they would go beyond the limit; nothing was counted.
        """
        with self._lock:
            if self._held + size > self._limit:
                raise OverBudget(
                    f"the tail holds {self._held >> 20} MiB of requests and has no room for {-(-size >> 20)} MiB more: "
                    "try again later, or answer on the device"
                )
            self._held += size

    def give(self, size: int) -> None:
        """Count `size` bytes as held no more."""
        with self._lock:
            self._held -= size


class Held:
    """What one request holds of a budget, given back as one."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget, self._size = budget, 0

    def take(self, size: int) -> None:
        """Count `size` bytes more; raises OverBudget as `ByteBudget.take`."""
        self._budget.take(size)
        self._size += size

    def give(self) -> None:
        """Count none of them any more."""
        self._budget.give(self._size)
        self._size = 0
