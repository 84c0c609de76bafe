"""Where the requests of split skills ran last, and whether their tail answers; when that changes, what the log shall say."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

MAX_CHANGES = 4  # lines for each skill within the time below; a tail that comes and goes tells the log no more
CHANGES_WITHIN_S = 600.0


@dataclasses.dataclass(slots=True)
class Whereabouts:
    """Of one split skill; `away` says why requests cannot ask the tail, "" while it answers. Times are seconds of one clock."""

    where: str
    cut: str
    time: float
    away: str = ""
    told: str = ""
    changes: "collections.deque[float]" = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=MAX_CHANGES)
    )


class Watch:
    """Notes every answer and remembers the last one of each split skill."""

    def __init__(self) -> None:
        self.last: dict[str, Whereabouts] = {}

    def note(self, skill: str, header: Mapping[str, Any], now: float) -> str | None:
        """Note an answer's header; return why the tail is away now, "" when it is back, None when nothing is to be told.

        What was held back is told by a later request, if it is still so.
        """
        where, tail = str(header.get("where", "local")), header.get("tail")
        if tail is None and where == "local":
            self.last.pop(skill, None)  # not split, or no longer
            return None
        found = self.last.setdefault(skill, Whereabouts(where, "", now))
        found.where, found.cut, found.time = where, str(header.get("cut", "local")), now
        if tail is not None:
            found.away = str(tail)
        full = len(found.changes) == MAX_CHANGES and now - found.changes[0] < CHANGES_WITHIN_S
        if bool(found.away) == bool(found.told) or full:
            return None
        found.told = found.away
        found.changes.append(now)
        return found.away
