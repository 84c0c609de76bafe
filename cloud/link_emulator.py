"""A slow network on this machine, without root: a TCP proxy with a rate, a round-trip time and cuts.

It shows a warm link only: both of its ends are real TCP connections over loopback, so slow start after a silence, losses
and the header overhead of a real network do not appear.

    python -m cloud.link_emulator --target HOST:PORT --link 20mbit/30ms [--listen HOST:PORT] [--port-file F]

Lines on standard input change it while it runs: `link 5mbit/50ms`, `cut 3` (all connections die, none is let in for three
seconds), `stall 3` (nothing moves for three seconds). It ends when standard input is closed.
"""

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from skills.errors import SkerryError, Unreachable, UsageError
from skills.files import write_atomic
from skills.network import Link, parse_link

PIECE_BYTES = 4096
ROUNDING_S = 0.0008


class Proxy:
    """Carries connections to `target` as a link of this rate and round-trip time would."""

    def __init__(self, target: tuple[str, int], link: Link) -> None:
        self._target, self.link = target, link
        self._blocked_until_s = self._stalled_until_s = 0.0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def cut(self, seconds: float) -> None:
        """Kill every connection and let none in for this long."""
        self._blocked_until_s = time.monotonic() + seconds
        for writer in list(self._writers):
            writer.transport.abort()

    def stall(self, seconds: float) -> None:
        """Keep every connection and move nothing for this long."""
        self._stalled_until_s = time.monotonic() + seconds

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        if time.monotonic() < self._blocked_until_s:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        try:
            # Cancelled means that the emulator ends; asyncio's streams would print a traceback for it.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(self._carry(reader, far_writer), self._carry(far_reader, writer))
        finally:
            for one in (writer, far_writer):
                self._writers.discard(one)
                one.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pace what arrives to the rate, then deliver it half a round trip later."""
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=256)
        delivery = asyncio.create_task(self._deliver(waiting, writer))
        free_at = time.monotonic()
        try:
            while data := await reader.read(PIECE_BYTES):
                free_at = max(free_at, time.monotonic()) + len(data) * 8 / (self.link.mbit * 1e6)
                await waiting.put((free_at + self.link.rtt_ms / 2000, data))
                # Reading on only when the wire is free again is what makes the sender feel the rate.
                await _until(free_at)
        except OSError:
            pass
        finally:
            await waiting.put((0.0, b""))
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await delivery

    async def _deliver(self, waiting: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while True:
                due, data = await waiting.get()
                if not data:
                    writer.write_eof()
                    return
                await _until(max(due, self._stalled_until_s))
                writer.write(data)
                await writer.drain()


async def _until(due_s: float) -> None:
    """Sleep to within a fraction of a millisecond: the event loop rounds every wait up to the next whole one."""
    left = due_s - time.monotonic()
    if left > ROUNDING_S:
        await asyncio.sleep(left - ROUNDING_S)


class EmulatedLink:
    """A proxy in a process of its own: `port` to connect to, and the means to change it."""

    def __init__(self, child: "subprocess.Popen[bytes]", port: int) -> None:
        self._child, self.port = child, port

    def change(self, link: Link) -> None:
        """Take another rate and round-trip time from now on."""
        self._say(f"link {link}")

    def cut(self, seconds: float) -> None:
        """Kill every connection and let none in for this long."""
        self._say(f"cut {seconds:g}")

    def stall(self, seconds: float) -> None:
        """Move nothing for this long."""
        self._say(f"stall {seconds:g}")

    def _say(self, line: str) -> None:
        if self._child.stdin is not None:
            self._child.stdin.write(line.encode() + b"\n")
            self._child.stdin.flush()


@contextlib.contextmanager
def emulated_link(target_port: int, link: Link) -> Iterator[EmulatedLink]:
    """Run an emulator in front of a port of this machine; it ends with the block.

    Raises:
        Unreachable: it did not start.
    """
    command = [
        sys.executable,
        "-P",
        "-m",
        "cloud.link_emulator",
        "--target",
        f"127.0.0.1:{target_port}",
        "--link",
        str(link),
        "--print-port",
    ]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        line = child.stdout.readline() if child.stdout is not None else b""
        if not line.strip().isdigit():
            raise Unreachable("the link emulator did not start")
        yield EmulatedLink(child, int(line))
    finally:
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                stream.close()
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


async def _run(listen: tuple[str, int], proxy: Proxy, port_file: Path | None, print_port: bool) -> None:
    stop = asyncio.Event()
    server = await asyncio.start_server(proxy.handle, *listen)
    port = server.sockets[0].getsockname()[1]
    if port_file is not None:
        write_atomic(port_file, f"{port}\n".encode())
    if print_port:
        print(port, flush=True)
    pending = bytearray()

    def hear() -> None:
        data = os.read(0, 4096)
        if not data:
            asyncio.get_running_loop().remove_reader(0)
            stop.set()
        pending.extend(data)
        while b"\n" in pending:
            line, _, rest = pending.partition(b"\n")
            pending[:] = rest
            _obey(proxy, line.decode("utf-8", "replace"))

    asyncio.get_running_loop().add_reader(0, hear)
    await stop.wait()
    server.close()
    proxy.cut(3600)


def _obey(proxy: Proxy, line: str) -> None:
    word, _, value = line.strip().partition(" ")
    try:
        if word == "link":
            proxy.link = parse_link(value)
        elif word in ("cut", "stall"):
            getattr(proxy, word)(float(value))
        else:
            raise UsageError(f"{word!r} is not understood: link, cut or stall")
    except (SkerryError, ValueError) as error:
        print(f"link emulator: {error}", file=sys.stderr)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host or "127.0.0.1", int(port)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cloud.link_emulator", description="Emulate a slow link (warm only) in front of a TCP port."
    )
    parser.add_argument("--target", type=_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--listen", type=_address, default=("127.0.0.1", 0), metavar="HOST:PORT")
    parser.add_argument("--link", default="20mbit/30ms", metavar="RATE/RTT")
    parser.add_argument("--port-file", type=Path, metavar="FILE")
    parser.add_argument("--print-port", action="store_true")
    chosen = parser.parse_args(argv)
    try:
        asyncio.run(
            _run(chosen.listen, Proxy(chosen.target, parse_link(chosen.link)), chosen.port_file, chosen.print_port)
        )
    except SkerryError as error:
        print(f"link emulator: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
