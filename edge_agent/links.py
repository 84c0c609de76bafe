"""Keeps the link process (edge_agent/link.py) alive while a split skill is here.

Losing it costs no answer, only the cloud's help.
"""

import asyncio
import contextlib
import logging
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

LOG = logging.getLogger("skerry.link")
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
END_S = 2.0


class Links(Protocol):
    """Where the way to the tail comes from."""

    def open(self) -> Path | None:
        """Have a link from now on; returns its socket, None when the controller has no tail."""

    async def close(self) -> None:
        """Have none any more."""


class NoLinks:
    """A device without a tail."""

    def open(self) -> Path | None:
        return None

    async def close(self) -> None:
        return None


class LinkKeeper:
    """`Links` as one child process, restarted with growing pauses.

    `tls` is the folder of the device's certificate, key and CA; `ca` a file with another CA, if that vouches for the tail.
    """

    def __init__(self, tail_url: str, tls: Path, ca: Path | None = None) -> None:
        parts = urlsplit(tail_url if "//" in tail_url else f"//{tail_url}")
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        self._target = f"{host}:{parts.port}" if host and parts.port else ""
        self._tls, self._ca = tls if parts.scheme != "grpc" else None, ca
        self._folder: Path | None = None
        self._task: asyncio.Task[None] | None = None

    def open(self) -> Path | None:
        if not self._target:
            return None
        if self._folder is None:
            # Not below the data directory: a Unix socket's path may have 107 bytes only.
            self._folder = Path(tempfile.mkdtemp(prefix="skerry-link-"))
        path = self._folder / "s"
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._keep(path), name="link")
        return path

    async def close(self) -> None:
        # Both are let go of first: whoever opens meanwhile gets new ones.
        task, self._task = self._task, None
        folder, self._folder = self._folder, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    async def _keep(self, path: Path) -> None:
        command = [sys.executable, "-P", "-m", "edge_agent.link", "--socket", str(path), "--target", self._target]
        if self._tls is not None:
            tls = self._tls if self._ca is None else _trusting(self._ca, self._tls, path.with_name("tls"))
            command += ["--tls", str(tls)]
        pause, loop = FIRST_PAUSE_S, asyncio.get_running_loop()
        while True:
            process = await asyncio.create_subprocess_exec(
                *command, "--with-parent", stdin=asyncio.subprocess.PIPE, start_new_session=True
            )
            started = loop.time()
            LOG.info("link.started pid=%s target=%s", process.pid, self._target)
            try:
                status = await process.wait()
            finally:
                with contextlib.suppress(ProcessLookupError, TimeoutError):
                    process.terminate()
                    async with asyncio.timeout(END_S):
                        await process.wait()
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            if loop.time() - started > LONGEST_PAUSE_S:
                pause = FIRST_PAUSE_S
            LOG.warning("link.died status=%s again_in_s=%s", status, pause)
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_S)


def _trusting(ca: Path, tls: Path, folder: Path) -> Path:
    """Return a folder that has the device's own certificate and key, and another CA to trust: links, no copies of a key."""
    folder.mkdir(exist_ok=True)
    for name, target in (("ca.pem", ca), ("cert.pem", tls / "cert.pem"), ("key.pem", tls / "key.pem")):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target.resolve())
    return folder
