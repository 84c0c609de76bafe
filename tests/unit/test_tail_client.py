"""The worker's side of the link, against a socket whose other end says what the test wants."""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent import ipc
from edge_agent.tail_client import SEND_DEADLINE_S, LinkClient
from skills.timer import Halt


def estimate(*, up: bool, mbit: float = 10.0) -> bytes:
    return ipc.frame({"op": "estimate", "mbit": mbit, "rtt_ms": 5.0, "up": up, "cold": False, "queue_ms": 0.0})


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[tuple[Path, socket.socket]]:
    path = tmp_path / "l"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        listening.settimeout(5)
        yield path, listening


def test_waiting_for_the_tail_ends_with_the_links_word_that_it_is_there(listener):
    path, listening = listener

    def link() -> None:
        channel, _ = listening.accept()
        with channel:
            channel.settimeout(5)
            channel.sendall(estimate(up=False))
            channel.recv(4096)  # the client looks: it has heard nothing good yet
            channel.sendall(estimate(up=True)[:7])
            channel.sendall(estimate(up=True)[7:])
            channel.recv(4096)

    speaking = threading.Thread(target=link)
    speaking.start()
    client = LinkClient(path)
    assert client.wait_up(30)
    client.close()
    speaking.join(5)


def test_waiting_for_the_tail_ends_at_once_when_there_is_no_link_or_it_hangs_up(listener):
    path, listening = listener
    assert not LinkClient(path.with_name("nobody")).wait_up(1e6)
    client = LinkClient(path)
    client.prepare("p")
    listening.accept()[0].close()
    assert not client.wait_up(1e6)


def test_waiting_for_the_tail_is_bounded(listener):
    path, _ = listener  # accepts nobody
    client = LinkClient(path)
    assert not client.wait_up(0.01)
    client.close()


def test_a_wait_ends_at_its_deadline_whatever_else_keeps_coming(listener, monkeypatch):
    path, _ = listener
    client = LinkClient(path)
    client.prepare("p")
    monkeypatch.setattr(client, "_receive", lambda timeout_s: True)  # always something, never the answer
    request = client.send("p", "c1", "u8", b"frame", 1.0)
    for timeout_s in (0.001, 0.0, -1.0):
        assert client.wait(request, timeout_s) is None
    client.close()


def test_of_all_estimates_that_came_meanwhile_the_newest_counts(listener):
    path, listening = listener
    client = LinkClient(path)
    client.prepare("p")
    channel, _ = listening.accept()
    with channel:
        for mbit in range(1, ipc.MAX_ESTIMATES):
            channel.sendall(estimate(up=True, mbit=mbit))
        assert client.estimate().mbit == ipc.MAX_ESTIMATES - 1
        client.close()


def test_who_was_told_so_many_estimates_that_the_link_fell_silent_asks_for_the_newest(listener, monkeypatch):
    monkeypatch.setattr("edge_agent.tail_client.NEWEST_S", 30.0)
    path, listening = listener
    client = LinkClient(path)
    client.prepare("p")
    channel, _ = listening.accept()
    asked = []

    def link() -> None:
        while not asked or asked[-1] != "look":
            asked.append(ipc.receive(channel)[0]["op"])
        channel.sendall(estimate(up=True, mbit=99.0))

    with channel:
        channel.settimeout(5)
        channel.sendall(estimate(up=True) * ipc.MAX_ESTIMATES)
        client._looked_at_s = float("inf")  # it is not time for a look as such
        speaking = threading.Thread(target=link)
        speaking.start()
        assert client.estimate().mbit == 99
        speaking.join(5)
        client.close()


def test_a_link_that_takes_nothing_holds_a_request_up_for_no_longer_than_its_deadline(listener):
    path, listening = listener
    client = LinkClient(path)
    client.prepare("p")
    channel, _ = listening.accept()
    with channel:
        start = time.monotonic()
        request = client.send("p", "c1", "u8", bytes(16 << 20), 0.05)
        assert time.monotonic() - start < SEND_DEADLINE_S
        reply = client.wait(request, 30)
        assert reply is not None
        assert reply.kind == "unavailable"


@pytest.mark.parametrize(
    "tensor",
    [["y", "FP32", [1, 4], 8], ["y", "FP33", [1, 2], 8], ["y", "FP32", [1, -2], 8], ["y", "FP32", [2] * 9, 8],
     ["y", "BOOL", [8], 8], ["y", "BYTES", [1], 8], ["y", "FP32", [0, 2147483647, 2147483647, 2147483647], 0],
     ["y" * 500, "FP32", [7], 8]],
)  # fmt: skip
def test_an_answer_whose_bytes_do_not_fit_is_its_own_fault_and_the_next_one_is_heard(listener, tensor):
    path, listening = listener
    client = LinkClient(path)
    client.prepare("p")
    channel, _ = listening.accept()
    with channel:
        first, second = (client.send("p", "c1", "u8", b"frame", 1.0) for _ in range(2))
        channel.sendall(
            estimate(up=True)
            + ipc.frame({"op": "answer", "id": first, "ok": True, "outputs": [tensor]}, b"\xff" * tensor[3])
            + ipc.frame({"op": "answer", "id": second, "ok": True, "outputs": [["y", "UINT8", [2], 2]]}, b"ab")
        )
        bad, good = client.wait(first, 5), client.wait(second, 5)
        assert bad is not None
        assert (bad.outputs, bad.kind) == (None, "invalid")
        assert bad.error.startswith("the tail's answer: the tensor 'y")
        assert len(bad.error) <= 200
        assert good is not None
        assert good.outputs is not None
        assert good.outputs["y"].tolist() == [97, 98]
        assert client.estimate().up
        client.close()


@pytest.mark.parametrize("padding", range(4))
def test_a_raw_answer_may_be_written_to_and_its_arrays_share_nothing(listener, padding):
    path, listening = listener
    client = LinkClient(path)
    client.prepare("p")
    channel, _ = listening.accept()
    tensors = [["a" * (padding + 1), "FP32", [2], 8], ["b", "FP32", [1], 4]]
    with channel:
        request = client.send("p", "c1", "u8", b"frame", 1.0)
        frame = ipc.frame({"op": "answer", "id": request, "ok": True, "outputs": tensors}, struct.pack("<3f", 1, 2, 3))
        channel.sendall(frame)
        reply = client.wait(request, 5)
        assert reply is not None
        assert reply.outputs is not None
        first, second = reply.outputs.values()
        first -= first.max()  # as the code that follows a model does, here and behind a tail
        assert (first.tolist(), second.tolist()) == ([-1, 0], [3])
        assert first.flags.aligned
        client.close()


ANSWER = [["y", "UINT8", [1], 1]]


@pytest.mark.parametrize("good", [True, False])
def test_who_watches_is_halted_by_outputs_and_not_by_a_refusal(listener, good):
    path, listening = listener
    client, halt, halted = LinkClient(path), Halt(), threading.Event()
    halt.then(halted.set)
    client.prepare("p")
    channel, _ = listening.accept()
    with channel:
        request = client.send("p", "c1", "u8", b"frame", 1.0)
        with client.watch(request, halt) as arrived:
            assert not arrived()
            channel.sendall(estimate(up=True))
            if good:
                channel.sendall(ipc.frame({"op": "answer", "id": request, "ok": True, "outputs": ANSWER}, b"a"))
                assert halted.wait(30)
                assert arrived()
            else:
                channel.sendall(ipc.frame({"op": "answer", "id": request, "ok": False, "kind": "late", "error": "no"}))
        assert halted.is_set() == good
        reply = client.wait(request, 30)
        assert reply is not None
        assert (reply.outputs is not None) == good
        client.close()


def test_watching_ends_when_the_link_is_gone(listener):
    path, listening = listener
    client, halt = LinkClient(path), Halt()
    client.prepare("p")
    request = client.send("p", "c1", "u8", b"frame", 1.0)
    listening.accept()[0].close()
    with client.watch(request, halt) as arrived:
        assert not arrived()
    reply = client.wait(request, 30)
    assert reply is not None
    assert reply.kind == "unavailable"
