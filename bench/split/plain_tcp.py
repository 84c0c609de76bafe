"""Plain TCP through a link, to see that it is what it was asked to be.

    python -P plain_tcp.py serve HOST:PORT      on one side
    python -P plain_tcp.py measure HOST:PORT    on the other

The server prints its port. The other one reads numbers of bytes and prints, for each, the round trip and the rate.
"""

import json
import socket
import statistics
import sys
import time

HEADER_SHARE = 1500 / 1448  # what IP and TCP add to a full segment


def serve(host: str, port: int) -> None:
    with socket.create_server((host, port)) as server:
        print(json.dumps({"port": server.getsockname()[1]}), flush=True)
        while True:
            client, _ = server.accept()
            with client:
                _answer(client)


def _answer(client: socket.socket) -> None:
    """Take eight bytes that say how many follow; say when they are all there, and how this side paces itself."""
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.sendall(_control(client).encode().ljust(16))
    while head := client.recv(8, socket.MSG_WAITALL):
        left = int.from_bytes(head, "big")
        while left:
            left -= len(client.recv(min(left, 1 << 20)))
        client.sendall(b"k")


def measure(host: str, port: int) -> None:
    with socket.create_connection((host, port)) as server:
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        control = "/".join(sorted({_control(server), server.recv(16, socket.MSG_WAITALL).decode().strip()}))

        def send(size: int) -> float:
            start = time.perf_counter()
            server.sendall(size.to_bytes(8, "big") + bytes(size))
            server.recv(1)
            return time.perf_counter() - start

        for line in sys.stdin:
            rtt = statistics.median(send(0) for _ in range(7))
            send(int(line))  # opens the window
            took = send(int(line)) - rtt
            mbit = int(line) * HEADER_SHARE * 8 / took / 1e6
            print(json.dumps({"rtt_ms": rtt * 1e3, "mbit": mbit, "control": control}), flush=True)


def _control(one: socket.socket) -> str:
    return one.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


if __name__ == "__main__":
    at, _, number = sys.argv[2].rpartition(":")
    (serve if sys.argv[1] == "serve" else measure)(at, int(number))
