"""Which worker answers which question. Versions are swapped under running requests without dropping one.

A request waits for its skill's worker in line; the line is bounded. When a version is swapped, those in line go on with the
new worker, and the one that is being answered is finished by the old. When a worker dies, its request is asked once more of
its successor: control code has no side effects that the protocol promises.
"""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from edge_agent.plan import Installed
from edge_agent.usage import UsageLog, UsageRecord
from edge_agent.whereabouts import Watch, Whereabouts
from edge_agent.workers import Worker
from skills.errors import DeadlineExceeded, FormatError, NotFound, Unreachable
from skills.manifest import Skill

MAX_DEADLINE_S = 600.0
LOG = logging.getLogger("skerry.service")


@dataclasses.dataclass(slots=True, eq=False)
class Serving:
    """The version that answers, and whose turn it is."""

    skill: Skill
    installed: Installed
    worker: Worker
    turn: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)


class Service:
    """All skills of the device, as those who ask see them."""

    def __init__(self, usage: UsageLog, max_waiting: int, now: Callable[[], float] = time.time) -> None:
        self._usage, self._max_waiting, self._now = usage, max_waiting, now
        self._serving: dict[str, Serving] = {}
        self._known: set[str] = set()
        self._waiting: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._watch = Watch()

    # --- what may be asked ------------------------------------------------------------------------

    def skills(self) -> Mapping[str, Serving]:
        """Return what serves now, by skill."""
        return self._serving

    def whereabouts(self) -> Mapping[str, Whereabouts]:
        """Return where the last request of each split skill ran; times are those of `now`."""
        return self._watch.last

    def known(self, skills: set[str]) -> None:
        """Say which skills belong here even when their worker is down for a moment."""
        self._known = skills
        self._tell()

    def find(self, skill: str, version: str | None = None) -> Serving:
        """Return what serves a skill.

        Raises:
            NotFound: the skill, or this version of it, does not serve here.
        """
        serving = self._serving.get(skill)
        if serving is None:
            raise NotFound(f"no skill {skill!r} serves here; there are: {', '.join(sorted(self._serving)) or 'none'}")
        if version is not None and version != serving.installed.version:
            raise NotFound(f"{skill} serves version {serving.installed.version}, not {version}")
        return serving

    # --- swapping ---------------------------------------------------------------------------------

    def serve(self, skill: Skill, installed: Installed, worker: Worker) -> None:
        """From now on this worker answers for the skill."""
        self._serving[skill.name] = Serving(skill, installed, worker)
        self._tell()

    def withdraw(self, skill: str, worker: Worker | None = None) -> None:
        """Nothing answers for the skill now; with `worker`: only if it is that one."""
        serving = self._serving.get(skill)
        if serving is not None and worker in (None, serving.worker):
            del self._serving[skill]

    # --- asking -----------------------------------------------------------------------------------

    async def infer(
        self, skill: str, version: str | None, body: bytes | memoryview, json_len: int, deadline_s: float
    ) -> tuple[dict[str, Any], bytes]:
        """Answer one Open Inference Protocol request; returns the worker's header and the response's body.

        Raises:
            NotFound: no such skill or version.
            FormatError: the request is not what it should be.
            DeadlineExceeded: no answer in time.
            Unreachable: too many wait already, or the worker died twice over it.
        """
        if not 0 < deadline_s <= MAX_DEADLINE_S:
            raise FormatError(f"a deadline of {deadline_s:g} s was asked for, expected up to {MAX_DEADLINE_S:g} s")
        if skill not in self._known:
            self.find(skill, version)
        if self._waiting.get(skill, 0) >= self._max_waiting:
            raise Unreachable(f"{self._max_waiting} requests wait for {skill} already: try again")
        self._waiting[skill] = self._waiting.get(skill, 0) + 1
        try:
            async with asyncio.timeout(deadline_s):
                return await self._ask(skill, version, body, json_len, deadline_s)
        except TimeoutError:
            raise DeadlineExceeded(f"{skill} did not answer within {deadline_s:g} s") from None
        finally:
            self._waiting[skill] -= 1

    async def _ask(
        self, skill: str, version: str | None, body: bytes | memoryview, json_len: int, deadline_s: float
    ) -> tuple[dict[str, Any], bytes]:
        start, deaths = time.perf_counter(), 0
        while True:
            serving = await self._available(skill, version)
            async with serving.turn:
                if self._serving.get(skill) is not serving:
                    continue  # swapped while we stood in line
                try:
                    left_s = deadline_s - (time.perf_counter() - start)
                    request = {"op": "infer", "json_len": json_len, "left_s": round(left_s, 6)}
                    header, answer = await serving.worker.call(request, body, deadline_s)
                except Unreachable:
                    self.withdraw(skill, serving.worker)
                    deaths += 1
                    if deaths > 1:
                        raise
                    continue
            self._record(serving, header, (time.perf_counter() - start) * 1e3)
            return header, answer

    async def _available(self, skill: str, version: str | None) -> Serving:
        while skill not in self._serving and skill in self._known:
            await self._changed.wait()
        return self.find(skill, version)

    def _tell(self) -> None:
        """Wake everybody who waits for a worker."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _record(self, serving: Serving, header: Mapping[str, Any], ms: float) -> None:
        installed, now = serving.installed, self._now()
        if (away := self._watch.note(serving.skill.name, header, now)) == "":
            LOG.info("tail.back skill=%s", serving.skill.name)
        elif away is not None:
            LOG.warning("tail.away skill=%s reason=%r what='its requests are answered here'", serving.skill.name, away)
        self._usage.add(
            UsageRecord(
                time=round(now, 3),
                skill=serving.skill.name,
                version=installed.version,
                release=installed.manifest,
                variants=installed.variants,
                where=str(header.get("where", "local")),
                cut=str(header.get("cut", "local")),
                ms=ms,
                confidence=header.get("confidence"),
            )
        )
