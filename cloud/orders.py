"""What every device should run: rollouts applied to the fleet, and the signed assignment that tells a device.

The decisions are `cloud.rollout`'s; here they are loaded, taken and stored, each step in one transaction.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal, cast

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloud import rollout as rules
from cloud.database import Database, Device, MemberRow, Release, RolloutRow, Served, Wanted
from cloud.fleet import Fleet, capabilities_of, matches, state_of
from cloud.registry import Registry
from cloud.rollout import Fact, Member, Order, Rollout
from cloud.selector import parse_selector
from skills.bundle import fit
from skills.desired import Assignment, ObjectRef, WantedSkill, seal
from skills.errors import NotFound, UsageError
from skills.resolve import Choice

Verb = Literal["pause", "resume", "abort"]
VERBS: dict[Verb, Callable[[Rollout], Rollout]] = {"pause": rules.pause, "resume": rules.resume, "abort": rules.abort}


class Orders:
    """Rollouts and assignments; every method that changes something returns the devices that must be told."""

    def __init__(self, database: Database, fleet: Fleet, registry: Registry, now: Callable[[], float]) -> None:
        self._database, self._fleet, self._registry, self._now = database, fleet, registry, now

    # --- starting ---------------------------------------------------------------------------------

    def push(self, skill: str, version: str | None, selector: str, canary: str | None) -> tuple[int, set[str]]:
        """Start a rollout of one release to all devices that a selector means.

        Raises:
            NotFound: no such release, or no device is meant.
            UsageError: the selector or the canary is not understood.
        """
        meant = parse_selector(selector)
        release = self._registry.release(skill, version)
        with self._database.begin() as session:
            devices = [device for device in session.query(Device).order_by(Device.id) if matches(meant, device)]
            if not devices:
                raise NotFound(f"no enrolled device matches {selector!r} (see: skerry devices)")
            devices.sort(key=lambda device: self._last_to_first(device, release))
            members = [Member(d.id, release.version, _serves(session, d.id, skill)) for d in devices]
            size = rules.canary_size(canary, len(members))
            number = self._begin(session, skill, release.version, "push", str(meant), members, size)
        self._fleet.record(
            "rollout.started",
            None,
            rollout=number,
            skill=skill,
            version=release.version,
            to=selector,
            canary=size or None,
        )
        return number, self.step()

    def rollback(self, skill: str, selector: str) -> tuple[int, set[str]]:
        """Bring every device that a selector means back to the version of the skill that it served before.

        Raises:
            NotFound: no device is meant, or none served another version before.
            UsageError: the selector is not understood.
        """
        meant = parse_selector(selector)
        with self._database.begin() as session:
            members = []
            devices = [device for device in session.query(Device).order_by(Device.id) if matches(meant, device)]
            for device in devices:
                row = session.get(Served, (device.id, skill))
                if row is not None and len(row.versions) > 1:
                    members.append(Member(device.id, row.versions[-2], row.versions[-1]))
            if not devices:
                raise NotFound(f"no enrolled device matches {selector!r} (see: skerry devices)")
            if not members:
                raise NotFound(f"no device of {selector!r} served another version of {skill} before")
            versions = {member.version for member in members}
            version = versions.pop() if len(versions) == 1 else None
            number = self._begin(session, skill, version, "rollback", str(meant), members, 0)
        self._fleet.record("rollback.started", None, rollout=number, skill=skill, to=selector, version=version)
        return number, self.step()

    def _begin(
        self,
        session: Session,
        skill: str,
        version: str | None,
        kind: str,
        selector: str,
        members: Sequence[Member],
        canary: int,
    ) -> int:
        taken = {member.device for member in members}
        for older in session.query(RolloutRow).filter(RolloutRow.skill == skill):
            if _is_open(session, older):
                before = _load(session, older)
                _store(session, older, before, rules.supersede(before, taken))
        fresh = rules.begin(members, canary)
        row = RolloutRow(
            skill=skill, version=version, kind=kind, selector=selector, canary=canary, time=self._now(), reason=""
        )
        row.state, row.proven = fresh.state, fresh.proven
        session.add(row)
        session.flush()
        _store(session, row, None, fresh)
        return row.id

    def _last_to_first(self, device: Device, release: Release) -> tuple[bool, bool]:
        """Order candidates so that canaries are devices that are there and that some variant fits."""
        return (not device.online, not self._fits(device, release.manifest_sha256))

    # --- going on ---------------------------------------------------------------------------------

    def step(self, reported: Collection[str] | None = None) -> set[str]:
        """Look at every open rollout once, and return the devices whose assignment changed.

        `reported` limits the look to what these devices said; None looks at everybody's last report.
        """
        changed: set[str] = set()
        notes: list[tuple[str, dict[str, Any]]] = []
        with self._database.begin() as session:
            for row in session.query(RolloutRow).filter(RolloutRow.state != "done").order_by(RolloutRow.id):
                if not _is_open(session, row):
                    continue
                before = _load(session, row)
                seen = rules.observe(before, self._facts(session, row, before, reported))
                after, orders = rules.advance(seen)
                _store(session, row, before, after)
                changed |= self._apply(session, row.skill, orders)
                if after.state != before.state:
                    facts = {
                        "rollout": row.id,
                        "skill": row.skill,
                        "version": row.version,
                        "reason": after.reason or None,
                    }
                    notes.append((f"rollout.{after.state}", facts))
        for kind, facts in notes:
            self._fleet.record(kind, None, **facts)
        return changed

    def change(self, number: int, verb: Verb) -> set[str]:
        """Pause, resume or abort a rollout.

        Raises:
            NotFound: there is no such rollout.
            UsageError: it is in a state that does not allow this.
        """
        with self._database.begin() as session:
            row = _row(session, number)
            before = _load(session, row)
            _store(session, row, before, VERBS[verb](before))
        self._fleet.record(f"rollout.{verb}", None, rollout=number)
        return self.step()

    def joined(self, identity: str) -> set[str]:
        """Give a device that appeared late the releases of the rollouts that mean it; return whom to tell."""
        joined = False
        with self._database.begin() as session:
            device = session.get(Device, identity)
            if device is None:
                return set()
            had = select(RolloutRow.skill).join(MemberRow, MemberRow.rollout == RolloutRow.id)
            had = had.where(MemberRow.device == identity)
            missed = select(RolloutRow.skill).distinct().where(RolloutRow.skill.not_in(had))
            for skill in session.scalars(missed).all():
                row = self._current_for(session, skill, device)
                if row is None or row.version is None:
                    continue
                before = _load(session, row)
                after = rules.join(before, [Member(identity, row.version, _serves(session, identity, skill))])
                if after != before:
                    _store(session, row, before, after)
                    joined = True
        return self.step() if joined else set()

    def _current_for(self, session: Session, skill: str, device: Device) -> RolloutRow | None:
        """Return the newest rollout or rollback of a skill that means a device and did not come to nothing."""
        rows = session.query(RolloutRow).filter_by(skill=skill).filter(RolloutRow.state.not_in(("halted", "aborted")))
        newest_first = rows.order_by(RolloutRow.id.desc())
        return next((row for row in newest_first if matches(parse_selector(row.selector), device)), None)

    def _facts(
        self, session: Session, row: RolloutRow, rollout: Rollout, reported: Collection[str] | None
    ) -> dict[str, Fact]:
        facts = {}
        for member in rollout.members:
            if reported is not None and member.device not in reported:
                continue
            if member.stage in rules.SETTLED and member.stage != "serving":
                continue
            device = session.get(Device, member.device)
            state = state_of(device) if device is not None else None
            # A report about an earlier assignment says nothing about this one.
            if device is None or state is None or state.counter < device.counter:
                continue
            release = session.query(Release).filter_by(skill=row.skill, version=member.version).one()
            entry = state.of(row.skill, release.manifest_sha256)
            if entry is not None:
                fits = entry.phase != "refused" or self._fits(device, release.manifest_sha256)
                facts[member.device] = Fact(entry.phase, entry.reason, fits)
        return facts

    def _fits(self, device: Device, manifest_sha256: str) -> bool:
        capabilities = capabilities_of(device)
        if capabilities is None:
            return False
        return isinstance(fit(self._registry.manifest(manifest_sha256), capabilities), Choice)

    def _apply(self, session: Session, skill: str, orders: Iterable[Order]) -> set[str]:
        changed = set()
        for order in orders:
            device = session.get(Device, order.device)
            row = session.get(Wanted, (order.device, skill))
            if device is None or (row.version if row is not None else None) == order.version:
                continue
            if order.version is None:
                session.delete(row)
            elif row is None:
                session.add(Wanted(device=order.device, skill=skill, version=order.version))
            else:
                row.version = order.version
            # Unix time as the least counter: after a restored backup devices must not see an older one than before.
            device.counter = max(device.counter + 1, int(self._now()))
            changed.add(order.device)
        return changed

    # --- looking ----------------------------------------------------------------------------------

    def rollouts(self, limit: int = 100) -> list[dict[str, Any]]:
        """Return the newest rollouts as the API shows them, without their devices."""
        with self._database.begin() as session:
            rows = session.query(RolloutRow).order_by(RolloutRow.id.desc()).limit(limit).all()
            return [_rollout_json(row, _load(session, row)) for row in rows]

    def rollout(self, number: int) -> dict[str, Any]:
        """Return one rollout with its devices as the API shows it.

        Raises:
            NotFound: there is no such rollout.
        """
        with self._database.begin() as session:
            row = _row(session, number)
            rollout = _load(session, row)
            shown = _rollout_json(row, rollout)
            shown["devices"] = [self._member_json(session, row, member) for member in rollout.members]
        return shown

    def _member_json(self, session: Session, row: RolloutRow, member: Member) -> dict[str, Any]:
        device = session.get(Device, member.device)
        state = state_of(device) if device is not None else None
        release = session.query(Release).filter_by(skill=row.skill, version=member.version).one()
        entry = state.of(row.skill, release.manifest_sha256) if state is not None else None
        return {
            **dataclasses.asdict(member),
            "online": device is not None and device.online,
            "phase": entry.phase if entry else None,
            "variants": dict(entry.variants) if entry else {},
            "progress": entry.progress if entry else 0.0,
            "received_bytes": entry.received_bytes if entry else 0,
            "reused_bytes": entry.reused_bytes if entry else 0,
        }

    # --- telling ----------------------------------------------------------------------------------

    def manifests(self, identity: str) -> tuple[str, ...]:
        """Return the manifests that a device's assignment names, by SHA-256."""
        query = select(Release.manifest_sha256).where(Wanted.device == identity)
        query = query.join(Wanted, (Wanted.skill == Release.skill) & (Wanted.version == Release.version))
        with self._database.begin() as session:
            return tuple(session.scalars(query))

    def assignment(self, identity: str) -> bytes:
        """Return the sealed assignment of a device: what it should run now, answering its last hello.

        Raises:
            NotFound: there is no such device.
        """
        with self._database.begin() as session:
            device = session.get(Device, identity)
            if device is None:
                raise NotFound(f"no device {identity!r} is enrolled")
            wanted = []
            for row in session.query(Wanted).filter_by(device=identity).order_by(Wanted.skill):
                release = session.query(Release).filter_by(skill=row.skill, version=row.version).one()
                manifest = ObjectRef(release.manifest_sha256, release.manifest_size)
                wanted.append(WantedSkill(release.skill, release.version, release.target, manifest))
            assignment = Assignment(
                device=identity,
                counter=device.counter,
                time=int(self._now()),
                metadata=self._registry.metadata,
                skills=tuple(wanted),
                nonce=device.nonce,
            )
        return seal(assignment, self._registry.keys.director)


def _is_open(session: Session, row: RolloutRow) -> bool:
    """Say whether a rollout may still change; the cheap question first, for there are many old rollouts."""
    if row.state in rules.OPEN_STATES:
        return True
    if row.state == "done":
        return False
    unsettled = select(MemberRow).where(MemberRow.rollout == row.id)
    unsettled = unsettled.where(
        (MemberRow.stage == "assigned") | ((MemberRow.stage == "failed") & MemberRow.returned.is_(False))
    )
    return session.scalars(unsettled.limit(1)).first() is not None


def _row(session: Session, number: int) -> RolloutRow:
    row = session.get(RolloutRow, number)
    if row is None:
        raise NotFound(f"there is no rollout {number} (see: skerry rollouts)")
    return row


def _load(session: Session, row: RolloutRow) -> Rollout:
    rows = session.query(MemberRow).filter_by(rollout=row.id).order_by(MemberRow.position)
    members = tuple(
        Member(m.device, m.version, m.previous, m.canary, cast(rules.Stage, m.stage), m.reason, m.returned)
        for m in rows
    )
    return Rollout(members, row.canary, cast(rules.State, row.state), row.proven, row.reason)


def _store(session: Session, row: RolloutRow, before: Rollout | None, after: Rollout) -> None:
    """Write what changed since `before`; None means that nothing was written yet."""
    row.state, row.proven, row.reason = after.state, after.proven, after.reason
    old = before.members if before is not None else ()
    for position, member in enumerate(after.members):
        if position < len(old) and old[position] is member:
            continue
        known = session.get(MemberRow, (row.id, member.device)) if position < len(old) else None
        if known is None:
            known = MemberRow(rollout=row.id, device=member.device)
            session.add(known)
        known.position, known.version, known.previous = position, member.version, member.previous
        known.canary, known.stage, known.reason = member.canary, member.stage, member.reason
        known.returned = member.returned


def _serves(session: Session, device: str, skill: str) -> str | None:
    row = session.get(Served, (device, skill))
    wanted = session.get(Wanted, (device, skill))
    # What was taken away from a device (a first version that failed) is nothing to go back to.
    return row.versions[-1] if row is not None and row.versions and wanted is not None else None


def _rollout_json(row: RolloutRow, rollout: Rollout) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for member in rollout.members:
        counts[member.stage] = counts.get(member.stage, 0) + 1
    names = ("id", "skill", "version", "kind", "selector", "canary", "state", "proven", "reason", "time")
    return {**{name: getattr(row, name) for name in names}, "counts": counts}


def check_verb(verb: str) -> Verb:
    """Return the verb if it is one.

    Raises:
        UsageError: it is not.
    """
    if verb not in VERBS:
        raise UsageError(f"a rollout cannot be told to {verb!r}: pause, resume or abort")
    return verb
