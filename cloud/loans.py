"""Which objects a device may fetch beside those of its assignment, for which work, and until when. Pure."""


class Loans:
    """Several works may be lent to one device: the second one's end is not the first one's. Times are seconds of one clock."""

    def __init__(self) -> None:
        self._loans: dict[tuple[str, str], tuple[frozenset[str], float]] = {}

    def lend(self, device: str, work: str, objects: frozenset[str], until: float) -> None:
        """Let a device fetch the objects of a work until then; what the same work lent it before counts no more."""
        self._loans[device, work] = objects, until

    def end(self, device: str, work: str) -> None:
        """Let a device fetch nothing more for this work."""
        self._loans.pop((device, work), None)

    def forget(self, device: str) -> None:
        """Let a device fetch nothing more for any work."""
        self._loans = {loan: lent for loan, lent in self._loans.items() if loan[0] != device}

    def holds(self, device: str, sha256: str, now: float) -> bool:
        """Say whether an object is lent to a device."""
        return any(
            sha256 in objects and until > now
            for (holder, _), (objects, until) in self._loans.items()
            if holder == device
        )

    def objects(self, now: float) -> frozenset[str]:
        """Return all that is lent to any device; what is over is forgotten."""
        self._loans = {loan: lent for loan, lent in self._loans.items() if lent[1] > now}
        return frozenset[str]().union(*(objects for objects, _ in self._loans.values()))
