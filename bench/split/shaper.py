"""Two network namespaces with a slow link between them: packets go through this process, at a rate and after a delay.

    unshare -n  python -P shaper.py --link 20mbit/30ms [--control cubic]        (root)
    unshare -Urn python -P shaper.py …                                          (where users may have namespaces)

The namespace that it starts in is the device's (10.9.0.1), a second one that it makes is the tail's (10.9.0.2). Both ends
are the kernel's own TCP: slow start, losses at a full queue and headers are real. It prints one line of JSON: its pid and
the descriptors that hold the two namespaces. Lines on standard input change it:
`link 5mbit/50ms`, `control bbr`, `cut 10` (every packet is lost for ten seconds). It ends when standard input is closed.
"""

import argparse
import collections
import contextlib
import ctypes
import fcntl
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

from skills.network import Link, parse_link

DEVICE, TAIL = "10.9.0.1", "10.9.0.2"
CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TUN_NO_PI = 0x400454CA, 0x1001
SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFFLAGS = 0x8916, 0x891C, 0x8914
INTERFACES = "skdevice", "sktail"
IFF_UP_RUNNING = 0x41
CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")
QUEUE_S, LEAST_QUEUE_BYTES = 0.25, 65_536  # a drop-tail queue, as access routers have
BATCH = 64
EARLY_S = 2e-5


class Side:
    """One direction: packets read here, to be written to the other side when their time has come."""

    def __init__(self, file: int) -> None:
        self.file, self.free_at_s = file, 0.0
        self.waiting: collections.deque[tuple[float, bytes]] = collections.deque()

    def take(self, link: Link, lost: bool) -> None:
        """Read what is there; what the queue has no room for is dropped."""
        rate = link.mbit * 125_000
        room = max(LEAST_QUEUE_BYTES, rate * QUEUE_S)
        for _ in range(BATCH):
            try:
                packet = os.read(self.file, 2048)
            except BlockingIOError:
                return
            now = time.monotonic()
            if lost or max(0.0, self.free_at_s - now) * rate + len(packet) > room:
                continue
            self.free_at_s = max(now, self.free_at_s) + len(packet) / rate
            self.waiting.append((self.free_at_s + link.rtt_ms / 2000, packet))

    def give(self, to: int) -> None:
        """Write the packets whose time has come."""
        now = time.monotonic() + EARLY_S
        while self.waiting and self.waiting[0][0] <= now:
            try:
                os.write(to, self.waiting.popleft()[1])
            except OSError:
                return


class Shaper:
    """Both directions, and what may be changed while it runs."""

    def __init__(self, device: int, tail: int, link: Link) -> None:
        self._sides = Side(device), Side(tail)
        self._link, self._lost_until_s = link, 0.0
        self._spaces: tuple[int, int] = (-1, -1)
        self._pending = b""

    def run(self, spaces: tuple[int, int]) -> None:
        """Carry packets until standard input is closed; `spaces` are the descriptors of both namespaces."""
        self._spaces = spaces
        first, second = self._sides
        while True:
            due = min((side.waiting[0][0] for side in self._sides if side.waiting), default=None)
            wait = None if due is None else max(0.0, due - time.monotonic())
            ready = select.select([0, first.file, second.file], [], [], wait)[0]
            if 0 in ready and not self._hear():
                return
            for side in self._sides:
                if side.file in ready:
                    side.take(self._link, time.monotonic() < self._lost_until_s)
            first.give(second.file)
            second.give(first.file)

    def _hear(self) -> bool:
        data = os.read(0, 4096)
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            word, _, value = line.decode().partition(" ")
            if word == "link":
                self._link = parse_link(value)
            elif word == "cut":
                self._lost_until_s = time.monotonic() + float(value)
            elif word == "control":
                for space, name in zip(self._spaces, INTERFACES, strict=True):
                    enter(space)
                    pin(name, value)
            print("ok", flush=True)
        return bool(data)


def enter(space: int) -> None:
    """Make a network namespace this thread's own."""
    if ctypes.CDLL(None, use_errno=True).setns(space, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot enter a network namespace")


def pin(name: str, control: str) -> None:
    """Make a congestion control the one of every connection over an interface.

    The namespace's own setting may name only what the machine allows to all users; a route may name any (ip-route(8)).
    """
    source = DEVICE if name == INTERFACES[0] else TAIL
    command = ["ip", "route", "replace", "10.9.0.0/24", "dev", name, "src", source, "congctl", control]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        with contextlib.suppress(OSError):  # what it is in truth, the bench asks a connection
            CONTROL.write_text(control)


def interface(name: str, address: str) -> int:
    """Make a TUN interface in this namespace, with an address, up, and return its descriptor."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN_NO_PI))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for call, value in ((SIOCSIFADDR, address), (SIOCSIFNETMASK, "255.255.255.0")):
            packed = struct.pack("16sHH4s8x", name.encode(), socket.AF_INET, 0, socket.inet_aton(value))
            fcntl.ioctl(control, call, packed)
        for up in (name, "lo"):
            fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", up.encode(), IFF_UP_RUNNING))
    return file


def main() -> int:
    parser = argparse.ArgumentParser(prog="shaper.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--link", type=parse_link, required=True, metavar="RATE/RTT")
    parser.add_argument("--control", default="cubic", help="TCP congestion control of both sides (default: cubic)")
    given = parser.parse_args()
    try:
        here = os.open("/proc/self/ns/net", os.O_RDONLY)
        device = interface(INTERFACES[0], DEVICE)
        pin(INTERFACES[0], given.control)
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "cannot make a network namespace")
        tail = interface(INTERFACES[1], TAIL)
        pin(INTERFACES[1], given.control)
    except OSError as error:
        print(f"shaper: {error}", file=sys.stderr)
        return 1
    there = os.open("/proc/self/ns/net", os.O_RDONLY)
    with contextlib.suppress(PermissionError):
        os.nice(-10)  # a packet that waits for the processor is delay that the link does not have
    print(json.dumps({"pid": os.getpid(), "device": here, "tail": there}), flush=True)
    Shaper(device, tail, given.link).run((here, there))
    return 0


if __name__ == "__main__":
    sys.exit(main())
