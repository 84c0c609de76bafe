"""Who may use which plan at a tail: the list of revoked certificates, and the table that the controller writes.

Both are files that somebody else replaces; they are looked at with every question and read again when they changed.
A file that cannot be read lets nobody in.
"""

import dataclasses
import functools
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, Literal, TypeVar

from skills.errors import FormatError, Refused, SkerryError, TrustError
from skills.files import read_bytes
from skills.split import admitted
from skills.split_plan import CutName, Plan
from skills.wire import decode_json

MAX_CRL_BYTES = 64 << 20
MAX_TABLE_BYTES = 64 << 20

T = TypeVar("T")
CodeRule = Literal["released", "never", "any"]


@dataclasses.dataclass(frozen=True, slots=True)
class Allowed:
    """Which cuts of which plans, by hash, each device may use; what is not named may not be used.

    The cut `input` stands for the whole model: who may use it sends the input itself.
    """

    devices: Mapping[str, Mapping[str, tuple[CutName, ...]]]
    format: Literal["allowed/v2"] = "allowed/v2"

    def __post_init__(self) -> None:
        for device, plans in self.devices.items():
            for plan in plans:
                if not re.fullmatch("[0-9a-f]{16}", plan):
                    raise FormatError(f"{device[:64]!r} is allowed {plan[:32]!r}, expected a plan's hash")


def remote_cuts(plan: Plan) -> frozenset[str]:
    """Return the cuts of a plan that a device may ask a tail for: of a private one, those that keep it so."""
    if plan.private:
        return frozenset(cut.name for cut, coding in admitted(plan) if coding is not None)
    return frozenset(cut.name for cut in plan.cuts if cut.name != "local")


class NotPermitted(Refused):
    """Policy says no, and asking again will not help."""


class Guard:
    """Answers from the newest content of both files; for use from many threads. Without a file its question is not asked."""

    def __init__(self, crl: Path | None = None, allowed: Path | None = None) -> None:
        """Read both files once.

        Raises:
            NotFound, FormatError, StorageError: one of them is missing, or not what it should be.
        """
        self._revoked = _Watched(crl, MAX_CRL_BYTES, "the list of revoked certificates", _serials) if crl else None
        self._allowed = _Watched(allowed, MAX_TABLE_BYTES, "the table of allowed plans", _table) if allowed else None
        for file in (self._revoked, self._allowed):
            if file is not None:
                file.get()

    def check_certificate(self, pem: bytes) -> None:
        """Let a client pass whose certificate is not revoked; that our CA signed it was the handshake's business.

        Raises:
            TrustError: it is revoked, or whether it is cannot be told.
        """
        if self._revoked is None:
            return
        try:
            revoked = _serial(pem) in self._revoked.get()
        except SkerryError as error:
            raise TrustError(f"the tail cannot tell who this is: {error}") from None
        if revoked:
            raise TrustError("this certificate was revoked: the device was removed, or enrolled again since")

    def check(self, device: str, plan: str, cut: str | None = None) -> None:
        """Let a device use a cut of a plan that the controller assigned to it; without a cut, ask about the plan alone.

        Raises:
            NotPermitted: it may not, or whether it may cannot be told.
        """
        if self._allowed is None:
            return
        who = device or "this client"
        try:
            plans = self._allowed.get().get(device, {})
        except SkerryError as error:
            raise NotPermitted(f"the tail cannot tell what {who} may use: {error}") from None
        cuts = plans.get(plan)
        if cuts is None:
            raise NotPermitted(f"{who} may not use the plan {plan[:32]!r}: it is not assigned to it")
        if cut is not None and cut not in cuts:
            allowed = ", ".join(sorted(cuts)) or "none"
            raise NotPermitted(f"{who} may not use the cut {cut[:32]!r} of plan {plan}, allowed are: {allowed}")

    def check_code(self, plan: str, rule: CodeRule = "released") -> None:
        """Let the code of a skill run whose plan the table names: the controller enters what came in a signed release.

        Raises:
            NotPermitted: it does not, or `rule` forbids all of it; with `any` nothing is asked.
        """
        if rule == "any":
            return
        if rule == "never":
            raise NotPermitted(f"the plan {plan[:32]!r} is a skill's code, and this tail runs none (--stages never)")
        try:
            released = self.plans()
        except SkerryError as error:
            raise NotPermitted(f"the tail cannot tell whether the plan {plan[:32]!r} was released: {error}") from None
        if released is None or plan not in released:
            raise NotPermitted(
                f"the plan {plan[:32]!r} is a skill's code, and no table (--allowed) says that it came in a release"
            )

    def plans(self) -> frozenset[str] | None:
        """Return the plans that any device may use, None when there is no table: then anybody may use all of them.

        Raises:
            FormatError, StorageError: the table cannot be read.
        """
        if self._allowed is None:
            return None
        return frozenset(plan for plans in self._allowed.get().values() for plan in plans)


class _Watched(Generic[T]):
    """A file's checked content, read again when the file was replaced."""

    def __init__(self, path: Path, max_bytes: int, what: str, parse: Callable[[bytes, str], T]) -> None:
        self._path, self._max_bytes, self._what, self._parse = path, max_bytes, what, parse
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._value: T | None = None

    def get(self) -> T:
        with self._lock:
            try:
                found = self._path.stat()
            except OSError as error:
                raise FormatError(f"{self._what} cannot be read: {error.strerror or error}") from None
            now = found.st_mtime_ns, found.st_size, found.st_ino
            if self._value is None or now != self._seen:
                # Looked at before it is read: a file that is replaced in between is read once more, never once too few.
                self._value = None
                self._value = self._parse(read_bytes(self._path, self._what, self._max_bytes), self._what)
                self._seen = now
            return self._value


def _table(data: bytes, what: str) -> dict[str, dict[str, frozenset[str]]]:
    table = decode_json(Allowed, data, what, MAX_TABLE_BYTES)
    return {device: {plan: frozenset(cuts) for plan, cuts in plans.items()} for device, plans in table.devices.items()}


def _serials(data: bytes, what: str) -> frozenset[int]:
    from cryptography import x509

    try:
        return frozenset(entry.serial_number for entry in x509.load_pem_x509_crl(data))
    except ValueError as error:
        raise FormatError(f"{what} is none: {error}") from None


@functools.lru_cache(maxsize=4096)
def _serial(pem: bytes) -> int:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(pem).serial_number
    except ValueError as error:
        raise TrustError(f"the client's certificate is none: {error}") from None
