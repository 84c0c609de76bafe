"""The tail's side of a plan of stages: a process per plan that runs their code, asked stage by stage, replaced when it is lost.

Nothing that the code does holds up the tail: every wait has a deadline, and a process that is at the same stage for too long
is ended. Until its successor is there, requests for its plan are refused, and their devices go on by themselves.
"""

import contextlib
import dataclasses
import logging
import os
import queue
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent import ipc
from skills.errors import DeadlineExceeded, FormatError, SkerryError, Unreachable, error_for
from skills.split_plan import Plan
from skills.stages import fitted, pack, unpack

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

START_S = 60.0
LONGEST_S = 10.0  # no stage is waited for longer, whatever its request allows
STUCK_S = 10.0  # beyond this a stage that nobody waits for any more is taken to hang
SEND_S = 5  # a process that does not read its socket for so long is lost
AGAIN_S = 5.0  # between two starts
# The code gets none of the tail's settings and secrets by way of the environment.
ENVIRONMENT = ("PATH", "PYTHONPATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
LOG = logging.getLogger("skerry.tail")


class StagesLost(Unreachable):
    """The process with the stages is not there now; the device answers by itself."""


class StageHost:
    """Runs the stages of a plan as a chain of segments is run; used by one thread at a time, ended when it is let go of."""

    def __init__(self, folder: Path, name: str, plan: Plan, threads: int = 1) -> None:
        """Start the process and wait until its stages are loaded.

        Raises:
            TrustError, FormatError, NotFound: as it found its files.
            DeadlineExceeded, StagesLost: it was not ready in time, or ended.
        """
        self._folder, self._name, self._plan, self._threads = folder.absolute(), name, plan, threads
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._starting = False
        self._not_before_s = 0.0
        self._owned: list[_Child] = []
        self._end = weakref.finalize(self, _end_all, self._owned)
        self._start()

    def run(
        self,
        values: "Arrays",
        start: int = 0,
        stop: int | None = None,
        before_each: Callable[[], None] | None = None,
        *,
        until_s: float = float("inf"),
    ) -> "dict[str, NDArray[Any]]":
        """Run stages start..stop-1 on a message and return the one behind them, held against its types.

        `until_s`, a time of the monotonic clock, is the last moment that is waited for.

        Raises:
            FormatError: a message does not fit its types, or a stage failed; the sentence says which.
            DeadlineExceeded: a stage needs longer.
            StagesLost: the process is gone, or still busy with what nobody waits for.
        """
        message = dict(values)
        for at in range(start, len(self._plan.stages) if stop is None else stop):
            if before_each is not None:
                before_each()
            message = self._stage(at, message, until_s)
        return message

    def close(self) -> None:
        """End the process now; otherwise it ends when nobody holds this object any more."""
        self._end()

    def _stage(self, at: int, message: "Arrays", until_s: float) -> "dict[str, NDArray[Any]]":
        stage = self._plan.stages[at]
        before = self._plan.stages[at - 1].message if at else self._plan.inputs
        shapes, body = pack(before, fitted(before, message, "the message"))
        with self._lock:
            child = self._idle()
            try:
                child.ask({"stage": at, "shapes": shapes}, body)
                answered = child.answer(min(until_s - time.monotonic(), LONGEST_S))
            except StagesLost:
                self._replace("it ended")
                raise StagesLost(f"the process that runs stage '{stage.name}' ended: it is started again") from None
        if answered is None:
            raise DeadlineExceeded(f"stage '{stage.name}' needs longer than the request has")
        header, data = answered
        if "error" in header:
            raise FormatError(str(header["error"])[:500])
        return unpack(stage.message, header.get("shapes"), data)

    def _idle(self) -> "_Child":
        """Return the process, if it waits for work."""
        child = self._child
        if child is None:
            self._replace("there is none")
            raise StagesLost("the process that runs the stages of this plan is being started again")
        busy_s = child.busy_s()
        if busy_s is None:
            return child
        if busy_s > STUCK_S:
            self._replace("it is stuck in a stage")
        raise StagesLost("the process that runs the stages of this plan is still busy with an older request")

    def _replace(self, why: str) -> None:
        """End the process and start another one, not here: nobody waits for that."""
        if self._child is not None:
            LOG.warning("stages.lost plan=%s why=%s", self._name, why)
            self._owned.remove(self._child)
            self._child.end()
            self._child = None
        if not self._starting and time.monotonic() >= self._not_before_s:
            self._starting = True
            threading.Thread(target=self._start_again, name="tail-stages", daemon=True).start()

    def _start_again(self) -> None:
        try:
            self._start()
            LOG.info("stages.started plan=%s", self._name)
        except SkerryError as error:
            LOG.warning("stages.not_started plan=%s error=%s", self._name, error)
        finally:
            self._not_before_s = time.monotonic() + AGAIN_S
            self._starting = False

    def _start(self) -> None:
        child = _Child.start(self._folder, self._name, self._threads)
        self._owned.append(child)
        try:
            answered = child.answer(START_S)
            if answered is None:
                raise DeadlineExceeded(f"the stages of plan {self._name} were not loaded within {START_S:.0f} s")
            if "error" in answered[0]:
                raise error_for(int(answered[0].get("code", 1)), str(answered[0]["error"])[:500])
        except SkerryError as error:
            self._owned.remove(child)
            child.end()
            if isinstance(error, StagesLost):
                raise StagesLost(
                    f"the process with the stages of plan {self._name} ended before they were loaded"
                ) from None
            raise
        self._child = child


@dataclasses.dataclass(eq=False, slots=True)
class _Child:
    """A process, the socket to it, and what came back on it: (header, body), or None when there is nothing more to come."""

    process: "subprocess.Popen[bytes]"
    channel: socket.socket
    answers: "queue.Queue[tuple[dict[str, Any], memoryview] | None]"
    reader: threading.Thread
    number: int = 0
    asked_s: float | None = None  # since when it has owed an answer

    @classmethod
    def start(cls, folder: Path, name: str, threads: int) -> "_Child":
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_S, 0))
        command = [sys.executable, "-P", "-B", "-m", "cloud.tail.stage_worker", "--channel", str(theirs.fileno())]
        command += ["--folder", str(folder), "--plan", name, "--threads", str(threads)]
        environment = {key: os.environ[key] for key in ENVIRONMENT if key in os.environ}
        environment |= {"ORT_DISABLE_TELEMETRY": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": str(threads)}
        with theirs:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, env=environment, pass_fds=(theirs.fileno(),), bufsize=0
            )
        answers: queue.Queue[tuple[dict[str, Any], memoryview] | None] = queue.Queue(4)  # it answers one by one
        reader = threading.Thread(target=_read, args=(ours, answers), name="tail-stages-read", daemon=True)
        reader.start()
        return cls(process, ours, answers, reader, asked_s=time.monotonic())

    def ask(self, header: Mapping[str, object], body: bytes) -> None:
        """Send a question to an idle process.

        Raises:
            StagesLost: it is gone.
        """
        self.number += 1
        try:
            self.channel.sendall(ipc.frame({"number": self.number, **header}, body))
        except OSError:
            raise StagesLost("it does not read") from None
        self.asked_s = time.monotonic()

    def answer(self, timeout_s: float) -> "tuple[dict[str, Any], memoryview] | None":
        """Return the answer to the last question, None when it has not come in time.

        Raises:
            StagesLost: it is gone, or answers something else.
        """
        try:
            found = self.answers.get(timeout=max(timeout_s, 0.0)) if timeout_s > 0 else self.answers.get_nowait()
        except queue.Empty:
            return None
        if found is None or found[0].get("number") != self.number:
            raise StagesLost("it is gone")
        self.asked_s = None
        return found

    def busy_s(self) -> float | None:
        """Return for how long it has owed an answer, None when it owes none; a late one that has come is dropped."""
        if self.asked_s is not None:
            try:
                self.answer(0)
            except StagesLost:
                self.asked_s = None  # the next question finds that out
        return None if self.asked_s is None else time.monotonic() - self.asked_s

    def end(self) -> None:
        """End the process; safe to call twice."""
        self.process.kill()
        with contextlib.suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        if self.reader is not threading.current_thread():
            self.reader.join(timeout=5)
        self.channel.close()


def _read(channel: socket.socket, answers: "queue.Queue[tuple[dict[str, Any], memoryview] | None]") -> None:
    """Hand on what comes, from a thread of its own, so that a wait for it can end."""
    try:
        while (received := ipc.receive(channel)) is not None:
            answers.put_nowait(received)
    except (FormatError, OSError, queue.Full):
        pass  # it says what nobody asked for: as good as gone
    with contextlib.suppress(queue.Full):
        answers.put_nowait(None)


def _end_all(children: "list[_Child]") -> None:
    for child in children:
        child.end()
