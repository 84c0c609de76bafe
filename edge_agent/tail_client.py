"""A worker's side of the link process: send an activation frame, look for the answer, never block longer than asked."""

import contextlib
import dataclasses
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edge_agent import ipc
from skills import oip
from skills.errors import FormatError
from skills.split import Estimate
from skills.timer import Halt
from skills.wire import unpack_frame

if TYPE_CHECKING:
    from numpy.typing import NDArray

RECONNECT_S = 1.0
LOOK_EVERY_S = 1.0
NEWEST_S = 0.005  # how long a choice waits for the newest estimate where the one at hand may be old
SEND_DEADLINE_S = 1.0
MAX_ERROR = 200  # characters of a sentence that names what a tail sent
MAX_FRAME_BYTES = oip.MAX_MESSAGE_BYTES + (1 << 20)


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """The tail's outputs; or why there are none: `kind` is unavailable, late, exhausted, loading or invalid.

    With a `coding` the one output is a frame, the answer in that coding of the plan's replies.
    """

    outputs: "Mapping[str, NDArray[Any]] | None"
    kind: str = ""
    error: str = ""
    coding: str = ""


class Tail(Protocol):
    """What a split model asks of the other side; the fake of the tests keeps to the same contract."""

    def prepare(self, plan: str) -> None:
        """Ask the other side to have a plan loaded before the first request."""

    def estimate(self) -> Estimate:
        """Return what is known of the link now, without waiting; a bandwidth of 0 is not known yet."""

    def send(self, plan: str, cut: str, codec: str, frame: bytes, deadline_s: float, reply: str = "") -> int:
        """Send a frame and return the request's number. A link that is gone shows in `wait`.

        `reply` names the coding that the answer may come back in; it may come raw all the same.
        """

    def send_plain(
        self, plan: str, cut: str, arrays: "Mapping[str, NDArray[Any]]", deadline_s: float, tail_ms: float = 0.0
    ) -> int:
        """Send the tensors of a cut as they are, to a model `<plan>.<cut>` (`<plan>` for the input) of any server.

        A stock server does not say how long it took; `tail_ms` is what to assume.
        """

    def wait(self, request: int, timeout_s: float) -> Reply | None:
        """Return the reply, or None when none came within `timeout_s` (0: only look)."""

    def watch(self, request: int, halt: Halt) -> AbstractContextManager[Callable[[], bool]]:
        """While it is entered, set `halt` as soon as outputs have come; what it returns says whether they have.

        Nothing else of the tail may be used meanwhile.
        """

    def cancel(self, request: int, *, late: bool) -> None:
        """Give a request up; `late` says that it took too long, which counts against the tail."""

    def close(self) -> None:
        """Let go of the connection."""


class LinkClient:
    """The real `Tail`: frames over the link process's Unix socket. Not for use from two threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._channel: socket.socket | None = None
        self._buffer = bytearray()
        self._replies: dict[int, Reply] = {}
        self._waiting: set[int] = set()
        self._estimate = Estimate(0.0, 0.0, up=False)
        self._plan = ""
        self._looked_at_s = float("-inf")
        self._heard = 0  # estimates since we last spoke
        self._next, self._try_at_s = 0, float("-inf")

    def prepare(self, plan: str) -> None:
        self._plan = plan
        self._connect()

    def estimate(self) -> Estimate:
        self._connect()
        while self._receive(0):
            pass  # the newest counts
        now, old = time.monotonic(), self._heard >= ipc.MAX_ESTIMATES  # then the link has told us no more
        if old or now - self._looked_at_s > LOOK_EVERY_S:
            self._looked_at_s = now
            self._put(ipc.frame({"op": "look"}))
        while old and self._channel is not None and not self._heard and (left := now + NEWEST_S - time.monotonic()) > 0:
            self._receive(left)
        return self._estimate

    def send(self, plan: str, cut: str, codec: str, frame: bytes, deadline_s: float, reply: str = "") -> int:
        header = {"op": "infer", "plan": plan, "cut": cut, "codec": codec} | ({"reply": reply} if reply else {})
        return self._send(header, frame, deadline_s)

    def send_plain(
        self, plan: str, cut: str, arrays: "Mapping[str, NDArray[Any]]", deadline_s: float, tail_ms: float = 0.0
    ) -> int:
        raw = {name: oip.to_raw(array) for name, array in arrays.items()}
        tensors = [[name, oip.datatype(array), list(array.shape), len(raw[name])] for name, array in arrays.items()]
        header = {"op": "plain", "plan": plan, "cut": cut, "tensors": tensors, "tail_ms": tail_ms}
        return self._send(header, b"".join(raw.values()), deadline_s)

    def _send(self, header: dict[str, Any], body: bytes, deadline_s: float) -> int:
        self._next += 1
        self._waiting.add(self._next)
        frame = ipc.frame({**header, "id": self._next, "deadline_us": max(1, int(deadline_s * 1e6))}, body)
        self._put(frame, min(SEND_DEADLINE_S, max(0.001, deadline_s)))
        return self._next

    def wait(self, request: int, timeout_s: float) -> Reply | None:
        left = max(0.0, timeout_s)
        until = time.monotonic() + left
        while request not in self._replies and self._channel is not None:
            if left < 0:
                return None  # whatever else keeps coming
            self._receive(left)
            left = until - time.monotonic()
        self._waiting.discard(request)
        return self._replies.pop(request, Reply(None, "unavailable", "the link process is gone"))

    @contextlib.contextmanager
    def watch(self, request: int, halt: Halt) -> Iterator[Callable[[], bool]]:
        def arrived() -> bool:
            reply = self._replies.get(request)
            return reply is not None and reply.outputs is not None

        def look() -> None:
            while self._channel is not None and not arrived():
                if theirs in select.select([self._channel, theirs], [], [])[0]:
                    return
                self._receive(0)
            if arrived():
                halt.set()

        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=look, name="tail-watch", daemon=True)
        thread.start()
        try:
            yield arrived
        finally:
            ours.close()  # its other end becomes readable
            thread.join()
            theirs.close()

    def cancel(self, request: int, *, late: bool) -> None:
        self._waiting.discard(request)
        self._replies.pop(request, None)
        self._put(ipc.frame({"op": "cancel", "id": request, "late": late}))

    def wait_up(self, timeout_s: float) -> bool:
        """Wait until the link says that it reaches the tail; False when it did not in time, or when there is no link."""
        until = time.monotonic() + timeout_s
        while not self.estimate().up:
            left = until - time.monotonic()
            if self._channel is None or left <= 0:
                return False
            self._receive(left)
        return True

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
        self._channel = None

    def _connect(self) -> None:
        now = time.monotonic()
        if self._channel is not None or now < self._try_at_s:
            return
        self._try_at_s = now + RECONNECT_S
        channel = socket.socket(socket.AF_UNIX)
        try:
            channel.settimeout(SEND_DEADLINE_S)
            channel.connect(str(self._path))
        except OSError:
            channel.close()
            return
        self._channel, self._buffer = channel, bytearray()
        if self._plan:
            self._put(ipc.frame({"op": "plan", "plan": self._plan}))

    def _put(self, data: bytes, timeout_s: float = SEND_DEADLINE_S) -> None:
        if self._channel is None:
            return
        self._heard = 0
        try:
            self._channel.settimeout(timeout_s)
            self._channel.sendall(data)
        except OSError:
            self._lose()

    def _receive(self, timeout_s: float) -> bool:
        """Read what is there, waiting at most `timeout_s` for the first byte; say whether anything came."""
        if self._channel is None:
            return False
        try:
            if not select.select([self._channel], [], [], timeout_s)[0]:
                return False
            data = self._channel.recv(1 << 20)
        except OSError:
            data = b""
        if not data:
            self._lose()
            return True
        self._buffer += data
        try:
            while (message := self._take()) is not None:
                self._understand(*message)
        except (FormatError, KeyError, TypeError, ValueError):
            self._lose()
        return True

    def _take(self) -> tuple[dict[str, Any], memoryview] | None:
        if len(self._buffer) < 4:
            return None
        (length,) = struct.unpack_from(">I", self._buffer)
        if length > MAX_FRAME_BYTES:
            raise FormatError(f"the link announces a frame of {length} bytes")
        if len(self._buffer) < 4 + length:
            return None
        data = self._buffer[4 : 4 + length]
        del self._buffer[: 4 + length]
        return unpack_frame(memoryview(data), MAX_FRAME_BYTES)

    def _understand(self, header: dict[str, Any], body: memoryview) -> None:
        if header["op"] == "estimate":
            self._heard += 1
            self._estimate = Estimate(
                float(header["mbit"]),
                float(header["rtt_ms"]),
                header["up"] is True,
                header["cold"] is True,
                float(header["queue_ms"]),
            )
        elif header["op"] == "answer" and header["id"] in self._waiting:
            if header["ok"] is not True:
                self._replies[header["id"]] = Reply(None, str(header["kind"]), str(header["error"]))
                return
            self._replies[header["id"]] = _read(header, body)

    def _lose(self) -> None:
        self.close()
        self._estimate = Estimate(0.0, 0.0, up=False)
        self._replies.clear()


def _read(header: dict[str, Any], body: memoryview) -> Reply:
    """Return an answer of the tail, whose arrays may be written to, as those that are computed here may.

    One whose tensors are not what they say is this answer's fault, not the link's.
    """
    outputs, at = {}, 0
    try:
        for name, kind, shape, size in header["outputs"]:
            outputs[name] = oip.from_raw(name, kind, shape, bytearray(body[at : at + size]))
            at += size
    except FormatError as error:
        return Reply(None, "invalid", f"the tail's answer: {error}"[:MAX_ERROR])
    return Reply(outputs, coding=str(header.get("reply", "")))
