"""The link process: the device's only channel to its tail, shared by all workers.

    python -m edge_agent.link --socket PATH --target HOST:PORT [--tls DIR]

DIR holds ca.pem, cert.pem and key.pem. Workers connect to the Unix socket and speak frames (edge_agent/ipc.py):
  to the link    infer  {id, plan, cut, codec, reply?, deadline_us} + activation frame · cancel {id, late}
                 plan   {plan}: have it warmed, now and at every return of the tail, while this connection lasts
                 plain  {id, plan, cut, tensors: [[name, datatype, shape, bytes]…], tail_ms, deadline_us} + raw tensors: for
                 stock servers, which know neither frames nor say how long they took; `tail_ms` is what the plan says
                 look {}: a request looked at the estimate and may stay local
  to the worker  answer {id, ok, outputs: [[name, datatype, shape, bytes]…]} + raw tensors, or {id, ok: false, kind, error};
                 with `reply` where the one tensor is a frame in the coding that was asked for
                 estimate {mbit, rtt_ms, up, cold, queue_ms}: at once, and whenever it has changed; a worker that said nothing
                 during ipc.MAX_ESTIMATES of them hears the newest when it speaks again
While anybody used it in the last five seconds it keeps the connection warm with tiny calls on the same channel: TCP starts
slowly again after half a second of silence, which costs more than a plan gains. While every request stays local it goes on more
rarely, to notice when the way to the tail is another one.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from edge_agent import calls, ipc
from edge_agent.estimator import COLD_AFTER_S, Breaker, Estimator
from skills import oip
from skills.errors import FormatError, SkerryError, Unreachable
from skills.split import CALL_BYTES, Estimate

KEEP_WARM_S = 0.15
KEEP_LOOKING_S = 0.5  # between two calls while every request stays local: is the way there another one now?
IDLE_AFTER_S = 5.0
PING_DEADLINE_S = 1.0
MAX_IN_FLIGHT = 32
MAX_PLANS = 64  # of all workers; what is beyond is loaded with its first request
PROBE = {"plan": "probe", "cut": "probe", "codec": "probe"}
PROBE_BYTES = 16_384
PROBE_DEADLINE_US = 5_000_000
WARM_DEADLINE_S = 30.0
LOG = logging.getLogger("skerry.link")


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    """A request on its way, and when it was sent."""

    task: asyncio.Task[None]
    sent_s: float


class Link:
    """One gRPC channel, its estimator and its breaker; workers come and go."""

    def __init__(
        self,
        target: str,
        tls: Path | None,
        clock: Callable[[], float] = time.monotonic,
        luck: Callable[[], float] = random.random,
    ) -> None:
        self._target, self._tls, self._clock, self._luck = target, tls, clock, luck
        self._estimator, self._breaker = Estimator(), Breaker()
        self._writers: dict[asyncio.StreamWriter, int] = {}  # how many estimates each was told since it last spoke
        self._calls: dict[tuple[int, int], _Call] = {}
        self._last_use_s = self._last_look_s = self._answered_s = float("-inf")
        self._used = asyncio.Event()
        self._told: tuple[object, ...] = ()
        self._connected_once = False
        self._plans: dict[asyncio.StreamWriter, set[str]] = {}
        self._full_told = False
        self._probing = False
        self._workers: set[asyncio.Task[Any]] = set()
        self._channel: Any = None
        self._stub: Any = None

    async def serve(self, path: Path, stop: asyncio.Event) -> None:
        """Listen on the Unix socket until `stop`.

        Raises:
            Unreachable: the socket cannot be made.
            NotFound: a TLS file is missing.
        """
        self._open()
        try:
            server = await asyncio.start_unix_server(self._worker, _unnamed(path), limit=1 << 20)
        except OSError as error:
            raise Unreachable(f"cannot listen on {path}: {error.strerror or error}") from None
        _name(path)
        warm = asyncio.create_task(self._keep_warm(), name="keep-warm")
        try:
            await stop.wait()
        finally:
            warm.cancel()
            server.close()
            tasks = [warm, *(call.task for call in self._calls.values())]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for writer in list(self._writers):
                writer.close()
            if self._workers:
                await asyncio.wait(self._workers, timeout=1)
            await self._channel.close()
            _remove(path)

    def _open(self) -> None:
        self._channel = calls.channel(self._target, self._tls)
        self._stub = oip.service().GRPCInferenceServiceStub(self._channel)

    def _reopen(self) -> None:
        """Try the next probe on a new connection: on the old one TCP repeats what was lost ever more rarely, and nothing else."""
        old = self._channel
        self._open()
        self._background(old.close(PING_DEADLINE_S), "close")

    def _background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._workers.add(task)
        task.add_done_callback(self._workers.discard)

    async def _worker(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._workers.add(task)
            task.add_done_callback(self._workers.discard)
        self._writers[writer] = 0
        self._use()
        self._tell(writer)
        try:
            while (message := await ipc.read(reader)) is not None:
                header, body = message
                self._handle(writer, header, body)
                await writer.drain()
        except (FormatError, ConnectionError):
            pass  # a worker that speaks nonsense or is gone loses its connection, the others keep theirs
        finally:
            self._writers.pop(writer, None)
            self._plans.pop(writer, None)
            for key in [key for key in self._calls if key[0] == id(writer)]:
                self._calls.pop(key).task.cancel()
            writer.close()

    def _handle(self, writer: asyncio.StreamWriter, header: Mapping[str, Any], body: memoryview) -> None:
        op, number = header.get("op"), header.get("id")
        told, self._writers[writer] = self._writers[writer], 0
        if told >= ipc.MAX_ESTIMATES:
            self._tell(writer)
        if op == "look":
            self._last_look_s = self._clock()
            self._used.set()
            self._start_probe()
            return
        self._use()
        if op in ("infer", "plain") and type(number) is int:
            key = id(writer), number
            if len(self._calls) >= MAX_IN_FLIGHT:
                self._refuse(writer, number, "exhausted", f"{MAX_IN_FLIGHT} requests are on their way already")
                return
            task = asyncio.create_task(self._infer(writer, number, header, bytes(body)), name=f"infer-{number}")
            self._calls[key] = _Call(task, self._clock())
            task.add_done_callback(lambda _: self._calls.pop(key, None))
        elif op == "plan":
            self._prepare(writer, str(header.get("plan"))[:64])
        elif op == "cancel" and type(number) is int:
            call = self._calls.pop((id(writer), number), None)
            if call is not None:
                call.task.cancel()
                if header.get("late") is True:
                    self._late(call.sent_s)

    def _prepare(self, writer: asyncio.StreamWriter, plan: str) -> None:
        known = self._in_use()
        if plan not in known and len(known) >= MAX_PLANS:
            what = "'the tail loads it with its first request'"
            LOG.log(
                logging.DEBUG if self._full_told else logging.WARNING,
                "link.plan_not_warmed plan=%s limit=%s what=%s", plan, MAX_PLANS, what,
            )  # fmt: skip
            self._full_told = True
            return
        self._plans.setdefault(writer, set()).add(plan)
        self._start_warming({plan})

    def _in_use(self) -> set[str]:
        """Return the plans that the workers who are connected have named."""
        return set().union(*self._plans.values())

    def _start_probe(self) -> None:
        """Learn the bandwidth while every skill stays local, or none of them would ever find out that the link is better now."""
        now = self._clock()
        if self._probing or not self._connected_once or self._breaker.open or not self._estimator.wants_probe(now):
            return
        self._probing = True
        self._background(self._probe(), "probe")

    async def _probe(self) -> None:
        """Send two requests to a model that no tail has: the first one warms the connection, the second one is timed."""
        import grpc

        began = start = self._clock()
        try:
            await self._ping()
            for _ in range(2):
                start = self._clock()
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await self._stub.ModelInfer(
                        calls.request(PROBE, bytes(PROBE_BYTES), PROBE_DEADLINE_US), timeout=PROBE_DEADLINE_US / 1e6
                    )
            now = self._clock()
            if now - start < PROBE_DEADLINE_US / 1e6:
                self._estimator.on_transfer(now, PROBE_BYTES + CALL_BYTES, (now - start) * 1e3, 0.0)
                self._tell_all()
        finally:
            self._estimator.on_probe(self._clock(), self._clock() - began)
            self._probing = False

    def _start_warming(self, plans: AbstractSet[str]) -> None:
        """Have the tail load plans before a request needs them; one that it does not know shows in the request."""

        async def warm(name: str) -> None:
            import grpc

            with contextlib.suppress(grpc.aio.AioRpcError):
                await self._stub.ModelReady(oip.messages().ModelReadyRequest(name=name), timeout=WARM_DEADLINE_S)

        if self._connected_once and not self._breaker.open:
            for name in plans:
                self._background(warm(name), f"warm-{name}")

    async def _infer(self, writer: asyncio.StreamWriter, number: int, header: Mapping[str, Any], frame: bytes) -> None:
        import grpc

        start = self._clock()
        cold, alone = self._estimator.now(start, up=True).cold, len(self._calls) <= 1 and not self._probing
        try:
            deadline_us = int(header["deadline_us"])
            request = (calls.plain_request if header["op"] == "plain" else calls.request)(header, frame, deadline_us)
        except (KeyError, TypeError, ValueError) as error:
            self._refuse(writer, number, "invalid", f"a worker's request lacks something: {error!r}")
            return
        self._estimator.on_traffic(start)
        try:
            call = self._stub.ModelInfer(request, timeout=deadline_us / 1e6)
            response = await call
            times = {
                key: float(value) / 1e3
                for key, value in await call.trailing_metadata()
                if key.startswith("split-") and str(value).isdigit()
            }
        except grpc.aio.AioRpcError as error:
            kind = calls.kind(error)
            if kind == "late":
                self._late(start)
            elif kind in ("unavailable", "exhausted"):
                self._missed()
            elif kind != "loading":  # that says nothing of whether the tail computes
                self._answered()
            self._refuse(writer, number, kind, f"the tail: {error.details() or error.code().name.lower()}")
            return
        now = self._clock()
        queue_ms = times.get("split-queue-us", 0.0)
        tail_ms = sum(times.values()) if times else calls.assumed_ms(header)
        moved = len(frame) + sum(map(len, response.raw_output_contents)) + CALL_BYTES
        took_ms = (now - start) * 1e3
        alone = alone and len(self._calls) <= 1 and not self._probing
        self._estimator.on_transfer(now, moved, took_ms, tail_ms, queue_ms, cold=cold, guessed=not times, alone=alone)
        self._answered()
        if len(response.outputs) != len(response.raw_output_contents):
            response = calls.raw(response)
        if response is None:
            self._refuse(writer, number, "invalid", "the tail's answer is not what the protocol says")
            return
        outputs = [
            [one.name, one.datatype, list(one.shape), len(raw)]
            for one, raw in zip(response.outputs, response.raw_output_contents, strict=True)
        ]
        answer = {"op": "answer", "id": number, "ok": True, "outputs": outputs, "tail_ms": round(tail_ms, 3)}
        if "split.reply" in response.parameters:
            answer["reply"] = response.parameters["split.reply"].string_param
        self._send(writer, answer, b"".join(response.raw_output_contents))

    async def _keep_warm(self) -> None:
        """Ping while somebody uses the link; while the breaker is open, probe at its pace instead."""
        while True:
            now = self._clock()
            if self._breaker.probe_at_s is not None:
                await asyncio.sleep(max(0.0, self._breaker.probe_at_s - now))
            elif now - max(self._last_use_s, self._last_look_s) > IDLE_AFTER_S:
                self._used.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._used.wait(), COLD_AFTER_S + KEEP_WARM_S)
                self._tell_all()  # the connection is cold now, and the next request must know
                await self._used.wait()
            elif now - self._last_use_s > IDLE_AFTER_S:
                await asyncio.sleep(KEEP_LOOKING_S)
            else:
                await asyncio.sleep(KEEP_WARM_S if self._connected_once else 0)
            probe_at = self._breaker.probe_at_s
            if probe_at is None or self._clock() >= probe_at:  # it may have opened meanwhile
                if self._breaker.open and self._breaker.silences:
                    self._reopen()
                await self._ping()

    async def _ping(self) -> None:
        import grpc

        start, probing = self._clock(), self._breaker.open
        alone = not self._calls and not self._probing
        try:
            await self._stub.ServerLive(
                oip.messages().ServerLiveRequest(), timeout=PING_DEADLINE_S, wait_for_ready=not self._connected_once
            )
        except grpc.aio.AioRpcError:
            self._missed(ping=True)
            return
        now = self._clock()
        if self._breaker.open and not probing:
            return  # sent before requests went unanswered: it says nothing of now
        if self._connected_once and not self._breaker.open:
            self._estimator.on_ping(now, (now - start) * 1e3, alone=alone and not self._calls)
        # The first one after an absence paid for TCP and TLS: its time says nothing, and the tail may be another process.
        returned = not self._connected_once or self._breaker.open
        self._connected_once = True
        self._breaker.on_ping(now)
        self._tell_all()
        if returned:
            self._estimator.on_return()
            self._start_warming(self._in_use())

    def _use(self) -> None:
        self._last_use_s = self._clock()
        self._used.set()

    def _missed(self, *, ping: bool = False) -> None:
        self._breaker.on_miss(self._clock(), self._luck(), ping=ping)
        self._tell_all()

    def _late(self, sent_s: float) -> None:
        """Count a request that took too long, unless the tail answered another one meanwhile: then only this plan is slow."""
        if self._answered_s <= sent_s:
            self._missed()

    def _answered(self) -> None:
        self._answered_s = self._clock()
        self._breaker.on_success()
        self._tell_all()

    def _estimate(self) -> Estimate:
        return self._estimator.now(self._clock(), up=self._connected_once and not self._breaker.open)

    def _tell_all(self) -> None:
        estimate = self._estimate()
        # Two digits are all that a decision can use; without rounding every ping would be news.
        told = (
            estimate.up,
            estimate.cold,
            *(float(f"{value:.2g}") for value in (estimate.mbit, estimate.rtt_ms, estimate.queue_ms)),
        )
        if told != self._told:
            self._told = told
            for writer in self._writers:
                self._tell(writer)

    def _tell(self, writer: asyncio.StreamWriter) -> None:
        """Tell a worker the estimate, unless it has heard so many in silence that it may be reading none."""
        if self._writers[writer] >= ipc.MAX_ESTIMATES:
            return
        self._writers[writer] += 1
        now = self._estimate()
        self._send(
            writer,
            {
                "op": "estimate",
                "mbit": now.mbit,
                "rtt_ms": now.rtt_ms,
                "up": now.up,
                "cold": now.cold,
                "queue_ms": now.queue_ms,
            },
        )

    def _refuse(self, writer: asyncio.StreamWriter, number: int, kind: str, error: str) -> None:
        self._send(writer, {"op": "answer", "id": number, "ok": False, "kind": kind, "error": error[:1000]})

    def _send(self, writer: asyncio.StreamWriter, header: Mapping[str, object], body: bytes = b"") -> None:
        if not writer.is_closing():
            writer.write(ipc.frame(header, body))


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _unnamed(path: Path) -> Path:
    """Return where a socket is made: who sees it under its own name may connect."""
    unnamed = path.with_name(f"{path.name}~")
    unnamed.unlink(missing_ok=True)
    return unnamed


def _name(path: Path) -> None:
    """Give a socket that listens its own name, for nobody but us; a name left by a dead process is taken over."""
    unnamed = path.with_name(f"{path.name}~")
    unnamed.chmod(0o600)
    unnamed.replace(path)


async def _run(link: Link, socket: Path, with_parent: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if with_parent:
        loop.add_reader(0, lambda: stop.set() if not os.read(0, 4096) else None)
    await link.serve(socket, stop)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m edge_agent.link", description="Hold the device's only channel to its tail."
    )
    parser.add_argument("--socket", type=Path, required=True, metavar="PATH", help="Unix socket for the workers")
    parser.add_argument("--target", required=True, metavar="HOST:PORT", help="where the tail listens")
    parser.add_argument(
        "--tls",
        type=Path,
        metavar="DIR",
        help="folder with ca.pem, cert.pem and key.pem; without it: plain, for loopback only",
    )
    parser.add_argument("--with-parent", action="store_true", help="end when standard input is closed")
    chosen = parser.parse_args(argv)
    try:
        asyncio.run(_run(Link(chosen.target, chosen.tls), chosen.socket, chosen.with_parent))
    except SkerryError as error:
        print(f"link: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
