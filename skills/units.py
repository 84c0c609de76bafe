"""How numbers are said to people, and read from them: one form everywhere. Pure."""

import re

from skills.errors import UsageError

UNIT_SECONDS = {"h": 3600, "m": 60, "s": 1}


def readable(count: int) -> str:
    """Return bytes as people read them: 812 B, 46.1 kB, 18.6 MB, 1.25 GB."""
    if count < 1000:
        return f"{count} B"
    if count < 999_950:
        return f"{count / 1000:.1f} kB"
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def readable_ms(ms: float) -> str:
    """Return milliseconds as people read them, two digits below ten: 0.5 ms, 6.2 ms, 63 ms."""
    return f"{ms:.0f} ms" if ms >= 9.95 else f"{ms:.2g} ms"


def parse_duration(text: str) -> float:
    """Return the seconds of a text like 90s, 30m or 1h30m.

    Raises:
        UsageError: it is no such text, or no time at all.
    """
    found = re.fullmatch(r"(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+)s)?", text.strip())
    seconds = sum(
        int(count or 0) * unit
        for count, unit in zip(found.groups() if found else (), UNIT_SECONDS.values(), strict=False)
    )
    if not seconds:
        raise UsageError(f"'{text}' is no time, expected hours, minutes or seconds like 90s, 30m or 1h30m")
    return float(seconds)


def duration(seconds: float) -> str:
    """Return a time as people read it: 45 s, 12 min, 1 h 30 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")
