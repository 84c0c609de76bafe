"""The supervisor's end of a worker process, over a socket whose other end says what the test wants."""

import asyncio
import json
import os
import signal
import socket
from pathlib import Path

import pytest

from edge_agent import workers
from edge_agent.workers import MAX_BEHIND, ForkedWorker, Load, ZygoteWorkers
from skills.errors import DeadlineExceeded, Unreachable

LOAD = Load("digits", "1.0.0", "0" * 64, Path("/none"), Path("/none"), {}, "local", 250)
PID = 1 << 30  # no process has this number


async def silent_worker() -> tuple[ForkedWorker, socket.socket, int]:
    ours, theirs = socket.socketpair()
    log, log_end = os.pipe()
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    return ForkedWorker(LOAD, PID, reader, writer, log, lambda worker: None), theirs, log_end


async def asked_in_vain(worker: ForkedWorker, body: bytes = b"") -> None:
    with pytest.raises(DeadlineExceeded):
        await worker.call({"op": "infer"}, body, 0.001)


def end(worker: ForkedWorker, theirs: socket.socket, log_end: int) -> None:
    worker.buried(-9)
    theirs.close()
    os.close(log_end)


async def test_a_worker_that_never_answers_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = asyncio.get_running_loop().create_future()
    monkeypatch.setattr(workers, "HANG_S", 0.0)
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.done() or killed.set_result((pid, number)))
    worker, theirs, log_end = await silent_worker()
    with pytest.raises(TimeoutError):  # as the service gives up: by its own deadline, which is the shorter one
        async with asyncio.timeout(0.001):
            await worker.call({"op": "infer"}, b"", 60)
    async with asyncio.timeout(5):
        assert await killed == (PID, signal.SIGKILL)
    end(worker, theirs, log_end)
    await worker.stop(0)


async def test_a_worker_that_owes_answers_is_not_asked_for_ever_more() -> None:
    worker, theirs, log_end = await silent_worker()
    for _ in range(MAX_BEHIND + 3):
        await asked_in_vain(worker, b"x" * 100)
    assert worker.pending == MAX_BEHIND
    end(worker, theirs, log_end)
    await worker.stop(0)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_a_zygote_that_cannot_fork_is_out_of_reach_and_leaves_no_descriptor_behind() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.setblocking(False)
    pool = ZygoteWorkers(())
    pool._channel = ours  # as after the start of a zygote, which here is the test
    listening = asyncio.create_task(pool._listen(ours))
    before = descriptors()
    forking = asyncio.create_task(pool._fork())
    async with asyncio.timeout(5):
        number = json.loads(await asyncio.get_running_loop().sock_recv(theirs, 4096))["fork"]
        theirs.send(json.dumps({"forked": number, "error": "Resource temporarily unavailable"}).encode())
        with pytest.raises(Unreachable, match="no worker could be forked: Resource temporarily unavailable"):
            await forking
    assert descriptors() == before
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    ours.close()
    theirs.close()
