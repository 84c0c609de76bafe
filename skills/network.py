"""A network between device and tail: how people write it, and how TCP starts on it. Pure."""

import dataclasses
import re
from typing import Annotated

from skills.errors import UsageError
from skills.wire import Limits

INITIAL_WINDOW_BYTES = 14_600  # ten segments of 1460 bytes: what TCP sends before the first acknowledgement (RFC 6928)


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """A network between device and tail: uplink rate and round-trip time."""

    mbit: Annotated[float, Limits(min=0.001, max=1e6)]
    rtt_ms: Annotated[float, Limits(min=0, max=60_000)]

    def __str__(self) -> str:
        return f"{self.mbit:g}mbit/{self.rtt_ms:g}ms"


ASSUMED = Link(20, 30)  # until the device has measured its own


def parse_link(text: str) -> Link:
    """Read a link as people write it: `20mbit/30ms`.

    Raises:
        UsageError: what was found and what was expected.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(k|m|g)bit/(?:s/)?(\d+(?:\.\d+)?)\s*ms", text.strip().lower())
    if not found:
        raise UsageError(
            f"the link {text!r} is not understood: write it like 20mbit/30ms (uplink rate / round-trip time)"
        )
    mbit = float(found[1]) * {"k": 0.001, "m": 1.0, "g": 1000.0}[found[2]]
    if not 0.001 <= mbit <= 1e6 or float(found[3]) > 60_000:
        raise UsageError(f"the link {text!r} is out of range: 1kbit to 1000gbit, at most 60000ms")
    return Link(mbit, float(found[3]))


def slow_start_ms(size: int, mbit: float, rtt_ms: float) -> float:
    """Return what a cold TCP connection adds: one round trip per doubling of the window, less what it sends meanwhile.

    It over-estimates payloads above the bandwidth-delay product (docs/splitting.md).
    """
    window, sent, lost = INITIAL_WINDOW_BYTES, 0, 0.0
    while sent + window < size:
        stall = rtt_ms - window * 8 / (mbit * 1000)
        if stall <= 0:
            break
        lost += stall
        sent += window
        window *= 2
    return lost
