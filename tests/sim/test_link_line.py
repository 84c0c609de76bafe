"""The link on a clock that jumps: when it pings, when it leaves the tail alone, and what the workers hear of it."""

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import pytest

from edge_agent.calls import LOADING
from edge_agent.ipc import MAX_ESTIMATES, frame
from edge_agent.link import IDLE_AFTER_S, KEEP_LOOKING_S, KEEP_WARM_S, MAX_PLANS, Link
from skills import oip
from skills.wire import unpack_frame

Simulate = Callable[[Coroutine[Any, Any, Any]], Any]
PLAN = "0" * 16
INFER = {"op": "infer", "id": 1, "plan": PLAN, "cut": "c1", "codec": "u8", "deadline_us": 200_000}


class Failed(grpc.aio.AioRpcError):
    def __init__(self, code: grpc.StatusCode, trailer: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailer), details=code.name.lower())


class Call:
    """A request on its way; it ends with the tail's mood at that moment."""

    def __init__(self, tail: "Tail", timeout: float, plan: str) -> None:
        self.tail, self.timeout, self.slow = tail, timeout, plan in tail.slow

    def __await__(self) -> Any:
        return self.tail.finish(self.timeout, computes=True, slow=self.slow).__await__()

    async def trailing_metadata(self) -> list[tuple[str, str]]:
        return self.tail.says


class Tail:
    """Stands for the gRPC stub: `up` and `computes` script it, `pings` and `asked` say when it was called."""

    def __init__(self) -> None:
        self.up = self.computes = True
        self.refuses: grpc.StatusCode | None = None
        self.slow: set[str] = set()  # plans that take forever
        self.trailer: tuple[tuple[str, str], ...] = ()
        self.says = [("split-compute-us", "2000")]
        self.pings: list[float] = []
        self.asked: list[float] = []
        self.warmed: list[str] = []
        self.opened: list[float] = []

    async def close(self, grace: float) -> None:
        """Stands for the channel's too."""

    async def finish(self, limit_s: float, computes: bool = False, slow: bool = False) -> Any:
        if not self.up:
            raise Failed(grpc.StatusCode.UNAVAILABLE)
        if computes and (slow or not self.computes):
            await asyncio.sleep(limit_s)
            raise Failed(grpc.StatusCode.DEADLINE_EXCEEDED)
        if computes and self.refuses is not None:
            raise Failed(self.refuses, self.trailer)
        await asyncio.sleep(0.01)
        return oip.messages().ModelInferResponse()

    async def ServerLive(self, request: Any, timeout: float, wait_for_ready: bool = False) -> Any:  # noqa: ASYNC109, N802
        self.pings.append(asyncio.get_running_loop().time())
        return await self.finish(timeout)

    async def ModelReady(self, request: Any, timeout: float) -> Any:  # noqa: ASYNC109, N802
        self.warmed.append(request.name)
        return await self.finish(timeout)

    def ModelInfer(self, request: Any, timeout: float) -> Call:  # noqa: N802
        self.asked.append(asyncio.get_running_loop().time())
        return Call(self, timeout, request.model_name)


class Writer:
    """A worker's end of the socket: what the link says to it."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        """Stands for the socket's."""

    async def drain(self) -> None:
        """It takes everything."""

    def write(self, data: bytes) -> None:
        self.heard.append(dict(unpack_frame(data[4:], 1 << 20)[0]))


class Scripted(Link):
    """A link whose connections all lead to one scripted tail."""

    def __init__(self, tail: Tail) -> None:
        super().__init__("nowhere:1", None, clock=asyncio.get_running_loop().time, luck=lambda: 0.5)
        self.tail = tail
        self._open()

    def _open(self) -> None:
        self._channel = self._stub = self.tail
        self.tail.opened.append(self._clock())


class World:
    """A link, its scripted tail and one worker."""

    def __init__(self) -> None:
        self.tail, self.worker = Tail(), Writer()
        self.link = Scripted(self.tail)
        self.link._writers[self.worker] = 0  # type: ignore[index]
        self.link._use()
        self.warm = asyncio.create_task(self.link._keep_warm())

    def say(self, **header: Any) -> None:
        self.link._handle(self.worker, header, memoryview(b"frame"))  # type: ignore[arg-type]

    async def ask(self, **more: Any) -> dict[str, Any]:
        """Send one request and return the answer."""
        self.say(**{**INFER, **more})
        await self.answered()
        return self.worker.heard[-1] if self.worker.heard[-1]["op"] == "answer" else self.answers()[-1]

    async def answered(self) -> None:
        await asyncio.gather(*(one.task for one in self.link._calls.values()))

    def answers(self) -> list[dict[str, Any]]:
        return [one for one in self.worker.heard if one["op"] == "answer"]

    def estimates(self) -> list[dict[str, Any]]:
        return [one for one in self.worker.heard if one["op"] == "estimate"]

    def up(self) -> bool:
        return bool(self.estimates()[-1]["up"])

    async def end(self) -> None:
        self.warm.cancel()
        await asyncio.gather(self.warm, return_exceptions=True)


@pytest.fixture
def simulated(simulate: Simulate) -> Callable[[Callable[[World], Coroutine[Any, Any, None]]], None]:
    def run(story: Callable[[World], Coroutine[Any, Any, None]]) -> None:
        async def told() -> None:
            world = World()
            try:
                await story(world)
            finally:
                await world.end()

        simulate(told())

    return run


def test_a_used_connection_is_kept_warm_on_its_own_channel_and_an_unused_one_is_left_in_peace(simulated: Any) -> None:
    async def story(world: World) -> None:
        await asyncio.sleep(IDLE_AFTER_S + 20)
        gaps = [b - a for a, b in itertools.pairwise(world.tail.pings)]
        assert max(gaps) < 0.5  # TCP forgets its window after half a second
        assert min(gaps[1:]) >= KEEP_WARM_S
        assert len(world.tail.pings) == pytest.approx(IDLE_AFTER_S / (KEEP_WARM_S + 0.01), rel=0.1)
        quiet = len(world.tail.pings)
        assert (await world.ask())["ok"]
        await asyncio.sleep(1)
        assert len(world.tail.pings) > quiet

    simulated(story)


def test_while_every_request_stays_local_the_way_is_looked_at_more_rarely_and_not_at_all_without_requests(
    simulated: Any,
) -> None:
    async def story(world: World) -> None:
        await asyncio.sleep(IDLE_AFTER_S + 1)
        quiet = len(world.tail.pings)
        for _ in range(10):
            world.say(op="look")
            await asyncio.sleep(1)
        looked = len(world.tail.pings)
        assert looked - quiet == pytest.approx(10 / KEEP_LOOKING_S, rel=0.2)
        await asyncio.sleep(IDLE_AFTER_S + 1)
        quiet = len(world.tail.pings)
        await asyncio.sleep(60)
        assert len(world.tail.pings) == quiet

    simulated(story)


def test_a_worker_that_is_silent_hears_of_a_connection_that_grew_cold(simulated: Any) -> None:
    async def story(world: World) -> None:
        await asyncio.sleep(1)
        assert not world.estimates()[-1]["cold"]
        await asyncio.sleep(60)
        assert world.estimates()[-1]["cold"]
        assert (await world.ask())["ok"]
        assert not world.estimates()[-1]["cold"]
        await asyncio.sleep(10)  # a camera that asks every ten seconds plans for TCP's slow start each time
        assert world.estimates()[-1]["cold"]

    simulated(story)


def test_a_worker_that_does_not_read_is_told_no_more_than_so_many_estimates_and_the_newest_when_it_speaks(
    simulated: Any,
) -> None:
    async def story(world: World) -> None:
        await asyncio.sleep(1)
        idle = Writer()
        world.link._writers[idle] = 0  # type: ignore[index]
        for at in range(500):
            world.link._estimator.on_ping(world.link._clock() + 20 * at, 10.0 + at)
            world.link._tell_all()
        assert len(idle.heard) == MAX_ESTIMATES
        world.say(op="look")
        world.link._handle(idle, {"op": "look"}, memoryview(b""))  # type: ignore[arg-type]
        assert len(idle.heard) == MAX_ESTIMATES + 1
        assert idle.heard[-1] == world.estimates()[-1]
        assert idle.heard[-1]["rtt_ms"] == pytest.approx(world.link._estimate().rtt_ms)

    simulated(story)


def test_a_tail_that_is_gone_is_probed_on_new_connections_and_found_again_by_itself(simulated: Any) -> None:
    async def story(world: World) -> None:
        world.say(op="plan", plan=PLAN)
        await asyncio.sleep(1)
        assert world.up()
        assert len(world.tail.opened) == 1
        world.tail.up = False
        gone = asyncio.get_running_loop().time()
        await asyncio.sleep(600)
        assert not world.up()
        probes = [at for at in world.tail.pings if at > gone]
        gaps = [b - a for a, b in itertools.pairwise(probes)]
        assert gaps[1:5] == pytest.approx([0.5, 1, 1, 1], abs=0.1)
        for at, gap in zip(probes, gaps, strict=False):  # missed for a tenth of the absence at most
            assert gap <= max(1.1, 0.11 * (at + gap - gone))
        assert max(gaps) == pytest.approx(30, abs=0.5)
        assert (
            world.tail.opened[1:] == probes[2:]
        )  # TCP repeats what was lost ever more rarely, a new connection asks at once
        world.tail.up, before = True, len(world.tail.warmed)
        await asyncio.sleep(31)
        assert world.up()
        assert world.tail.warmed[before:] == [PLAN]  # it may be another process now
        assert (await world.ask())["ok"]

    simulated(story)


def test_after_an_outage_of_ten_seconds_the_tail_is_found_again_within_two(simulated: Any) -> None:
    async def story(world: World) -> None:
        await asyncio.sleep(1)
        world.tail.up = False
        await asyncio.sleep(10)
        world.tail.up = True
        await asyncio.sleep(2.1)
        assert world.up()

    simulated(story)


@pytest.mark.parametrize("silent", [False, True])
def test_many_requests_at_once_that_a_dying_tail_leaves_unanswered_are_one_absence(
    simulated: Any, silent: bool
) -> None:
    async def story(world: World) -> None:
        await asyncio.sleep(1)
        if silent:
            world.tail.computes = False
        else:
            world.tail.up = False
        for number in range(8):
            world.say(**{**INFER, "id": number})
        await world.answered()
        assert len(world.answers()) == 8
        assert not world.up()
        gone = asyncio.get_running_loop().time()
        world.tail.up, world.tail.computes = True, True
        await asyncio.sleep(0.7)
        assert next(at for at in world.tail.pings if at > gone) - gone == pytest.approx(0.5, abs=0.1)
        assert world.up()
        assert (await world.ask(id=9))["ok"]

    simulated(story)


def test_a_stock_tail_much_faster_than_the_plan_says_teaches_no_boundless_bandwidth(simulated: Any) -> None:
    async def story(world: World) -> None:
        await asyncio.sleep(1)
        world.tail.says = []
        body = memoryview(bytes(100_000))
        header = {"op": "plain", "id": 1, "plan": PLAN, "cut": "c1", "deadline_us": 200_000, "tail_ms": 90.0}
        world.link._handle(world.worker, {**header, "tensors": [["x", "UINT8", [100_000], 100_000]]}, body)  # type: ignore[arg-type]
        await world.answered()
        assert world.answers()[-1]["ok"]
        assert world.link._estimate().mbit == 0  # a probe will tell

    simulated(story)


def test_a_tail_that_answers_pings_but_no_requests_is_left_alone(simulated: Any) -> None:
    async def story(world: World) -> None:
        await asyncio.sleep(1)
        assert (await world.ask())["ok"]
        world.tail.computes = False
        tried = 0
        for number in range(600):  # a device that asks twice a second, as long as it is told that the tail is up
            if world.up():
                tried += 1
                assert (await world.ask(id=number))["kind"] == "late"
            await asyncio.sleep(0.5)
        assert tried < 20
        world.tail.computes = True
        await asyncio.sleep(40)
        assert world.up()
        assert (await world.ask())["ok"]

    simulated(story)


def test_a_tail_without_room_is_given_time(simulated: Any) -> None:
    async def story(world: World) -> None:
        await asyncio.sleep(1)
        world.tail.refuses = grpc.StatusCode.RESOURCE_EXHAUSTED
        assert [(await world.ask(id=at))["kind"] for at in (1, 2)] == ["exhausted"] * 2
        assert not world.up()
        world.tail.refuses = None
        await asyncio.sleep(1)
        assert world.up()
        assert (await world.ask())["ok"]

    simulated(story)


def test_a_refusal_for_what_was_asked_says_nothing_against_the_tail(simulated: Any) -> None:
    async def story(world: World) -> None:
        await asyncio.sleep(1)
        for code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND):
            world.tail.refuses = code
            for number in range(3):
                assert (await world.ask(id=number))["kind"] == "invalid"
        assert world.up()

    simulated(story)


def test_what_a_worker_gives_up_as_late_counts_against_the_tail_and_frees_its_place(simulated: Any) -> None:
    async def story(world: World) -> None:
        await asyncio.sleep(1)
        world.tail.computes = False
        for number in (1, 2):
            world.say(**{**INFER, "id": number, "deadline_us": 9_000_000})
            await asyncio.sleep(0.25)
            world.say(op="cancel", id=number, late=True)
        assert not world.link._calls
        assert not world.up()

    simulated(story)


def test_a_plan_that_is_being_loaded_says_nothing_for_or_against_the_tail(simulated: Any) -> None:
    async def story(world: World) -> None:
        await asyncio.sleep(1)
        world.tail.refuses, world.tail.trailer = grpc.StatusCode.UNAVAILABLE, (LOADING,)
        assert [(await world.ask(id=at))["kind"] for at in range(5)] == ["loading"] * 5
        assert world.up()
        world.tail.computes = False  # between two of them, requests that a stalled tail leaves unanswered still count
        assert (await world.ask(id=5))["kind"] == "late"
        world.tail.computes = True
        assert (await world.ask(id=6))["kind"] == "loading"
        world.tail.computes = False
        assert (await world.ask(id=7))["kind"] == "late"
        assert not world.up()

    simulated(story)


def test_a_tail_that_is_unavailable_without_loading_a_plan_is_left_alone(simulated: Any) -> None:
    async def story(world: World) -> None:
        await asyncio.sleep(1)
        world.tail.refuses, world.tail.trailer = grpc.StatusCode.UNAVAILABLE, (("split-refused", "draining"),)
        assert [(await world.ask(id=at))["kind"] for at in (1, 2)] == ["unavailable"] * 2
        assert not world.up()

    simulated(story)


@pytest.mark.parametrize("noticed", ["worker", "deadline"])
def test_a_slow_plan_closes_the_tail_to_nobody_whose_requests_are_answered(simulated: Any, noticed: str) -> None:
    async def story(world: World) -> None:
        await asyncio.sleep(1)
        slow = {**INFER, "plan": "5" * 16, "deadline_us": 9_000_000 if noticed == "worker" else 240_000}
        world.tail.slow.add(slow["plan"])
        for number in range(0, 40, 4):
            for late in (number, number + 1, number + 2):
                world.say(**{**slow, "id": late})
            await asyncio.sleep(0.1)
            world.say(**{**INFER, "id": number + 3})
            await asyncio.sleep(0.15)
            for late in (number, number + 1, number + 2):
                world.say(op="cancel", id=late, late=True)
            assert world.up()
        assert sum(one["ok"] for one in world.answers()) == 10
        world.tail.computes = False  # and now it has stalled for all
        for number in (50, 51):
            world.say(**{**INFER, "id": number, "deadline_us": 9_000_000})
            await asyncio.sleep(0.25)
            world.say(op="cancel", id=number, late=True)
        assert not world.up()

    simulated(story)


def test_plans_are_warmed_at_every_return_of_the_tail_while_a_worker_that_named_them_is_there(simulated: Any) -> None:
    async def story(world: World) -> None:
        world.say(op="plan", plan="kept")
        reader, leaver = asyncio.StreamReader(), Writer()
        for plan in ("kept", "removed"):
            reader.feed_data(frame({"op": "plan", "plan": plan}))
        visit = asyncio.create_task(world.link._worker(reader, leaver))  # type: ignore[arg-type]
        await asyncio.sleep(1)
        assert set(world.tail.warmed) == {"kept", "removed"}
        reader.feed_eof()
        await visit
        world.tail.warmed.clear()
        world.tail.up = False
        await asyncio.sleep(3)
        world.tail.up = True
        await asyncio.sleep(3)
        assert world.tail.warmed == ["kept"]

    simulated(story)


def test_more_plans_than_are_warmed_are_said_once(simulated: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def story(world: World) -> None:
        for number in range(MAX_PLANS + 2):
            world.say(op="plan", plan=f"p{number}")
        world.say(op="plan", plan="p0")
        await asyncio.sleep(1)
        assert set(world.tail.warmed) == {f"p{number}" for number in range(MAX_PLANS)}

    simulated(story)
    (line,) = [one.getMessage() for one in caplog.records if one.name == "skerry.link"]
    assert line.startswith("link.plan_not_warmed plan=p64 limit=64")


def test_a_plain_request_names_model_and_tensors_and_carries_nothing_of_ours() -> None:
    from edge_agent.calls import plain_request

    tensors = [["a", "FP32", [1, 2], 8], ["b", "UINT8", [3], 3]]
    request = plain_request({"plan": PLAN, "cut": "c1", "tensors": tensors}, b"x" * 11, 1)
    assert (request.model_name, list(request.parameters)) == (f"{PLAN}.c1", [])
    assert [(one.name, one.datatype, list(one.shape)) for one in request.inputs] == [
        ("a", "FP32", [1, 2]),
        ("b", "UINT8", [3]),
    ]
    assert list(map(len, request.raw_input_contents)) == [8, 3]
    assert plain_request({"plan": PLAN, "cut": "input", "tensors": []}, b"", 1).model_name == PLAN
    with pytest.raises(ValueError, match="longer than what came"):
        plain_request({"plan": PLAN, "cut": "c1", "tensors": tensors}, b"x" * 10, 1)
