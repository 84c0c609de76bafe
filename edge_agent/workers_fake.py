"""Workers in memory, of the same shape as the real ones: for tests, simulations and trying things out.

What a version does is scripted by its digest: refuse to load, fail its probe, answer with its own version, or die.
"""

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from edge_agent.workers import Load, Worker
from skills.errors import DeadlineExceeded, SkerryError, Unreachable


class FakeWorkers:
    """`Workers` without processes. `cannot_load` and `probe` are keyed by digest; `answer` computes a reply."""

    def __init__(self) -> None:
        self.cannot_load: dict[str, SkerryError] = {}
        self.probe: dict[str, str] = {}
        self.probe_hold: asyncio.Event | None = None  # set: probes wait for it
        self.answer: Callable[[Load, bytes], bytes] = lambda load, body: json.dumps({"version": load.version}).encode()
        self.measure: Callable[[bytes], bytes] = lambda work: b""  # computes figures of a work
        self.hold_bare: asyncio.Event | None = None  # set: workers that loaded nothing wait for it
        self.alive: list[FakeWorker] = []
        self.started: list[Load] = []

    async def start(self, load: Load, died: Callable[[Worker], None]) -> Worker:
        self.started.append(load)
        error = self.cannot_load.get(load.digest)
        if error is not None:
            raise error
        worker = FakeWorker(self, load, died)
        self.alive.append(worker)
        return worker

    async def bare(self, load: Load) -> Worker:
        worker = FakeWorker(self, load, lambda worker: None)
        worker.hold = self.hold_bare
        self.alive.append(worker)
        return worker

    async def stop(self) -> None:
        for worker in list(self.alive):
            await worker.stop(0)

    def of(self, digest: str) -> "FakeWorker":
        """Return the live worker of a version."""
        return next(worker for worker in self.alive if worker.load.digest == digest)


class FakeWorker:
    """One version in memory."""

    def __init__(self, pool: FakeWorkers, load: Load, died: Callable[[Worker], None]) -> None:
        self.load, self.pss_kb = load, 0
        self._pool, self._died = pool, died
        self._dead: str | None = None
        self.words = ""
        self.ran: dict[str, object] = {"where": "local", "cut": "local"}  # what the header of an answer says
        self.hold: asyncio.Event | None = None  # set: questions wait for it
        self._pending = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def dead(self) -> str | None:
        return self._dead

    @property
    def pending(self) -> int:
        return self._pending

    async def call(
        self, header: Mapping[str, object], body: bytes | memoryview, deadline_s: float
    ) -> tuple[dict[str, Any], bytes]:
        if self._dead is not None:
            raise Unreachable(f"the worker is gone: {self._dead}")
        if header["op"] == "probe":
            if self._pool.probe_hold is not None:
                await self._pool.probe_hold.wait()
            return {"ok": True, "probe": self._pool.probe.get(self.load.digest, "")}, b""
        self._pending += 1
        self._idle.clear()
        try:
            if self.hold is not None:
                async with asyncio.timeout(deadline_s):
                    await self.hold.wait()
        except TimeoutError:
            raise DeadlineExceeded(f"{self.load.skill} did not answer within {deadline_s:g} s") from None
        finally:
            self._pending -= 1
            if not self._pending:
                self._idle.set()
        if self._dead is not None:
            raise Unreachable(f"{self.load.skill} died: {self._dead}")
        if header["op"] == "measure":
            return {"ok": True}, self._pool.measure(bytes(body))
        answer = self._pool.answer(self.load, bytes(body))
        return {"ok": True, "json_len": len(answer), **self.ran}, answer

    def last_words(self) -> str:
        return self.words

    def die(self, how: str = "killed by SIGSEGV", words: str = "") -> None:
        """End as a crash does."""
        self._dead, self.words = how, words
        self._pool.alive.remove(self)
        self._died(self)

    async def stop(self, drain_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                await self._idle.wait()
        if self in self._pool.alive:
            self._pool.alive.remove(self)
        self._dead = "stopped"
