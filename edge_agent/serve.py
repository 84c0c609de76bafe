"""The local endpoint: Open Inference Protocol v2 over REST, on the loopback, so a program cannot tell device from cloud.

Specification: https://github.com/kserve/open-inference-protocol (REST), with the binary tensor extension
(`Inference-Header-Content-Length`). Every error is a JSON object {"error": "one sentence"}.
"""

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

import h11

from edge_agent.service import Service
from skills import __version__
from skills.errors import DeadlineExceeded, FormatError, NotFound, Refused, SkerryError, StorageError, Unreachable

LOG = logging.getLogger("skerry.serve")
READ_BYTES = 64 << 10
IDLE_S = 75.0
MAX_CONNECTIONS = 256
LARGEST_AT_ONCE = 2  # request bodies in flight may take as much memory together as so many of the largest
STATUS = {FormatError: 400, NotFound: 404, Refused: 403, DeadlineExceeded: 504, Unreachable: 503, StorageError: 507}
MODEL = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?(/ready|/infer)?")
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")

Answer = tuple[int, dict[str, str], bytes]


class LocalEndpoint:
    """The HTTP server of one agent."""

    def __init__(
        self, service: Service, status: Callable[[], Mapping[str, Any]], *, max_bytes: int, deadline_s: float
    ) -> None:
        self._service, self._status, self._max_bytes, self._deadline_s = service, status, max_bytes, deadline_s
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()
        self._budget = LARGEST_AT_ONCE * max_bytes
        self.held_bytes = 0  # request bodies that are arriving, waiting or being answered
        self.port = 0

    async def start(self, host: str, port: int) -> None:
        """Listen.

        Raises:
            Unreachable: the port is taken.
        """
        try:
            self._server = await asyncio.start_server(self._accept, host, port, limit=READ_BYTES)
        except OSError as error:
            raise Unreachable(
                f"cannot listen on {host}:{port}: {error.strerror or error} (another agent? choose 'listen' in agent.yaml)"
            ) from None
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and end every connection."""
        if self._server is not None:
            self._server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._open) >= MAX_CONNECTIONS:
            writer.close()
            return
        self._open.add(task)
        try:
            await self._converse(reader, writer)
        except (ConnectionError, TimeoutError, asyncio.CancelledError):
            pass
        finally:
            self._open.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER)
        while True:
            try:
                status, headers, body = await self._exchange(connection, reader, writer)
            except h11.RemoteProtocolError as error:
                status, headers, body = _failure(error.error_status_hint, f"not an HTTP request: {error}")
            except SkerryError as error:
                status, headers, body = _failure(status_of(error), str(error))
            if status == 0:
                return
            await _send(connection, writer, status, headers, body)
            if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                return
            connection.start_next_cycle()

    async def _exchange(
        self, connection: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Answer:
        body = bytearray()
        try:
            return await self._receive(connection, reader, writer, body)
        finally:
            self.held_bytes -= len(body)

    async def _receive(
        self, connection: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytearray
    ) -> Answer:
        request: h11.Request | None = None
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                if connection.they_are_waiting_for_100_continue:
                    writer.write(connection.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
                async with asyncio.timeout(IDLE_S):
                    connection.receive_data(await reader.read(READ_BYTES))
            elif isinstance(event, h11.Request):
                request = event
                _check_host(event)
            elif isinstance(event, h11.Data):
                if len(body) + len(event.data) > self._max_bytes:
                    return _failure(413, f"the request is larger than the limit of {self._max_bytes} bytes")
                if self.held_bytes + len(event.data) > self._budget:
                    return _failure(503, f"requests of {self.held_bytes} bytes are being answered already: try again")
                body += event.data
                self.held_bytes += len(event.data)
            elif isinstance(event, h11.EndOfMessage) and request is not None:
                return await self._answer(request, memoryview(body).toreadonly())
            else:
                return 0, {}, b""  # the client is gone

    async def _answer(self, request: h11.Request, body: memoryview) -> Answer:
        path = unquote(request.target.decode("ascii", "replace").partition("?")[0])
        method = request.method.decode()
        try:
            if found := MODEL.fullmatch(path):
                return await self._model(method, request, body, found[1], found[2], found[3] or "")
            if method != "GET":
                return _failure(405, f"{method} is not answered at {path}")
            return self._about(path)
        except SkerryError as error:
            return _failure(status_of(error), str(error))
        except Exception as error:
            LOG.exception("request.broke path=%s", path)
            return _failure(500, f"the agent failed: {type(error).__name__}")

    def _about(self, path: str) -> Answer:
        match path:
            case "/v2":
                return _json(
                    {"name": "skerry-agent", "version": __version__, "extensions": ["binary_tensor_data"]}, 200
                )
            case "/v2/health/live":
                return _json({"live": True}, 200)
            case "/v2/health/ready":
                ready = bool(self._service.skills())
                return _json({"ready": ready}, 200 if ready else 503)
            case "/status":
                return _json(self._status(), 200)
        return _failure(404, f"nothing is at {path}; skills are at /v2/models/NAME")

    async def _model(
        self, method: str, request: h11.Request, body: memoryview, name: str, version: str | None, what: str
    ) -> Answer:
        if what == "/infer":
            if method != "POST":
                return _failure(405, "infer takes POST")
            header, answer = await self._service.infer(
                name, version, body, _json_len(request, len(body)), self._deadline_s
            )
            size = int(header["json_len"])
            if size == len(answer):
                return 200, {"content-type": "application/json"}, answer
            binary = {"content-type": "application/octet-stream", "inference-header-content-length": str(size)}
            return 200, binary, answer
        if method != "GET":
            return _failure(405, f"{method} is not answered here")
        serving = self._service.find(name, version)
        if what == "/ready":
            return _json({"name": name, "ready": True}, 200)
        return _json(
            {
                "name": name,
                "versions": [serving.installed.version],
                "platform": "skerry",
                "inputs": [_tensor(t) for t in serving.skill.inputs],
                "outputs": [_tensor(t) for t in serving.skill.outputs],
            },
            200,
        )


def status_of(error: SkerryError) -> int:
    """Return the HTTP status of an error."""
    return next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)


def _check_host(request: h11.Request) -> None:
    """Refuse names that a web page could have made point here (DNS rebinding)."""
    host = next((value.decode("ascii", "replace") for name, value in request.headers if name == b"host"), "")
    if host.rpartition(":")[0] not in LOOPBACK_HOSTS and host not in LOOPBACK_HOSTS:
        raise Refused(f"the request names the host {host[:80]!r}: the local endpoint answers as localhost only")


def _json_len(request: h11.Request, size: int) -> int:
    for name, value in request.headers:
        if name == b"inference-header-content-length":
            text = value.decode("ascii", "replace")
            if not text.isdecimal() or int(text) > size:
                raise FormatError(f"Inference-Header-Content-Length is {text[:20]!r}, expected 0 to {size}")
            return int(text)
    return size


def _tensor(tensor: Any) -> dict[str, object]:
    return {"name": tensor.name, "datatype": tensor.dtype, "shape": list(tensor.shape)}


def _json(value: object, status: int) -> Answer:
    return status, {"content-type": "application/json"}, json.dumps(value).encode()


def _failure(status: int, error: str) -> Answer:
    return _json({"error": error}, status)


async def _send(
    connection: h11.Connection, writer: asyncio.StreamWriter, status: int, headers: Mapping[str, str], body: bytes
) -> None:
    if connection.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
        return
    given = [*headers.items(), ("content-length", str(len(body)))]
    if connection.their_state is h11.ERROR or connection.their_state is h11.SEND_BODY:
        given.append(("connection", "close"))
    writer.write(connection.send(h11.Response(status_code=status, headers=given)) or b"")
    writer.write(connection.send(h11.Data(data=body)) or b"")
    writer.write(connection.send(h11.EndOfMessage()) or b"")
    async with asyncio.timeout(IDLE_S):
        await writer.drain()
