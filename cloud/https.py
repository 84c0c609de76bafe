"""The one door to uvicorn: an app over HTTPS inside the controller's own event loop."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

from cloud.authority import Authority
from cloud.broker import bracket
from skills.errors import Unreachable

DRAIN_S = 3


@contextlib.asynccontextmanager
async def serve_https(app: Any, listen: str, port: int, authority: Authority) -> AsyncIterator[None]:
    """Serve an ASGI app while the block runs; it answers when the block begins.

    Raises:
        Unreachable: the port is taken.
    """
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # signals belong to the process that holds all parts

    try:
        listener = socket.create_server((listen, port), family=socket.AF_INET6 if ":" in listen else socket.AF_INET)
        # Inherited by every connection. asyncio would set it for sockets that it opened itself; without it an answer of two
        # packets waits 40 ms for the client's delayed acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        raise Unreachable(f"cannot listen for the API on {bracket(listen)}:{port}: {error.strerror or error}") from None
    config = uvicorn.Config(
        app,
        ssl_certfile=authority.server.cert,
        ssl_keyfile=authority.server.key,
        log_level="critical",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=DRAIN_S,
        limit_concurrency=200,
        h11_max_incomplete_event_size=64 << 10,
    )
    server = Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="api")
    try:
        while not server.started and not task.done():  # noqa: ASYNC110 - uvicorn offers no event
            await asyncio.sleep(0.01)
        if task.done():
            await task
        yield
    finally:
        server.should_exit = True
        await asyncio.gather(task, return_exceptions=True)
        listener.close()
