"""A device, a broker and a controller in one process and in no time: the loop's clock jumps to whatever is due next."""

import asyncio
import dataclasses
import datetime as dt
import selectors
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from edge_agent.agent import Agent, Parts
from edge_agent.config import AgentConfig
from edge_agent.identity import Controller, Identity, IdentityFiles
from edge_agent.store import Store
from edge_agent.trust import Verdict, ask, judge
from edge_agent.workers_fake import FakeWorkers
from skills import signing, topics
from skills.bundle import BundleFile, build_bundle, open_bundle
from skills.desired import Assignment, ObjectRef, WantedSkill, open_sealed, seal
from skills.errors import DeadlineExceeded
from skills.files import sha256_hex
from skills.measurement import Order, open_order
from skills.messaging import Message, Will
from skills.mqtt_fake import FakeBroker
from skills.report import CHUNK_BYTES, Chunk, DeviceState, Hello, Need, SkillState, encode_chunk
from skills.resolve import Capabilities
from skills.wire import decode_json, pack_frame, unpack_frame

DEVICE = "board-1"
NOW = dt.datetime(2026, 11, 21, tzinfo=dt.UTC)
MANIFEST = """\
name: {name}
version: {version}
inputs: [{{name: x, dtype: FP32, shape: [-1, 4]}}]
outputs: [{{name: y, dtype: FP32, shape: [-1, 2]}}]
models:
  net:
    variants:
      - {{name: int8, runtime: onnxruntime, file: models/net.onnx, ram_mb: {ram_mb}}}
stages: [{{name: classify, model: net, code: classify.py}}]
"""
CODE = "def classify(inputs, model):\n    return model(x=inputs['x'])\n"


class _Jumping(selectors.DefaultSelector):
    """Never waits: what the loop would have slept is added to its clock."""

    def __init__(self) -> None:
        super().__init__()
        self.slept_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("everything waits for something that can never come")
        if not ready and timeout:
            self.slept_s += timeout
        return ready


class JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return 1000.0 + self._jumping.slept_s


@pytest.fixture
def simulate() -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Run a coroutine on a loop whose clock jumps."""

    def run(work: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=JumpingLoop) as runner:
            return runner.run(work)

    return run


async def inline(work: Callable[..., Any], *arguments: Any) -> Any:
    return work(*arguments)


async def _nowhere() -> None:
    """Connect to nobody."""


class InlineTrust:
    """The real judgement, without the process."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self.asked = 0

    async def open(self, envelope: bytes, device: str, last: Assignment | None) -> Assignment:
        pem = (self._data / "identity/director.pem").read_bytes()
        return open_sealed(envelope, pem, device, last)

    async def open_order(self, envelope: bytes, device: str) -> Order:
        return open_order(envelope, (self._data / "identity/director.pem").read_bytes(), device)

    async def judge(self, wanted: WantedSkill, metadata: ObjectRef, time: int) -> Verdict:
        self.asked += 1
        return judge(ask(self._data, wanted, metadata, time))


class FakeController:
    """A controller in memory that can be told to lie: signs, assigns, gives chunks, reads reports."""

    def __init__(self, broker: FakeBroker, tmp: Path) -> None:
        self.broker, self._tmp = broker, tmp
        self.root_key, self.publisher, self.online, self.director = (signing.new_key() for _ in range(4))
        self.root = signing.new_root(self.root_key, self.publisher, self.online, NOW)
        self.targets = signing.new_targets(self.publisher, NOW)
        self.objects: dict[str, bytes] = {}
        self.releases: dict[tuple[str, str], WantedSkill] = {}
        self.bundles: dict[tuple[str, str], BundleFile] = {}
        self.wanted: tuple[WantedSkill, ...] = ()
        self.counter, self.version, self.time = 0, 0, int(NOW.timestamp())
        self.answers_nonce = True
        self.nonce = ""
        self.hellos: list[Hello] = []
        self.reports: list[DeviceState] = []
        self.needs: list[Need] = []
        self.sent_bytes = 0
        self.results: dict[str, tuple[dict[str, Any], bytes]] = {}
        self.mqtt = broker.client("controller")
        self.refresh()

    # --- releases ---------------------------------------------------------------------------------

    def release(self, name: str = "digits", version: str = "1.0.0", *, weights: bytes = b"w" * 200_000, ram_mb: int = 8,
                key: Any = None) -> str:  # fmt: skip
        """Build, sign and publish a version; returns its digest."""
        folder = self._tmp / f"{name}-{version}"
        (folder / "models").mkdir(parents=True)
        (folder / "skill.yaml").write_text(MANIFEST.format(name=name, version=version, ram_mb=ram_mb))
        (folder / "classify.py").write_text(CODE)
        (folder / "models/net.onnx").write_bytes(weights)
        (folder / "probe.npz").write_bytes(b"not read by fakes")
        build_bundle(folder, self._tmp / f"{name}-{version}.skb")
        file = open_bundle(self._tmp / f"{name}-{version}.skb")
        self.bundles[name, version] = file
        self.objects.update(file.objects)
        self.objects[file.digest] = file.manifest_bytes
        ref = ObjectRef(file.digest, len(file.manifest_bytes))
        target = signing.release_target(name, version)
        self.targets = signing.add_release(self.targets, target, ref, key or self.publisher, NOW)
        self.releases[name, version] = WantedSkill(name, version, target, ref)
        self.refresh()
        return file.digest

    def refresh(self, now: dt.datetime = NOW) -> None:
        """Sign snapshot and timestamp anew."""
        self.version += 1
        snapshot, timestamp = signing.sign_online(self.targets, self.version, self.online, now)
        packed = signing.pack_metadata({1: self.root}, timestamp, snapshot, self.targets)
        self.metadata = ObjectRef(sha256_hex(packed), len(packed))
        self.objects[self.metadata.sha256] = packed

    def assign(self, *releases: tuple[str, str]) -> None:
        """Want these versions from now on."""
        self.wanted = tuple(self.releases[release] for release in releases)
        self.counter += 1
        self.tell()

    def assignment(self) -> Assignment:
        nonce = self.nonce if self.answers_nonce else "another"
        return Assignment(DEVICE, self.counter, self.time, self.metadata, self.wanted, nonce)

    def tell(self) -> None:
        sealed = seal(self.assignment(), self.director)
        self.mqtt.publish(topics.down(DEVICE, "desired"), sealed, retain=True)

    # --- talking ----------------------------------------------------------------------------------

    async def run(self) -> None:
        self.mqtt.subscribe((topics.CONTROLLER_FILTER,))
        await self.mqtt.start()
        while True:
            try:
                event = await self.mqtt.next(3600)
            except DeadlineExceeded:
                continue
            if isinstance(event, Message):
                self.hear(event)

    def hear(self, message: Message) -> None:
        _, kind = topics.parse_up(message.topic)
        match kind:
            case "hello":
                self.hellos.append(decode_json(Hello, message.payload, "hello"))
                self.nonce = self.hellos[-1].nonce
                self.tell()
            case "state" if message.payload:
                self.reports.append(decode_json(DeviceState, message.payload, "state"))
            case "need":
                self.give(decode_json(Need, message.payload, "need"))
            case "res":
                header, body = unpack_frame(message.payload, 1 << 20)
                self.results[header["id"]] = (header, bytes(body))

    def give(self, need: Need) -> None:
        self.needs.append(need)
        content = self.objects.get(need.sha256)
        for first, last in need.ranges:
            for index in range(first, last):
                if content is None:
                    chunk = Chunk(need.transfer, index, b"no such object", gone=True)
                else:
                    chunk = Chunk(need.transfer, index, content[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])
                    self.sent_bytes += len(chunk.data)
                self.mqtt.publish(topics.down(DEVICE, "blk"), encode_chunk(chunk), qos=0)

    def command(self, number: str, body: bytes = b"", **header: Any) -> None:
        self.mqtt.publish(topics.down(DEVICE, "cmd"), pack_frame({"id": number, **header}, body))


@dataclasses.dataclass
class World:
    """A device and its controller."""

    data: Path
    broker: FakeBroker
    controller: FakeController
    config: AgentConfig
    capabilities: Capabilities
    workers: FakeWorkers = dataclasses.field(default_factory=FakeWorkers)
    agent: Agent | None = None
    _tasks: list[asyncio.Task[None]] = dataclasses.field(default_factory=list)

    async def start_controller(self) -> None:
        self._tasks.append(asyncio.create_task(self.controller.run()))
        await asyncio.sleep(0.1)

    async def boot(self, *, network: bool = True) -> Agent:
        """Start the device (again), as after power-on."""
        files = IdentityFiles(self.data / "identity")
        files.folder.mkdir(parents=True, exist_ok=True)
        files.root.write_bytes(self.controller.root)
        files.director.write_bytes(signing.public_pem(self.controller.director))
        identity = Identity(files, Controller(DEVICE, "https://c", "mqtt://b"))
        self.workers = FakeWorkers() if self.agent is not None else self.workers
        mqtt = self.broker.client(DEVICE, Will(topics.up(DEVICE, "state"), b""))
        if not network:
            mqtt.start = _nowhere  # type: ignore[method-assign]
        parts = Parts(
            store=Store(self.data),
            mqtt=mqtt,
            workers=self.workers,
            trust=InlineTrust(self.data),
            capabilities=lambda: self.capabilities,
            offload=inline,
            chance=lambda: 0.5,
        )
        self.agent = Agent(self.data, identity, self.config, parts)
        await self.agent.start()
        return self.agent

    async def power_cut(self) -> None:
        """End the device without a word to anybody."""
        assert self.agent is not None
        for task in self.agent._tasks:
            task.cancel()
        await asyncio.gather(*self.agent._tasks, return_exceptions=True)
        await self.agent.endpoint.stop()
        self.agent._usage.close()
        self.broker.cut(DEVICE)
        self.controller.reports.clear()

    def state(self, skill: str, digest: str) -> SkillState | None:
        """Return what the controller last heard of a version."""
        return self.controller.reports[-1].of(skill, digest) if self.controller.reports else None

    async def until(self, met: Callable[[], Any], seconds: float = 900.0) -> None:
        """Let time pass until something holds."""
        end = asyncio.get_running_loop().time() + seconds
        while not met():
            if asyncio.get_running_loop().time() > end:
                raise AssertionError(f"not within {seconds} s; last report: {self.controller.reports[-1:]}")
            await asyncio.sleep(0.05)

    async def serving(self, digest: str, skill: str = "digits") -> SkillState:
        """Let time pass until a version serves."""
        await self.until(lambda: (s := self.state(skill, digest)) is not None and s.phase == "serving")
        state = self.state(skill, digest)
        assert state is not None
        return state

    async def settled(self, digest: str, skill: str = "digits") -> SkillState:
        """Let time pass until a version serves or is given up."""
        await self.until(
            lambda: (s := self.state(skill, digest)) is not None and s.phase in ("serving", "refused", "failed")
        )
        state = self.state(skill, digest)
        assert state is not None
        return state

    async def close(self) -> None:
        if self.agent is not None:
            await self.agent.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@pytest.fixture
def scene(tmp_path: Path, simulate: Callable[[Coroutine[Any, Any, Any]], Any]) -> Callable[..., Any]:
    """Play a story `async def story(world)` with a running controller and a device that is off."""

    def play(story: Callable[[World], Awaitable[Any]], config: AgentConfig | None = None, ram_mb: int = 64) -> Any:
        async def played() -> Any:
            broker = FakeBroker()
            source = tmp_path / "source"
            source.mkdir()
            data = tmp_path / "device"
            data.mkdir()
            capable = Capabilities("x86_64", ram_mb, 1000, "0.1.0", runtimes={"onnxruntime": "1.31.1"})
            settings = config or AgentConfig(listen="127.0.0.1:0")
            world = World(data, broker, FakeController(broker, source), settings, capable)
            await world.start_controller()
            try:
                return await story(world)
            finally:
                await world.close()

        return simulate(played())

    return play
