"""Which device may use which cuts of which split plan at the tail: a table in a file, from what the controller assigned.

A device may use the plans of the releases that it should run, and those of an older release for as long as it reports
that it still serves it and was once assigned it: during an update both answer. Of a private plan only those cuts that keep
it private. The file is replaced whole, before a device is told of its new assignment.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloud.database import Database, Device, MemberRow, Release, RolloutRow, Wanted
from cloud.fleet import state_of
from cloud.journal import Journal
from cloud.registry import Registry
from cloud.tail.guard import Allowed
from skills.errors import SkerryError
from skills.files import write_atomic
from skills.wire import encode_json

Version = tuple[str, str]  # skill, version
Cuts = Mapping[str, frozenset[str]]  # of each plan, by hash


class Permits:
    """The table and its file; owned by the controller's one task."""

    def __init__(self, file: Path, database: Database, registry: Registry, journal: Journal) -> None:
        self._file, self._database, self._registry, self._journal = file, database, registry, journal
        self._rows: dict[str, Cuts] = {}
        self._written: bytes | None = None
        self._unreadable: set[str] = set()

    def rebuild(self) -> None:
        """Look at the whole fleet and write the table where it changed.

        Raises:
            StorageError: it cannot be written; the old one stands.
        """
        self._rows = self._look(None)
        self._write()

    def update(self, devices: Collection[str]) -> None:
        """Look at these devices, and write the table where it changed.

        Raises:
            StorageError: it cannot be written; the old one stands, and the next call tries again.
        """
        found = self._look(devices)
        for device in devices:
            self._rows.pop(device, None)
        self._rows.update(found)
        self._write()

    def _write(self) -> None:
        rows = {
            device: {plan: tuple(sorted(cuts)) for plan, cuts in sorted(plans.items())}
            for device, plans in sorted(self._rows.items())
        }
        data = encode_json(Allowed(rows))
        if data != self._written or not self._file.exists():
            write_atomic(self._file, data)
            self._written = data

    def _look(self, devices: Collection[str] | None) -> dict[str, Cuts]:
        meant = None if devices is None else frozenset(devices)
        rows: dict[str, Cuts] = {}
        with self._database.begin() as session:
            plans = self._plans(session.query(Release))
            if not plans:
                return rows
            skills = {skill for skill, _ in plans}
            wanted = select(Wanted.device, Wanted.skill, Wanted.version).where(Wanted.skill.in_(skills))
            once = select(MemberRow.device, RolloutRow.skill, MemberRow.version).distinct()
            once = once.join(RolloutRow, MemberRow.rollout == RolloutRow.id)
            once = once.where(RolloutRow.skill.in_(skills), MemberRow.stage != "waiting")
            if (
                meant is not None and len(meant) <= 500
            ):  # else all rows are read: databases bound what a question may hold
                wanted, once = wanted.where(Wanted.device.in_(meant)), once.where(MemberRow.device.in_(meant))
            now = {(device, (skill, version)) for device, skill, version in session.execute(wanted)}
            older = {(device, (skill, version)) for device, skill, version in session.execute(once)} - now
            old_of: dict[str, set[Version]] = {}
            for device, version in older:
                if version in plans and (meant is None or device in meant):
                    old_of.setdefault(device, set()).add(version)
            for device, version in now:
                if version in plans and (meant is None or device in meant):
                    rows[device] = _both(rows.get(device, {}), plans[version])
            for device, versions in old_of.items():
                for version in versions & _served(session, device):
                    rows[device] = _both(rows.get(device, {}), plans[version])
        return rows

    def _plans(self, releases: Iterable[Release]) -> dict[Version, Cuts]:
        """Return the split plans of all releases that have any."""
        found = {}
        for release in releases:
            try:
                plans = self._registry.plans_of(release.manifest_sha256)
            except SkerryError as error:
                say = self._journal.debug if release.manifest_sha256 in self._unreadable else self._journal.warning
                self._unreadable.add(release.manifest_sha256)
                say("release.unreadable", skill=release.skill, version=release.version, error=error)
                continue
            self._unreadable.discard(release.manifest_sha256)
            if plans:
                found[release.skill, release.version] = plans
        return found


def _both(one: Cuts, other: Cuts) -> Cuts:
    return {plan: one.get(plan, frozenset()) | other.get(plan, frozenset()) for plan in {**one, **other}}


def _served(session: Session, identity: str) -> set[Version]:
    device = session.get(Device, identity)
    state = state_of(device) if device is not None else None
    return {(entry.skill, entry.version) for entry in state.skills if entry.phase == "serving"} if state else set()
