"""The controller's child processes: started, watched, started again with growing pauses, and never left behind.

A child dies with the controller even when that is killed: the kernel sends it SIGKILL (PR_SET_PDEATHSIG, Linux). Its stderr
goes to the controller's log, at most `MAX_LINES` lines between two starts.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence

from cloud.journal import Journal
from skills.errors import Unreachable

STOP_DEADLINE_S = 5.0
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
HEALTHY_AFTER_S = 30.0
MAX_LINES = 200
PR_SET_PDEATHSIG = 1


class Child:
    """One child that should always run, owned by one task."""

    def __init__(self, name: str, command: Sequence[str], journal: Journal) -> None:
        self.name = name
        self.starts = 0
        self.last_words: deque[str] = deque(maxlen=5)
        self._command = tuple(command)
        self._journal = journal
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> None:
        """Start the child and watch it from now on.

        Raises:
            Unreachable: its program cannot be started at all.
        """
        await self._spawn()
        self._task = asyncio.create_task(self._watch(), name=f"child {self.name}")

    async def ready(self, check: Callable[[], bool], deadline_s: float) -> None:
        """Wait until `check` holds.

        Raises:
            Unreachable: the child ended, or `check` did not hold in time; its last words are in the message.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline_s
        while not check():
            if self.starts > 1 or loop.time() > end:
                words = "; ".join(self.last_words) or "it said nothing"
                raise Unreachable(f"the {self.name} did not start: {words}")
            await asyncio.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if the child runs."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def stop(self) -> None:
        """End the child: politely, then by force."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        process = self._process
        if process is None or process.returncode is not None:
            return
        self.signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), STOP_DEADLINE_S)
        except TimeoutError:
            self.signal(signal.SIGKILL)
            await process.wait()

    async def _spawn(self) -> None:
        parent = os.getpid()
        libc = ctypes.CDLL(None)  # before the fork: nothing may be loaded between fork and exec

        def die_with_parent() -> None:
            libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
            if os.getppid() != parent:
                os._exit(1)

        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the controller, which ends its children in order
                preexec_fn=die_with_parent if sys.platform == "linux" else None,
            )
        except OSError as error:
            raise Unreachable(f"cannot start the {self.name} ({self._command[0]}): {error.strerror or error}") from None
        self.starts += 1
        self._journal.info("child.started", child=self.name, pid=self._process.pid, starts=self.starts)

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        pause = FIRST_PAUSE_S
        while True:
            began = loop.time()
            process = self._process
            if process is not None and process.stderr is not None:
                await self._relay(process.stderr)
                code = await process.wait()
                self._journal.warning(
                    "child.ended", child=self.name, pid=process.pid, code=code, said="; ".join(self.last_words) or None
                )
            pause = FIRST_PAUSE_S if loop.time() - began > HEALTHY_AFTER_S else min(LONGEST_PAUSE_S, pause * 2)
            await asyncio.sleep(pause)
            try:
                await self._spawn()
            except Unreachable as error:
                self._process = None
                self._journal.error("child.lost", child=self.name, error=error)

    async def _relay(self, stream: asyncio.StreamReader) -> None:
        lines = 0
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # a line beyond the reader's limit
                continue
            if not line:
                return
            text = line.decode(errors="replace").strip()
            lines += 1
            if text and lines <= MAX_LINES:
                self.last_words.append(text[:500])
                self._journal.debug("child.said", child=self.name, text=text[:500])
