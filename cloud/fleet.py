"""The devices: how one joins and leaves, what each can do, and what it last said. Owned by the controller's one task."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import delete, func, select

from cloud.authority import (
    Authority,
    Invitation,
    device_id,
    key_fingerprint,
    new_secret,
    read_request,
    secret_digest,
    secret_of,
)
from cloud.database import Database, Device, Event, Invite, MemberRow, Revocation, Served, Wanted
from cloud.journal import Journal
from cloud.rollout import served_after
from cloud.selector import Selector, check_labels
from skills.errors import FormatError, NotFound, Refused, TrustError, UsageError
from skills.report import DeviceState, Hello
from skills.resolve import Capabilities
from skills.wire import decode_json, to_plain

MAX_INVITE_S = 30 * 86_400
MAX_INVITES = 10_000
KEPT_EVENTS = 20_000
WARNINGS = frozenset(("skill.failed", "skill.refused", "skill.stalled", "rollout.halted"))


@dataclasses.dataclass(frozen=True, slots=True)
class Enrolled:
    """A device that has just joined."""

    device: str
    cert_pem: str


class Fleet:
    """Invitations, devices, their reports and the audit of all that."""

    def __init__(self, database: Database, authority: Authority, journal: Journal, now: Callable[[], float]) -> None:
        self._database, self._authority, self._journal, self._now = database, authority, journal, now
        self._since_trim = 0
        self._there: set[str] = set()  # who is online, so that not every message asks the database
        with database.begin() as session:
            for device in session.query(Device).filter_by(online=True):
                device.online = False  # nobody is known to be there before it says so
            authority.revoke([row.serial for row in session.query(Revocation)])

    # --- joining and leaving ----------------------------------------------------------------------

    def invite(self, url: str, labels: Mapping[str, str], ttl_s: float) -> Invitation:
        """Make an invitation for one device.

        Raises:
            UsageError: labels that are not allowed, or a time to live out of range.
        """
        check_labels(labels)
        if not 1 <= ttl_s <= MAX_INVITE_S:
            raise UsageError(f"an invitation may live 1 to {MAX_INVITE_S} seconds, not {ttl_s:g}")
        secret = new_secret()
        with self._database.begin() as session:
            session.execute(delete(Invite).where(Invite.expires < self._now()))
            if (session.scalar(select(func.count()).select_from(Invite)) or 0) >= MAX_INVITES:
                raise Refused(f"{MAX_INVITES} invitations are open: wait until some expire")
            session.add(Invite(digest=secret_digest(secret), labels=dict(labels), expires=self._now() + ttl_s))
        self.record("device.invited", None, labels=dict(labels), ttl_s=ttl_s)
        return Invitation(url, secret, self._authority.fingerprint)

    def enroll(self, token: str, csr_pem: str, name: str | None) -> Enrolled:
        """Let a device join with a one-time token.

        The same key may come back with the same token, for its first answer may have been lost on the way.

        Raises:
            TrustError: the token is unknown, expired or used by another device.
            Refused: a device of this name exists.
            FormatError, UsageError: the request or the name is not what it should be.
        """
        request = read_request(csr_pem)
        fingerprint = key_fingerprint(request)
        with self._database.begin() as session:
            invite = session.get(Invite, secret_digest(secret_of(token)))
            if invite is None or invite.expires < self._now():
                raise TrustError("the invitation is unknown or has expired: make a new one with skerry devices invite")
            identity = device_id(name or invite.used_by, fingerprint)
            known = session.get(Device, identity)
            if invite.used_by is not None and (
                known is None or invite.used_by != identity or known.key_sha256 != fingerprint
            ):
                raise TrustError("the invitation was used already: make a new one with skerry devices invite")
            if known is not None and known.key_sha256 != fingerprint:
                raise Refused(
                    f"a device called {identity} is enrolled already: remove it first, or choose another name"
                )
            issued = self._authority.certify(csr_pem, identity)
            if known is None:
                known = Device(
                    id=identity, key_sha256=fingerprint, enrolled=self._now(), counter=0, nonce="", online=False
                )
                session.add(known)
            else:
                # Only the newest certificate is the device's: removing it must leave none that still opens a door.
                session.add(Revocation(serial=known.cert_serial, device=identity, time=self._now()))
            known.labels, known.cert_serial = dict(invite.labels), issued.serial
            invite.used_by = identity
            session.flush()
            self._authority.revoke([row.serial for row in session.query(Revocation)])
        self.record("device.enrolled", identity, key=fingerprint[:12])
        return Enrolled(identity, issued.cert_pem)

    def remove(self, device: str) -> None:
        """Forget a device and revoke its certificate.

        Raises:
            NotFound: there is no such device.
        """
        with self._database.begin() as session:
            known = session.get(Device, device)
            if known is None:
                raise NotFound(f"no device {device!r} is enrolled")
            session.add(Revocation(serial=known.cert_serial, device=device, time=self._now()))
            for table in (Wanted, Served, MemberRow):
                session.execute(delete(table).where(table.device == device))
            session.delete(known)
            session.flush()
            self._there.discard(device)
            # Written before the commit: a crash in between revokes a device that is still listed, never the reverse.
            self._authority.revoke([row.serial for row in session.query(Revocation)])
        self.record("device.removed", device)

    # --- looking ----------------------------------------------------------------------------------

    def devices(self) -> list[Device]:
        """Return all devices by name."""
        with self._database.begin() as session:
            return session.query(Device).order_by(Device.id).all()

    def device(self, identity: str) -> Device:
        """Return one device.

        Raises:
            NotFound: there is no such device.
        """
        with self._database.begin() as session:
            found = session.get(Device, identity)
        if found is None:
            raise NotFound(f"no device {identity!r} is enrolled")
        return found

    def wanted(self, identity: str) -> dict[str, str]:
        """Return which version of which skill a device should run."""
        with self._database.begin() as session:
            return {row.skill: row.version for row in session.query(Wanted).filter_by(device=identity)}

    def all_wanted(self) -> dict[str, dict[str, str]]:
        """Return the same for all devices that should run anything."""
        found: dict[str, dict[str, str]] = {}
        with self._database.begin() as session:
            for row in session.query(Wanted):
                found.setdefault(row.device, {})[row.skill] = row.version
        return found

    def count(self) -> tuple[int, int]:
        """Return how many devices are enrolled and how many of them are online."""
        with self._database.begin() as session:
            enrolled = session.scalar(select(func.count()).select_from(Device)) or 0
            return enrolled, session.scalar(select(func.count()).where(Device.online.is_(True))) or 0

    # --- what devices say -------------------------------------------------------------------------

    def heard_hello(self, identity: str, payload: bytes) -> Hello:
        """Keep what a device can do.

        Raises:
            FormatError: not a hello, or another device's.
            NotFound: the device is not enrolled.
        """
        hello = decode_json(Hello, payload, f"the hello of {identity}", 64 << 10)
        if hello.device != identity:
            raise FormatError(f"{identity} sent a hello that says it is {hello.device!r}")
        with self._database.begin() as session:
            device = _enrolled(session.get(Device, identity), identity)
            device.hello, device.nonce, device.seen = payload, hello.nonce, self._now()
        self.heard(identity)
        return hello

    def heard_state(self, identity: str, payload: bytes) -> DeviceState:
        """Keep what a device runs.

        Raises:
            FormatError: not a state, or another device's.
            NotFound: the device is not enrolled.
        """
        state = decode_json(DeviceState, payload, f"the state of {identity}", 256 << 10)
        if state.device != identity:
            raise FormatError(f"{identity} sent a state that says it is {state.device!r}")
        with self._database.begin() as session:
            device = _enrolled(session.get(Device, identity), identity)
            before = state_of(device)
            device.state, device.seen = payload, self._now()
            for skill in {entry.skill for entry in state.skills if entry.phase == "serving"}:
                entry = state.serving(skill)
                row = session.get(Served, (identity, skill))
                stack = tuple(row.versions) if row is not None else ()
                if entry is None or (stack and stack[-1] == entry.version):
                    continue
                if row is None:
                    session.add(Served(device=identity, skill=skill, versions=list(served_after(stack, entry.version))))
                else:
                    row.versions = list(served_after(stack, entry.version))
        self.heard(identity)
        for entry in state.skills:
            old = before.of(entry.skill, entry.manifest_sha256) if before is not None else None
            if old is None or (old.phase, old.reason) != (entry.phase, entry.reason):
                facts = {"skill": entry.skill, "version": entry.version, "reason": entry.reason or None}
                self.record(f"skill.{entry.phase}", identity, **facts)
        return state

    def heard(self, identity: str) -> None:
        """Note that a device is there.

        Raises:
            NotFound: the device is not enrolled.
        """
        if identity in self._there:
            return
        with self._database.begin() as session:
            device = _enrolled(session.get(Device, identity), identity)
            device.online, device.seen = True, self._now()
        self._there.add(identity)
        self.record("device.online", identity)

    def heard_nothing(self, identity: str) -> None:
        """Note that a device's connection broke."""
        with self._database.begin() as session:
            device = session.get(Device, identity)
            if device is None or not device.online:
                return
            device.online = False
        self._there.discard(identity)
        self.record("device.offline", identity)

    def broker_lost(self) -> None:
        """Note that nobody can be heard for now."""
        self._there.clear()
        with self._database.begin() as session:
            for device in session.query(Device).filter_by(online=True):
                device.online = False

    # --- audit ------------------------------------------------------------------------------------

    def record(self, kind: str, device: str | None, **data: Any) -> None:
        """Write an event to the audit and to the log."""
        data = {key: value for key, value in data.items() if value is not None}
        say = self._journal.warning if kind in WARNINGS else self._journal.info
        say(kind, device=device, **data)
        with self._database.begin() as session:
            session.add(Event(time=self._now(), kind=kind, device=device, data=data))
            self._since_trim += 1
            if self._since_trim >= 500:
                self._since_trim = 0
                newest = session.scalar(select(func.max(Event.id))) or 0
                session.execute(delete(Event).where(Event.id <= newest - KEPT_EVENTS))

    def events(self, limit: int, device: str | None = None) -> list[Event]:
        """Return the newest events, newest first."""
        with self._database.begin() as session:
            query = session.query(Event).order_by(Event.id.desc())
            if device is not None:
                query = query.filter_by(device=device)
            return query.limit(limit).all()


def _enrolled(device: Device | None, identity: str) -> Device:
    if device is None:
        raise NotFound(f"{identity} is not enrolled")
    return device


def capabilities_of(device: Device) -> Capabilities | None:
    """Return what a device can do, or None before its first hello (or where an older version kept another form of it)."""
    if device.hello is None:
        return None
    try:
        return decode_json(Hello, device.hello, f"the hello of {device.id}").capabilities
    except FormatError:
        return None


def state_of(device: Device) -> DeviceState | None:
    """Return what a device last reported, or None before its first report (or where an older version kept another form)."""
    if device.state is None:
        return None
    try:
        return decode_json(DeviceState, device.state, f"the state of {device.id}")
    except FormatError:
        return None


def matches(selector: Selector, device: Device) -> bool:
    """Say whether a selector means this device."""
    capabilities = capabilities_of(device)
    return selector.matches(device.id, capabilities.arch if capabilities else "", device.labels)


def device_json(device: Device, wanted: Mapping[str, str]) -> dict[str, Any]:
    """Return a device as the API shows it."""
    capabilities, state = capabilities_of(device), state_of(device)
    return {
        "id": device.id,
        "labels": device.labels,
        "arch": capabilities.arch if capabilities else None,
        "online": device.online,
        "seen": device.seen,
        "enrolled": device.enrolled,
        "counter": device.counter,
        "capabilities": to_plain(capabilities) if capabilities else None,
        "wanted": dict(wanted),
        "skills": [skill_json(entry) for entry in state.skills] if state else [],
    }


def skill_json(entry: Any) -> dict[str, Any]:
    """Return one version on a device as the API shows it, all fields always there."""
    names = ("skill", "version", "manifest_sha256", "phase", "reason", "received_bytes", "reused_bytes", "progress")
    return {**{name: getattr(entry, name) for name in names}, "variants": dict(entry.variants)}
