"""What is known of the skills of one device: what is wanted, the pointers on the disk, and how it went so far.

Only pointers outlast a boot. Attempts and lives are remembered in memory alone: after a boot everything is tried afresh.
"""

import collections
import contextlib
import dataclasses
import logging
from collections.abc import Mapping

from edge_agent.plan import Facts, Pointer, Running
from edge_agent.store import Store
from skills.bundle import Bundle
from skills.desired import Assignment, WantedSkill
from skills.errors import FormatError, NotFound
from skills.resolve import Capabilities

LOG = logging.getLogger("skerry.agent")

FIRST_HOLD_S = 2.0
LONGEST_HOLD_S = 60.0
KEPT_BUNDLES = 32


@dataclasses.dataclass(slots=True)
class Attempt:
    """How far one wanted version has come."""

    digest: str
    metadata: str
    trusted: str | None = None
    received_bytes: int = 0
    received_part_bytes: int = 0
    progress: float = 0.0
    stalled: str = ""
    failures: int = 0
    held_until: float = 0.0

    def failed(self, reason: str, now: float) -> None:
        """A step did not work: wait longer each time."""
        self.stalled = reason
        self.failures += 1
        self.held_until = now + min(FIRST_HOLD_S * 2.0 ** (self.failures - 1), LONGEST_HOLD_S)

    def went_on(self) -> None:
        """A step worked."""
        self.failures, self.stalled = 0, ""


@dataclasses.dataclass(slots=True)
class Life:
    """How the worker of a serving version has lived."""

    digest: str
    restarts: int = 0
    died_at: float = -1e9
    started_at: float = 0.0
    checked: bool = False
    last_words: str = ""

    def died(self, words: str, now: float) -> None:
        """It ended by itself, or could not be started."""
        self.restarts += 1
        self.died_at = now
        self.last_words = words


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """What must stay on the disk, by digest."""

    objects: frozenset[str]
    versions: frozenset[str]
    partials: frozenset[str]


class Ledger:
    """All entries of one device. Does nothing by itself but read the store and write pointers."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._bundles: collections.OrderedDict[str, Bundle] = collections.OrderedDict()
        self.pointers: dict[str, Pointer] = {}
        self.attempts: dict[str, Attempt] = {}
        self.lives: dict[str, Life] = {}
        self.assignment: Assignment | None = None
        self.fresh = False
        self.confirmed = False
        self.connected = False

    def read(self) -> None:
        """Read the pointers. A damaged one is passed over and reported; the others go on."""
        for skill in self._store.skills():
            try:
                self.pointers[skill] = self._store.pointer(skill)
            except FormatError as error:
                LOG.error("pointer.damaged skill=%s error=%r", skill, str(error))  # noqa: TRY400 - no traceback is of use

    def assign(self, assignment: Assignment, *, fresh: bool) -> bool:
        """Take over what is wanted now; True when other versions are wanted than before."""
        changed = self.assignment is None or self.assignment.skills != assignment.skills
        self.assignment, self.fresh, self.confirmed = assignment, fresh, self.confirmed or fresh
        for wanted in assignment.skills:
            attempt = self.attempts.get(wanted.skill)
            if attempt is None or attempt.digest != wanted.manifest.sha256:
                self.attempts[wanted.skill] = Attempt(wanted.manifest.sha256, assignment.metadata.sha256)
            elif attempt.metadata != assignment.metadata.sha256:
                attempt.metadata, attempt.trusted, attempt.held_until = assignment.metadata.sha256, None, 0.0
        return changed

    def online(self, *, connected: bool) -> None:
        """The broker came or went; what waited for the network need not wait longer."""
        self.connected, self.fresh = connected, False
        if connected:
            for attempt in self.attempts.values():
                attempt.held_until = 0.0
                attempt.went_on()

    # --- looking ----------------------------------------------------------------------------------

    def skills(self) -> frozenset[str]:
        """Return the skills that are wanted or have a pointer."""
        wanted = {w.skill for w in self.assignment.skills} if self.assignment is not None else set()
        return frozenset(wanted | set(self.pointers))

    def wanted(self, skill: str) -> WantedSkill | None:
        if self.assignment is None:
            return None
        return next((wanted for wanted in self.assignment.skills if wanted.skill == skill), None)

    def pointer(self, skill: str) -> Pointer:
        """Return a skill's pointer; an empty one when there is none."""
        return self.pointers.get(skill) or Pointer(skill)

    def serving(self) -> set[str]:
        """Return the skills that have a version to serve."""
        return {skill for skill, pointer in self.pointers.items() if pointer.active is not None}

    def is_active(self, skill: str, digest: str) -> bool:
        active = self.pointer(skill).active
        return active is not None and active.manifest == digest

    def life(self, skill: str, digest: str) -> Life:
        """Return the entry of a version's worker; a new one when the last was another version's."""
        life = self.lives.get(skill)
        if life is None or life.digest != digest:
            life = self.lives[skill] = Life(digest)
        return life

    def bundle(self, digest: str) -> Bundle:
        """Return a manifest that is on the device.

        Raises:
            NotFound: it is not there, or is no bundle's.
        """
        bundle = self._bundles.get(digest)
        if bundle is None:
            bundle = self._store.bundle(digest)
            if bundle is None:
                raise NotFound(f"the manifest {digest[:12]}… is not a bundle's")
            self._bundles[digest] = bundle
            if len(self._bundles) > KEPT_BUNDLES:
                self._bundles.popitem(last=False)
        return bundle

    def facts(
        self, skill: str, running: Mapping[str, Running], capabilities: Capabilities, trial_s: float, now: float
    ) -> Facts:
        """Return all that is known about one skill at the moment `now`."""
        pointer, wanted = self.pointer(skill), self.wanted(skill)
        attempt = self.attempts.get(skill) if wanted is not None else None
        active = pointer.active.manifest if pointer.active is not None else ""
        life = self.lives.get(skill)
        if life is None or life.digest != active:
            life = Life(active)
        bundle = None
        if attempt is not None and attempt.trusted == "":
            with contextlib.suppress(NotFound):
                bundle = self.bundle(attempt.digest)
        # Listed after the manifest was read: one found damaged is gone by now, and is fetched again.
        versions, objects = self._store.version_digests(), self._store.object_digests()
        return Facts(
            pointer=pointer,
            wanted=wanted,
            capabilities=capabilities,
            metadata=self.assignment.metadata if self.assignment is not None else None,
            fresh=self.fresh,
            confirmed=self.confirmed,
            objects=objects,
            staged=versions,
            bundle=bundle,
            trusted=attempt.trusted if attempt is not None else None,
            running=running,
            rested_s=now - life.died_at,
            healthy_s=now - life.started_at,
            trial_s=trial_s,
            restarts=life.restarts,
            stalled=attempt.stalled if attempt is not None else "",
            progress=attempt.progress if attempt is not None else 0.0,
            received_bytes=attempt.received_bytes if attempt is not None else 0,
            received_part_bytes=attempt.received_part_bytes if attempt is not None else 0,
            last_words=life.last_words,
        )

    def kept(self) -> Kept:
        """Return what serves, is to be returned to, or is wanted; the rest may leave the disk."""
        objects, versions, partials = set[str](), set[str](), set[str]()
        if self.assignment is not None:
            objects.add(self.assignment.metadata.sha256)
        for skill in self.skills():
            pointer, wanted = self.pointer(skill), self.wanted(skill)
            digests = [installed.manifest for installed in (pointer.active, pointer.previous) if installed is not None]
            if wanted is not None and wanted.manifest.sha256 not in pointer.refused:
                digests.append(wanted.manifest.sha256)
            for digest in digests:
                versions.add(digest)
                objects.add(digest)
                with contextlib.suppress(NotFound):
                    for part in self.bundle(digest).parts:
                        objects.add(part.sha256)
                        partials.add(part.wire_sha256)
        return Kept(frozenset(objects), frozenset(versions), frozenset(partials))

    # --- writing ----------------------------------------------------------------------------------

    def write(self, pointer: Pointer) -> None:
        """Move a skill's pointer, on the disk first.

        Raises:
            StorageError: the disk is full or refuses; the old pointer stands.
        """
        self._store.write_pointer(pointer)
        self.pointers[pointer.skill] = pointer

    def remove(self, skill: str) -> None:
        """Drop every entry of a skill, on the disk first.

        Raises:
            StorageError: the disk refuses; everything stands.
        """
        self._store.remove_pointer(skill)
        for entries in (self.pointers, self.attempts, self.lives):
            entries.pop(skill, None)

    def spoiled(self, digest: str) -> None:
        """A version was found damaged on the disk: its manifest is read again."""
        self._bundles.pop(digest, None)
