"""From what is to what is wanted: looks, asks `plan` for one step, does it, looks again."""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

from edge_agent import plan
from edge_agent.config import AgentConfig
from edge_agent.intake import MAX_WHOLE_BYTES, Intake, Lacking, Offload
from edge_agent.ledger import Ledger, Life
from edge_agent.links import Links
from edge_agent.plan import Facts, Installed, Pointer, Refusal, Running
from edge_agent.service import Service
from edge_agent.store import Store
from edge_agent.trust import Trust
from edge_agent.workers import PROBE_S, Load, Worker, Workers, refused_by_probe
from skills.bundle import parts_for
from skills.desired import Assignment, WantedSkill
from skills.errors import (
    DeadlineExceeded,
    MissingExtra,
    NotFound,
    SkerryError,
    StorageError,
    TrustError,
    Unreachable,
)
from skills.report import SkillState
from skills.resolve import Capabilities, Choice, resolve

LOG = logging.getLogger("skerry.agent")

LONGEST_WAIT_S = 60.0
TRIES_BEFORE_REFUSING = 3
DRAIN_S = 30.0
CHANGES_WORTH_RETRYING = (Unreachable, DeadlineExceeded, MissingExtra)


class Reconciler:
    """Owns the pointers and the workers of one device."""

    def __init__(
        self,
        store: Store,
        config: AgentConfig,
        intake: Intake,
        service: Service,
        workers: Workers,
        trust: Trust,
        capabilities: Callable[[], Capabilities],
        links: Links,
        *,
        offload: Offload = asyncio.to_thread,
    ) -> None:
        self._store, self._config, self._intake, self._service = store, config, intake, service
        self._workers, self._trust, self._offload = workers, trust, offload
        self._read_capabilities, self._links = capabilities, links
        self.capabilities = capabilities()
        self._ledger = Ledger(store)
        self._running: dict[str, Worker] = {}
        self._probed: set[str] = set()
        self._stopping: set[asyncio.Task[None]] = set()
        self._garbage, self._uncollected = True, False
        self._changed = asyncio.Event()
        self.told = asyncio.Event()

    # --- from outside -----------------------------------------------------------------------------

    @property
    def assignment(self) -> Assignment | None:
        """The last accepted assignment."""
        return self._ledger.assignment

    @property
    def connected(self) -> bool:
        """Is the broker there?"""
        return self._ledger.connected

    def boot(self) -> None:
        """Read what the disk says. A damaged pointer is put aside and reported; the others go on."""
        self._ledger.read()
        self._service.known(self._ledger.serving())

    def assign(self, assignment: Assignment, *, fresh: bool) -> None:
        """Take over what is wanted now; `fresh`: it answers the nonce of this connection."""
        if self._ledger.assign(assignment, fresh=fresh):
            self._garbage = True
        self.poke()

    def online(self, *, connected: bool) -> None:
        """The broker came or went; what waited for the network need not wait longer."""
        self._ledger.online(connected=connected)
        self.poke()

    def poke(self) -> None:
        """Something changed: look again."""
        self._changed.set()
        self.told.set()
        self._intake.interrupt()

    def refresh_capabilities(self) -> Capabilities:
        """Read anew what the device can do, and return it."""
        self.capabilities = self._read_capabilities()
        return self.capabilities

    def states(self) -> tuple[SkillState, ...]:
        """Return what is to be reported."""
        return tuple(state for skill in self._skills() for state in plan.describe(self.look(skill)))

    def pointers(self) -> Mapping[str, Pointer]:
        return self._ledger.pointers

    def workers(self) -> tuple[Worker, ...]:
        """Return the live workers."""
        return tuple(self._running.values())

    async def close(self) -> None:
        """End cleanly: a stop on purpose does not count against a version on trial."""
        for pointer in self._ledger.pointers.values():
            if pointer.trial and pointer.active is not None and pointer.active.manifest in self._running:
                with contextlib.suppress(StorageError):
                    self._store.write_pointer(dataclasses.replace(pointer, lives=max(pointer.lives - 1, 0)))
        for task in self._stopping:
            task.cancel()
        await asyncio.gather(*self._stopping, return_exceptions=True)
        await self._workers.stop()
        await self._links.close()

    # --- the loop ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Bring the device to what is wanted, for ever."""
        while True:
            self._changed.clear()
            rest = await self.advance()
            if rest is None:
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rest):
                    await self._changed.wait()

    async def advance(self) -> float | None:
        """Do one step; None when one was done, else the seconds for which there is nothing to do."""
        now, rest = _now(), LONGEST_WAIT_S
        steps = {skill: plan.next_step(self.look(skill)) for skill in self._skills()}
        for skill, step in steps.items():
            if isinstance(step, plan.Keep):
                await self._guarded(skill, step)
                return None
        for skill, step in steps.items():
            attempt = self._ledger.attempts.get(skill)
            if isinstance(step, plan.Wait):
                rest = min(rest, LONGEST_WAIT_S if step.after_s is None else step.after_s)
            elif isinstance(step, plan.FetchWhole | plan.FetchParts) and not self.connected:
                continue
            elif attempt is not None and attempt.held_until > now:
                rest = min(rest, attempt.held_until - now)
            else:
                await self._guarded(skill, step)
                return None
        if self._garbage and self.assignment is not None:
            self._garbage = False
            self._collect()
        return max(rest, 0.01)

    def look(self, skill: str) -> Facts:
        """Return all that is known about one skill now."""
        running = {
            digest: Running(probed=digest in self._probed)
            for digest, worker in self._running.items()
            if worker.load.skill == skill
        }
        return self._ledger.facts(skill, running, self.capabilities, self._config.trial_s, _now())

    # --- steps ------------------------------------------------------------------------------------

    async def _guarded(self, skill: str, step: plan.Step) -> None:
        """Do a step; a fault becomes a reason and a pause, never an end."""
        LOG.debug("step skill=%s step=%s", skill, type(step).__name__)
        attempt = self._ledger.attempts.get(skill)
        # As they are now: while the step goes on, another version or other metadata may come to be wanted.
        digest, metadata = (attempt.digest, attempt.metadata) if attempt is not None else ("", "")
        if not isinstance(step, plan.FetchWhole) or all(ref.sha256 != metadata for ref in step.refs):
            metadata = ""
        try:
            await self._do(step)
        except TrustError as error:
            self._refuse(skill, digest, Refusal("refused", str(error), metadata))
        except Lacking as error:
            self._refuse(skill, digest, Refusal("failed", str(error), metadata))
        except SkerryError as error:
            if attempt is not None:
                attempt.failed(str(error), _now())
            level = logging.WARNING if attempt is None or attempt.failures == 1 else logging.DEBUG
            LOG.log(level, "step.failed skill=%s step=%s error=%r", skill, type(step).__name__, str(error))
        else:
            if attempt is not None and not isinstance(step, plan.Keep):
                attempt.went_on()
        self.told.set()

    async def _do(self, step: plan.Step) -> None:  # noqa: C901 - one case for each step
        match step:
            case plan.Start(skill, installed):
                await self._start(skill, installed)
            case plan.Return(skill, digest, reason):
                LOG.error("version.returned skill=%s digest=%s reason=%r", skill, digest[:12], reason)
                self._write(plan.returned(self._ledger.pointer(skill), reason))
            case plan.Lose(skill):
                LOG.error("version.damaged skill=%s", skill)
                self._write(plan.lost(self._ledger.pointer(skill)))
            case plan.Settle(skill):
                LOG.info("version.settled skill=%s", skill)
                self._write(plan.settled(self._ledger.pointer(skill)))
            case plan.Stop(skill, digest):
                self._stop(skill, digest)
            case plan.Remove(skill):
                self._remove(skill)
            case plan.FetchWhole(skill, refs):
                for ref in refs:
                    self._ledger.attempts[skill].received_bytes += await self._intake.whole(ref)
            case plan.FetchParts(skill, digest, parts):
                await self._fetch(skill, digest, parts)
            case plan.Verify(skill, wanted, ref):
                await self._verify(skill, wanted, ref)
            case plan.Refuse(skill, digest, refusal):
                self._refuse(skill, digest, refusal)
            case plan.Forget(skill, digest, metadata):
                self._write(plan.forgotten(self._ledger.pointer(skill), digest, metadata))
            case plan.Stage(_, digest, parts):
                await self._offload(self._store.stage, digest, parts)
            case plan.Probe(skill, digest, choice):
                await self._probe(skill, digest, choice)
            case plan.Activate(skill, installed):
                await self._activate(skill, installed)
            case plan.Wait():
                pass

    async def _start(self, skill: str, installed: Installed) -> None:
        life = self._ledger.life(skill, installed.manifest)
        pointer = self._ledger.pointer(skill)
        if not life.checked:
            if damage := await self._offload(self._store.damage, installed.manifest):
                LOG.error("version.damaged skill=%s version=%s what=%r", skill, installed.version, damage)
                self._store.discard(installed.manifest)
                self._ledger.spoiled(installed.manifest)
                self._garbage = True
                return
            life.checked = True
        if pointer.trial:
            # Counted before the start: a version that takes the device down with it is counted too.
            self._write(dataclasses.replace(pointer, lives=pointer.lives + 1))
        try:
            bundle = self._ledger.bundle(installed.manifest)
            worker = await self._workers.start(self._load(skill, installed), self._died)
        except SkerryError as error:
            life.died(str(error), _now())
            LOG.warning("worker.failed skill=%s version=%s error=%r", skill, installed.version, str(error))
            return
        life.started_at = _now()
        self._running[installed.manifest] = worker
        if worker.dead is not None:
            self._died(worker)
            return
        self._service.serve(bundle.skill, installed, worker)
        LOG.info("skill.serving skill=%s version=%s digest=%s", skill, installed.version, installed.manifest[:12])

    async def _probe(self, skill: str, digest: str, choice: Choice) -> None:
        bundle = self._ledger.bundle(digest)
        variants = {name: variant.name for name, variant in choice.variants.items()}
        worker = self._running.get(digest)
        try:
            if worker is None:
                installed = Installed(bundle.skill.version, digest, "", variants)
                worker = await self._workers.start(self._load(skill, installed), self._died)
                self._running[digest] = worker
            reply, _ = await worker.call({"op": "probe"}, b"", PROBE_S)
            refused_by_probe(reply)
        except SkerryError as error:
            words = worker.last_words() if worker is not None else ""
            self._stop(skill, digest, at_once=True)
            if isinstance(error, StorageError):
                raise  # says nothing about the version
            attempt = self._ledger.attempts[skill]
            if isinstance(error, CHANGES_WORTH_RETRYING) and attempt.failures + 1 < TRIES_BEFORE_REFUSING:
                raise Unreachable(str(error)) from error
            reason = str(error) + (f"; last words: {words}" if words else "")
            self._refuse(skill, digest, Refusal("failed", reason))
            return
        self._probed.add(digest)

    async def _activate(self, skill: str, installed: Installed) -> None:
        bundle, worker = self._ledger.bundle(installed.manifest), self._running[installed.manifest]
        # The commit point. A crash before it leaves the old version serving; after it, the next boot starts the new one.
        self._write(plan.activated(self._ledger.pointer(skill), installed))
        self._ledger.lives[skill] = Life(installed.manifest, started_at=_now(), checked=True)
        self._service.serve(bundle.skill, installed, worker)
        self._garbage = True
        LOG.info("skill.activated skill=%s version=%s digest=%s", skill, installed.version, installed.manifest[:12])

    async def _fetch(self, skill: str, digest: str, parts: tuple[Any, ...]) -> None:
        attempt, bundle = self._ledger.attempts[skill], self._ledger.bundle(digest)
        choice = resolve(bundle.skill, self.capabilities)
        wanted = parts_for(bundle, choice) if isinstance(choice, Choice) else parts
        total = sum(part.wire_size for part in wanted) or 1
        done = total - sum(part.wire_size for part in parts)
        part = parts[0]
        if why := plan.shortage(parts, self._store.room()):
            raise StorageError(why)

        def told(have: int, count: int) -> None:
            attempt.progress = min((done + part.wire_size * have / count) / total, 1.0)
            self.told.set()

        received = await self._intake.part(part, told)
        attempt.received_bytes += received
        attempt.received_part_bytes += received

    async def _verify(self, skill: str, wanted: WantedSkill, metadata: Any) -> None:
        # Read here for its hash alone: a set that was damaged on the disk says nothing of the release, and is fetched again.
        self._store.read_object(metadata.sha256, MAX_WHOLE_BYTES)
        verdict = await self._trust.judge(wanted, metadata, self.assignment.time if self.assignment else 0)
        if verdict.passing:
            raise Unreachable(
                verdict.reason
            )  # waits for metadata that is signed anew; nothing is held against the release
        attempt = self._ledger.attempts.get(skill)
        if attempt is not None and (attempt.digest, attempt.metadata) == (wanted.manifest.sha256, metadata.sha256):
            attempt.trusted = verdict.reason

    def _refuse(self, skill: str, digest: str, refusal: Refusal) -> None:
        wanted = self._ledger.wanted(skill)
        if wanted is None or wanted.manifest.sha256 != digest:
            return
        LOG.error("version.refused skill=%s version=%s reason=%r", skill, wanted.version, refusal.reason)
        self._write(plan.refused(self._ledger.pointer(skill), digest, refusal))
        self._garbage = True

    def _remove(self, skill: str) -> None:
        self._ledger.remove(skill)
        self._service.withdraw(skill)
        self._service.known(self._ledger.serving())
        self._garbage = True
        LOG.info("skill.removed skill=%s", skill)

    def _stop(self, skill: str, digest: str, *, at_once: bool = False) -> None:
        worker = self._running.pop(digest, None)
        self._probed.discard(digest)
        if worker is not None:
            self._service.withdraw(skill, worker)
            task = asyncio.create_task(worker.stop(0 if at_once else DRAIN_S))
            self._stopping.add(task)
            task.add_done_callback(self._stopping.discard)
            if worker.load.link is not None and all(other.load.link is None for other in self._running.values()):
                closing = asyncio.create_task(self._links.close())
                self._stopping.add(closing)
                closing.add_done_callback(self._stopping.discard)

    def _died(self, worker: Worker) -> None:
        """A worker ended by itself."""
        digest, skill = worker.load.digest, worker.load.skill
        if self._running.get(digest) is not worker:
            return
        del self._running[digest]
        self._probed.discard(digest)
        self._service.withdraw(skill, worker)
        life = self._ledger.life(skill, digest) if self._ledger.is_active(skill, digest) else None
        if life is not None:
            if _now() - life.started_at > self._config.trial_s:
                life.restarts = 0
            life.died(f"{worker.dead}" + (f": {words}" if (words := worker.last_words()) else ""), _now())
        self.poke()

    # --- small things -----------------------------------------------------------------------------

    def _collect(self) -> None:
        """Remove from the disk what neither serves, nor is to be returned to, nor is wanted."""
        try:
            kept = self._ledger.kept()
            freed = self._store.collect(kept.objects, kept.versions, kept.partials)
        except (NotFound, StorageError) as error:
            LOG.log(logging.DEBUG if self._uncollected else logging.WARNING, "disk.uncollected error=%r", str(error))
            self._uncollected = True
            return
        if freed or self._uncollected:
            LOG.info("disk.freed bytes=%s", freed)
        self._uncollected = False

    def _skills(self) -> tuple[str, ...]:
        return tuple(sorted(self._ledger.skills() | {worker.load.skill for worker in self._running.values()}))

    def _write(self, pointer: Pointer) -> None:
        self._ledger.write(pointer)
        self._service.known(self._ledger.serving())

    def _load(self, skill: str, installed: Installed) -> Load:
        whole = self._ledger.bundle(installed.manifest).skill
        models = whole.models
        chosen = [v for name, model in models.items() for v in model.variants if v.name == installed.variants.get(name)]
        return Load(
            skill=skill,
            version=installed.version,
            digest=installed.manifest,
            folder=self._store.folder(installed.manifest),
            manifest=self._store.objects / installed.manifest,
            variants=installed.variants,
            timer=self._config.timer,
            tail_deadline_ms=self._config.tail_deadline_ms,
            link=self._links.open() if whole.placement or any(variant.split for variant in chosen) else None,
        )


def _now() -> float:
    return asyncio.get_running_loop().time()
