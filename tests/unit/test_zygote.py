"""The zygote's side of a fork, without forking."""

import errno
import json
import os
import socket
from collections.abc import Iterator

import pytest

from edge_agent import zygote


@pytest.fixture
def channel() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.settimeout(5)
        yield ours, theirs


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
def test_a_fork_that_fails_is_answered_and_the_zygote_goes_on_with_nothing_left_open(channel, monkeypatch, number):
    def refuse() -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fork", refuse)
    ours, theirs = channel
    worker, worker_end = socket.socketpair()
    log, log_end = os.pipe()
    with worker:
        socket.send_fds(ours, [json.dumps({"fork": 7}).encode()], [worker_end.fileno(), log_end])
        worker_end.close()
        os.close(log_end)
        assert zygote._fork(theirs)
        assert json.loads(ours.recv(4096)) == {"forked": 7, "error": os.strerror(number)}
        worker.settimeout(5)
        assert worker.recv(1) == b""  # the zygote holds no copy of the other end
        assert os.read(log, 1) == b""
    os.close(log)


def test_a_request_whose_descriptors_did_not_come_is_answered_too(channel):
    ours, theirs = channel
    ours.send(json.dumps({"fork": 8}).encode())
    assert zygote._fork(theirs)
    assert json.loads(ours.recv(4096)) == {"forked": 8, "error": "too many open files"}
