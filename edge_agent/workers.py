"""The supervisor's end of its worker processes: one zygote, started when first needed, and a handle for each worker."""

import asyncio
import collections
import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from edge_agent import ipc
from skills.errors import DeadlineExceeded, Refused, SkerryError, Unreachable, error_for

READY_S = 60.0  # importing the runtimes on a slow board
FORK_S = 10.0
LOAD_S = 120.0
PROBE_S = 120.0
END_S = 3.0
HANG_S = 60.0  # a worker that still owes an answer so long after its asker gave up is killed and started anew
MAX_BEHIND = 8  # answers that a worker may owe; more are not asked for
LAST_WORDS = 12  # lines of a worker's output that are kept for a reason
MAX_LINE = 400
LOG = logging.getLogger("skerry.worker")


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """What a worker needs to know to become one version of a skill."""

    skill: str
    version: str
    digest: str
    folder: Path
    manifest: Path
    variants: Mapping[str, str]
    timer: str
    tail_deadline_ms: int
    link: Path | None = None


class Worker(Protocol):
    """A process (or its fake) that holds one version."""

    load: Load
    pss_kb: int

    @property
    def dead(self) -> str | None:
        """None while it lives, else how it died."""

    @property
    def pending(self) -> int:
        """Requests handed over and not answered yet."""

    async def call(
        self, header: Mapping[str, object], body: bytes | memoryview, deadline_s: float
    ) -> tuple[dict[str, Any], bytes]:
        """Ask for one operation.

        Raises:
            DeadlineExceeded: no answer in time, or too many are owed already. A late answer is dropped.
            Unreachable: the worker died before it answered.
            SkerryError: what the worker itself answered as its error.
        """

    def last_words(self) -> str:
        """Return the end of what it wrote, on one line."""

    async def stop(self, drain_s: float) -> None:
        """Let it finish what it has, for at most `drain_s`, then kill it."""


class Workers(Protocol):
    """Where workers come from."""

    async def start(self, load: Load, died: Callable[[Worker], None]) -> Worker:
        """Start a worker and have it load its version.

        Raises:
            SkerryError: it cannot be started, or the version cannot be loaded; no process stays.
        """

    async def bare(self, load: Load) -> Worker:
        """Start a worker that loads nothing; of `load` only the names are used. Whoever asked stops it.

        Raises:
            Unreachable: it cannot be started.
        """

    async def stop(self) -> None:
        """Kill everything."""


class ZygoteWorkers:
    """`Workers` forked from a zygote process."""

    def __init__(self, runtimes: tuple[str, ...]) -> None:
        self._runtimes = runtimes
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._listening: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[Mapping[str, str]] | None = None
        self._forks: dict[int, asyncio.Future[int]] = {}
        self._alive: dict[int, ForkedWorker] = {}
        self._number = 0
        self._starting = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """The zygote's process id, None before the first worker."""
        return None if self._process is None else self._process.pid

    async def start(self, load: Load, died: Callable[[Worker], None]) -> Worker:
        worker = await self._forked(load, died)
        header = {
            "op": "load",
            "folder": str(load.folder),
            "manifest": str(load.manifest),
            "variants": dict(load.variants),
            "timer": load.timer,
            "tail_deadline_ms": load.tail_deadline_ms,
            "link": str(load.link or ""),
        }
        try:
            reply, _ = await worker.call(header, b"", LOAD_S)
            worker.pss_kb = int(reply.get("pss_kb", 0))
        except BaseException:
            await worker.stop(0)
            raise
        return worker

    async def bare(self, load: Load) -> Worker:
        return await self._forked(load, lambda worker: None)

    async def _forked(self, load: Load, died: Callable[[Worker], None]) -> "ForkedWorker":
        async with self._starting:
            if self._process is None or self._process.poll() is not None:
                await self._start_zygote()
        pid, channel, log = await self._fork()
        reader, writer = await asyncio.open_unix_connection(sock=channel)
        worker = self._alive[pid] = ForkedWorker(load, pid, reader, writer, log, died)
        return worker

    async def stop(self) -> None:
        for worker in list(self._alive.values()):
            await worker.stop(0)
        await self._end_zygote()

    async def _start_zygote(self) -> None:
        await self._end_zygote()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        command = [sys.executable, "-P", "-m", "edge_agent.zygote", "--channel", str(theirs.fileno())]
        command += ["--supervisor", str(os.getpid()), "--runtimes", ",".join(self._runtimes)]
        self._process = subprocess.Popen(  # noqa: ASYNC220 - returns at once; the wait is below, with a deadline
            command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        self._channel = ours
        self._ready = asyncio.get_running_loop().create_future()
        self._listening = asyncio.create_task(self._listen(ours), name="zygote")
        try:
            async with asyncio.timeout(READY_S):
                found = await self._ready
        except (TimeoutError, Unreachable):
            await self._end_zygote()
            raise Unreachable("the runtimes could not be started: run skerry-agent doctor") from None
        LOG.info("zygote.ready pid=%s %s", self._process.pid, " ".join(f"{k}={v}" for k, v in found.items()))

    async def _end_zygote(self) -> None:
        listening, self._listening = self._listening, None
        if listening is not None:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
            self._process = None

    async def _fork(self) -> tuple[int, socket.socket, int]:
        if self._channel is None:
            raise Unreachable("the zygote is gone")
        self._number += 1
        number, future = self._number, asyncio.get_running_loop().create_future()
        self._forks[number] = future
        ours, theirs = socket.socketpair()
        log, log_end = os.pipe()
        try:
            socket.send_fds(self._channel, [json.dumps({"fork": number}).encode()], [theirs.fileno(), log_end])
            async with asyncio.timeout(FORK_S):
                return await future, ours, log
        except BaseException as error:
            ours.close()
            os.close(log)
            if isinstance(error, OSError):  # TimeoutError is one
                raise Unreachable(f"no worker could be forked: {error or 'the zygote does not answer'}") from None
            raise
        finally:
            theirs.close()
            os.close(log_end)
            self._forks.pop(number, None)

    async def _listen(self, channel: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                message = await loop.sock_recv(channel, 4096)
            except OSError:
                message = b""
            if not message:
                break
            self._heard(json.loads(message))
        for future in [self._ready, *self._forks.values()]:
            if future is not None and not future.done():
                future.set_exception(Unreachable("the zygote died"))

    def _heard(self, message: dict[str, Any]) -> None:
        if "ready" in message and self._ready is not None and not self._ready.done():
            self._ready.set_result(message["ready"])
        elif "forked" in message:
            future = self._forks.get(message["forked"])
            if future is None or future.done():
                return
            if "pid" in message:
                future.set_result(message["pid"])
            else:
                future.set_exception(Unreachable(f"no worker could be forked: {message['error']}"))
        elif "exit" in message:
            worker = self._alive.pop(message["exit"], None)
            if worker is not None:
                worker.buried(message["status"])


class ForkedWorker:
    """A worker process behind a socket. Answers come in the order of the requests."""

    def __init__(
        self,
        load: Load,
        pid: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        log: int,
        died: Callable[[Worker], None],
    ) -> None:
        self.load, self.pid, self.pss_kb = load, pid, 0
        self._reader, self._writer, self._died = reader, writer, died
        self._waiting: collections.deque[asyncio.Future[tuple[dict[str, Any], bytes]]] = collections.deque()
        self._lines: collections.deque[str] = collections.deque(maxlen=LAST_WORDS)
        self._dead: str | None = None
        self._wanted_dead = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._read_log(log))]

    @property
    def dead(self) -> str | None:
        return self._dead

    @property
    def pending(self) -> int:
        return len(self._waiting)

    async def call(
        self, header: Mapping[str, object], body: bytes | memoryview, deadline_s: float
    ) -> tuple[dict[str, Any], bytes]:
        if self._dead is not None:
            raise Unreachable(f"the worker of {self.load.skill} {self.load.version} is gone: {self._dead}")
        future: asyncio.Future[tuple[dict[str, Any], bytes]] = asyncio.get_running_loop().create_future()
        if len(self._waiting) >= MAX_BEHIND:
            raise DeadlineExceeded(f"{self.load.skill} still owes {MAX_BEHIND} answers: try again later")
        self._waiting.append(future)
        self._idle.clear()
        self._writer.write(ipc.frame(header, body))
        try:
            async with asyncio.timeout(deadline_s):
                reply, answer = await future
        except TimeoutError:
            raise DeadlineExceeded(f"{self.load.skill} did not answer within {deadline_s:g} s") from None
        finally:
            # However it was given up: at this deadline, or cancelled by that of the one who asked.
            if future in self._waiting:
                future.get_loop().call_later(HANG_S, self._give_up, future)
        if reply.get("ok") is not True:
            raise error_for(int(reply.get("code", 1)), str(reply.get("error", "the worker gave no reason")))
        return reply, answer

    def _give_up(self, future: "asyncio.Future[tuple[dict[str, Any], bytes]]") -> None:
        """Kill the process when it still has not answered."""
        if future in self._waiting:
            LOG.warning("worker.hangs skill=%s version=%s", self.load.skill, self.load.version)
            self._kill()

    def last_words(self) -> str:
        return " / ".join(self._lines)

    async def stop(self, drain_s: float) -> None:
        self._wanted_dead = True
        with contextlib.suppress(SkerryError, TimeoutError):
            async with asyncio.timeout(drain_s):
                await self._idle.wait()
        self._kill()
        # The kernel closes both ends of a killed process; the deadline is for a log that a grandchild keeps open.
        _, late = await asyncio.wait(self._tasks, timeout=END_S)
        for task in late:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if not self._status.done():  # afterwards the number may be another process's
                os.kill(self.pid, signal.SIGKILL)

    def buried(self, status: int) -> None:
        """The zygote saw the process end."""
        if not self._status.done():
            self._status.set_result(status)

    async def _read(self) -> None:
        try:
            while (received := await ipc.read(self._reader)) is not None:
                header, body = received
                if self._waiting:
                    future = self._waiting.popleft()
                    if not future.done():
                        future.set_result((header, bytes(body)))
                if not self._waiting:
                    self._idle.set()
        except SkerryError as error:
            LOG.warning("worker.speech skill=%s error=%r", self.load.skill, str(error))
        # The channel closes with the process. How it ended, the zygote knows a moment later.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await asyncio.shield(self._status)
                await asyncio.wait([self._tasks[1]])
        self._end()

    def _end(self) -> None:
        self._dead = how_it_ended(self._status.result() if self._status.done() else None)
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(Unreachable(f"{self.load.skill} {self.load.version} died: {self._dead}"))
                future.exception()  # a caller that gave up already must not leave a warning behind
        self._idle.set()
        self._writer.close()
        if not self._wanted_dead:
            LOG.warning("worker.died skill=%s version=%s how=%r", self.load.skill, self.load.version, self._dead)
            self._died(self)

    async def _read_log(self, log: int) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=64 << 10)
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(log, "rb"))
        try:
            while True:
                try:
                    line = await reader.readline()
                except ValueError:
                    continue  # a line longer than the limit: dropped
                if not line:
                    return
                text = line.decode(errors="replace").rstrip()[:MAX_LINE]
                if text:
                    self._lines.append(text)
                    LOG.info("skill.said skill=%s version=%s %s", self.load.skill, self.load.version, text)
        finally:
            transport.close()


def how_it_ended(status: int | None) -> str:
    """Return an exit status as words."""
    if status is None:
        return "for an unknown reason"
    if status >= 0:
        return f"exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def refused_by_probe(reply: Mapping[str, Any]) -> None:
    """Raise what a probe found.

    Raises:
        Refused: the outputs are not the golden ones.
    """
    if reason := str(reply.get("probe", "")):
        raise Refused(f"the probe failed: {reason}")
