"""The supervisor's part in measuring segments for a split plan: fetch the work, have one worker measure it, keep the figures.

One work at a time. A question begins it and later ones look how far it is; what nobody asks about any more ends. Its files
lie in a store of their own, `measure/`, which is gone when it ends, whatever became of it.
"""

import asyncio
import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_agent import plan
from edge_agent.config import AgentConfig
from edge_agent.intake import Intake, Offload
from edge_agent.store import Store
from edge_agent.trust import Trust
from edge_agent.workers import Load, Workers
from skills.desired import ObjectRef
from skills.errors import DeadlineExceeded, FormatError, Refused, SkerryError, Unreachable
from skills.measurement import (
    MAX_FIGURES_BYTES,
    MAX_WORK_BYTES,
    PROFILE_INSTEAD,
    RUNTIME,
    Figures,
    State,
    Work,
    read_work,
)
from skills.messaging import MqttClient
from skills.report import Chunk
from skills.resolve import Capabilities
from skills.units import readable
from skills.wire import decode_json, encode_json

LOG = logging.getLogger("skerry.agent")
FOLDER = "measure"
HOLD_S = 10.0  # how long a question waits for the end before it is told how far the work is
ABANDONED_S = 90.0  # nobody asked for so long: whoever wanted the figures is gone
MEASURE_S = 600.0
FETCH_TRIES = 3


@dataclasses.dataclass(slots=True)
class _Job:
    sealed: bytes
    sha256: str
    task: "asyncio.Task[bytes]"
    asked_at: float
    state: State = "fetching"
    share: float = 0.0


class Measuring:
    """Measures one work at a time; every method is called from the agent's loop."""

    def __init__(
        self,
        data: Path,
        device: str,
        mqtt: MqttClient,
        workers: Workers,
        trust: Trust,
        config: AgentConfig,
        capabilities: Callable[[], Capabilities],
        taken_mb: Callable[[], int],
        *,
        chance: Callable[[], float],
        offload: Offload,
    ) -> None:
        """`taken_mb` says how much memory the skills' own workers have, in MiB."""
        self._device, self._workers, self._trust, self._config = device, workers, trust, config
        self._capabilities, self._taken_mb, self._offload = capabilities, taken_mb, offload
        self._store = Store(data / FOLDER)
        self._intake = Intake(mqtt, device, self._store, chance=chance, offload=offload)
        self._job: _Job | None = None

    def clear(self) -> None:
        """Remove what a death left behind."""
        shutil.rmtree(self._store.data, ignore_errors=True)

    def arrived(self, chunk: Chunk) -> None:
        """Take a chunk from the network; those of other transfers are passed over."""
        self._intake.arrived(chunk)

    async def ask(self, sealed: bytes, deadline_s: float) -> tuple[dict[str, Any], bytes]:
        """Begin the work that a sealed order names, or see how far it is; with the figures once it is done.

        Raises:
            FormatError, TrustError: the order or the work is not what it should be.
            Refused: something else is being measured, or the device has no room, no runtime or not enough memory, or the
                segments are too slow here to be measured.
            SkerryError: what else became of it.
        """
        job = self._job
        if job is None or job.sealed != sealed:
            job = await self._begin(sealed)
        job.asked_at = asyncio.get_running_loop().time()
        await asyncio.wait({job.task}, timeout=min(HOLD_S, deadline_s / 2))
        if not job.task.done():
            return {"state": job.state, "share": round(job.share, 3)}, b""
        if job.task.cancelled():
            raise Refused(f"{self._device} gave up measuring, for nobody asked for the result in time: begin anew")
        return {"state": "done", "share": 1.0}, job.task.result()

    async def close(self) -> None:
        """End what is going on."""
        if self._job is not None:
            self._job.task.cancel()
            await asyncio.gather(self._job.task, return_exceptions=True)

    async def _begin(self, sealed: bytes) -> _Job:
        work = (await self._trust.open_order(sealed, self._device)).work
        if self._job is not None and not self._job.task.done():
            raise Refused(f"{self._device} is measuring something else: try again when that is done")
        if RUNTIME not in self._capabilities().runtimes:
            raise Refused(f"{self._device} cannot measure a model: it offers no {RUNTIME}")
        if work.size > MAX_WORK_BYTES:
            raise FormatError(f"the work has {work.size} bytes, the limit is {MAX_WORK_BYTES}")
        LOG.info("measure.started work=%s", work.sha256[:12])
        task = asyncio.create_task(self._kept(work), name="measure")
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # told to who asks, if anybody does
        self._job = _Job(sealed, work.sha256, task, asyncio.get_running_loop().time())
        return self._job

    async def _kept(self, ref: ObjectRef) -> bytes:
        """Do the work for as long as somebody asks about it."""
        loop, work = asyncio.get_running_loop(), asyncio.create_task(self._work(ref))
        try:
            while not work.done():
                job = self._job
                left = (job.asked_at if job is not None else loop.time()) + ABANDONED_S - loop.time()
                if left <= 0:
                    LOG.warning("measure.abandoned work=%s", ref.sha256[:12])
                    raise asyncio.CancelledError
                await asyncio.wait({work}, timeout=left)
            figures = work.result()
        except SkerryError as error:
            LOG.warning("measure.failed work=%s error=%r", ref.sha256[:12], str(error))
            raise
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            self.clear()
        LOG.info("measure.done work=%s", ref.sha256[:12])
        return figures

    async def _work(self, ref: ObjectRef) -> bytes:
        self.clear()
        self._store.prepare()
        while not (self._store.objects / ref.sha256).is_file():
            await self._insisting(lambda: self._intake.whole(ref))
        data = self._store.read_object(ref.sha256, MAX_WORK_BYTES)
        work = read_work(data)
        memory_mb = self._config.memory_mb - self._taken_mb()
        if why := self._no_room(work, memory_mb):
            raise Refused(f"{self._device} has no room to measure this model: {why}")
        for at, part in enumerate(work.parts):

            def told(have: int, count: int, at: int = at) -> None:
                if self._job is not None:
                    self._job.share = (at + have / count) / len(work.parts)

            while not (self._store.objects / part.sha256).is_file():
                await self._insisting(lambda part=part, told=told: self._intake.part(part, told))  # type: ignore[misc]
        await self._offload(self._store.stage, ref.sha256, work.parts)
        return await self._measured(data, ref.sha256, memory_mb)

    async def _insisting(self, fetch: Callable[[], Any]) -> None:
        """Fetch, and once more where nothing came: the transfer goes on where it was."""
        for left in range(FETCH_TRIES, -1, -1):
            try:
                await fetch()
                return
            except Unreachable:
                if not left:
                    raise

    def _no_room(self, work: Work, memory_mb: int) -> str:
        disk, offered = sum(part.size for part in work.parts), self._config.disk_mb << 20
        if work.model_bytes > memory_mb << 20:
            return (
                f"its segments have {readable(work.model_bytes)}, and {readable(max(memory_mb, 0) << 20)} of the memory "
                f"that is offered (memory_mb) are left; {PROFILE_INSTEAD}"
            )
        if disk > offered:
            return f"it needs {readable(disk)} of disk, {readable(offered)} are offered (disk_mb)"
        return plan.shortage(work.parts, self._store.room()).partition(":")[0]

    async def _measured(self, work: bytes, sha256: str, memory_mb: int) -> bytes:
        if self._job is not None:
            self._job.state, self._job.share = "measuring", 0.0
        folder = self._store.folder(sha256)
        load = Load(
            "measuring", sha256[:8], sha256, folder, folder, {}, self._config.timer, self._config.tail_deadline_ms
        )
        worker = await self._workers.bare(load)
        try:
            header = {"op": "measure", "folder": str(folder), "timer": self._config.timer, "memory_mb": memory_mb}
            _, answer = await worker.call(header, work, MEASURE_S)
        except DeadlineExceeded:
            raise Refused(  # for good: asked again, it would take as long
                f"{self._device} did not measure the segments within {MEASURE_S:.0f} s: the model is too slow for it"
            ) from None
        except Unreachable:
            words = worker.last_words()
            raise Refused(
                f"{self._device} could not measure: its worker was {worker.dead}"
                + (f"; last words: {words}" if words else "")
            ) from None
        except SkerryError as error:
            raise type(error)(f"{self._device} could not measure: {error}") from None
        finally:
            with contextlib.suppress(SkerryError):
                await worker.stop(0)
        return encode_json(decode_json(Figures, answer, "the figures", MAX_FIGURES_BYTES))
