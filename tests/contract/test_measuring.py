"""The fake device and a real agent (own trust process, own worker) measure a work that a real controller orders."""

import asyncio
import dataclasses
import itertools
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from cloud.authority import Authority
from cloud.broker import Broker
from cloud.config import Ports, Settings
from cloud.controller import Controller
from cloud.device_fake import FakeDevice
from cloud.journal import open_journal
from cloud.split import split
from cloud.split.check import check_plan
from cloud.split.live import LiveDevice, packed
from cloud.split.segment import Pieces
from cloud.views import MeasureView, view
from edge_agent.agent import Agent, Parts
from edge_agent.capabilities import capabilities
from edge_agent.config import AgentConfig
from edge_agent.identity import Controller as Home
from edge_agent.identity import Identity, IdentityFiles
from edge_agent.store import Store
from edge_agent.trust import TrustProcess
from edge_agent.workers import ZygoteWorkers
from skills.coding import Live
from skills.desired import ObjectRef
from skills.errors import DeadlineExceeded, NotFound, Refused, SkerryError, TrustError, Unreachable
from skills.files import sha256_hex
from skills.measurement import Figures, Order, Work, seal_order
from skills.mqtt_fake import FakeBroker
from skills.split_plan import Segment, load_plan
from skills.wire import encode_json

NAME = "cam-1"


@dataclasses.dataclass
class Bridge:
    """The controller's API, for a planner in a thread of its own."""

    controller: Controller
    loop: asyncio.AbstractEventLoop
    lent: list[str] = dataclasses.field(default_factory=list)

    def lend_object(self, sha256: str, data: bytes) -> None:
        async def body() -> AsyncIterator[bytes]:
            yield data

        self.lent.append(sha256)
        self._wait(self.controller.registry.put(sha256, body(), lent=True))

    def measure(self, device: str, work: str) -> MeasureView:
        return view(MeasureView, self._wait(self.controller.measuring.ask(device, work, 20)), "the measurement")

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)


class Scene:
    """A controller with one device of either kind."""

    def __init__(self, tmp: Path) -> None:
        self.tmp, self.broker = tmp, FakeBroker()
        self.controller = Controller(
            Settings(data=tmp / "data"), Ports(), Broker("amqtt", "127.0.0.1", 1), Authority(tmp / "data" / "ca", ()),
            self.broker.client("controller"), open_journal(None),
        )  # fmt: skip
        self.device: FakeDevice | None = None
        self.ends: list[Callable[[], Awaitable[None]]] = []

    async def join(self, kind: str, csr: str, config: AgentConfig | None = None) -> LiveDevice:
        await self.controller.start()
        token = self.controller.fleet.invite("https://x", {}, 60).token()
        self.controller.fleet.enroll(token, csr, NAME)
        await (self._fake() if kind == "fake" else self._agent(config or AgentConfig(listen="127.0.0.1:0")))
        async with asyncio.timeout(20):
            while self.controller.fleet.device(NAME).hello is None:  # noqa: ASYNC110 - the hello comes by the broker
                await asyncio.sleep(0.01)
        return LiveDevice(NAME, Bridge(self.controller, asyncio.get_running_loop()), 512.0)

    async def _fake(self) -> None:
        self.device = FakeDevice(NAME, self.broker.client(NAME), self.controller.registry.director_pem)
        task = asyncio.create_task(self.device.run())

        async def end() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self.ends.append(end)

    async def _agent(self, config: AgentConfig) -> None:
        data = self.tmp / "device"
        files = IdentityFiles(data / "identity")
        files.folder.mkdir(parents=True)
        files.root.write_bytes(self.controller.registry.root_bytes)
        files.director.write_bytes(self.controller.registry.director_pem)
        parts = Parts(
            store=Store(data), mqtt=self.broker.client(NAME), workers=ZygoteWorkers(config.runtimes),
            trust=TrustProcess(data), capabilities=lambda: capabilities(config),
        )  # fmt: skip
        agent = Agent(data, Identity(files, Home(NAME, "https://c", "mqtt://b")), config, parts)
        await agent.start()
        self.ends.append(agent.stop)

    async def close(self) -> None:
        for end in self.ends:
            await end()
        await self.controller.stop()

    def left_over(self) -> list[Path]:
        """What should be gone when a measurement has ended, on either side."""
        return [*(self.tmp / "data" / "lent").iterdir(), *self.tmp.glob("device/measure")]


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    await scene.close()


def pieces_of(folder: Path) -> Pieces:
    plan = load_plan((folder / "split.yaml").read_text())
    cuts = sorted((cut for cut in plan.cuts if cut.name != "local"), key=lambda cut: cut.after)
    return Pieces(plan.segments, plan.shared, tuple(cut.tensors for cut in cuts), plan.outputs)


def codings_of(folder: Path) -> list[Any]:
    plan = load_plan((folder / "split.yaml").read_text())
    return [cut.codings for cut in sorted(plan.cuts, key=lambda cut: cut.after) if cut.name != "local"]


async def measured(device: LiveDevice, planned: Any, rounds: int = 3) -> Figures:
    samples = [{"x": planned.x[at : at + 1]} for at in range(4)]
    return await asyncio.to_thread(
        device.figures, planned.folder, pieces_of(planned.folder), samples, codings_of(planned.folder), rounds,
        lambda stage, done, of: None,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["fake", "agent"])
async def test_a_device_measures_every_head_and_coding_and_nothing_of_it_stays(
    kind: str, scene: Scene, csr: Callable[[], str], planned_net: Any
) -> None:
    device = await scene.join(kind, csr())
    figures = await measured(device, planned_net)
    segments = len(pieces_of(planned_net.folder).segments)
    assert len(figures.heads) == segments + 1
    assert 0 <= figures.heads[0].p50 < figures.heads[-1].p50 <= figures.heads[-1].p90
    assert [len(row) for row in figures.encode_ms] == [len(row) for row in codings_of(planned_net.folder)]
    assert all(ms > 0 for row in figures.encode_ms for ms in row)
    assert list(figures.memory_mb) == sorted(figures.memory_mb)
    assert (figures.cores > 0, bool(figures.machine), "onnxruntime" in figures.runtime) == (True, True, True)
    assert scene.left_over() == []
    assert isinstance(device.door, Bridge)
    frames = [scene.controller.delivery._frame(NAME, 7, name, 0) for name in device.door.lent]
    assert all(b"names no object" in frame for frame in frames)
    kinds = [event.kind for event in scene.controller.fleet.events(100)]
    assert kinds.count("device.measuring") == 1


@pytest.mark.parametrize("kind", ["fake", "agent"])
async def test_an_order_for_another_device_or_of_another_key_is_not_obeyed(
    kind: str, scene: Scene, csr: Callable[[], str]
) -> None:
    from skills import signing

    await scene.join(kind, csr())
    work, keys = ObjectRef("0" * 64, 100), scene.controller.registry.keys
    for order in (seal_order(Order("cam-2", work), keys.director), seal_order(Order(NAME, work), signing.new_key())):
        with pytest.raises(TrustError, match="for the device 'cam-2'|is not signed by this device's controller"):
            await scene.controller.delivery.relay(NAME, "measure", {}, order, 20)


@pytest.mark.parametrize("kind", ["fake", "agent"])
async def test_what_was_not_lent_cannot_be_measured(kind: str, scene: Scene, csr: Callable[[], str]) -> None:
    await scene.join(kind, csr())
    order = seal_order(Order(NAME, ObjectRef("0" * 64, 100)), scene.controller.registry.keys.director)
    with pytest.raises(SkerryError, match="names no object"):
        await scene.controller.delivery.relay(NAME, "measure", {}, order, 20)
    assert scene.left_over() == []


async def test_a_plan_of_a_live_device_holds_its_times_and_says_so(
    scene: Scene, csr: Callable[[], str], planned_net: Any, tmp_path: Path
) -> None:
    device = await scene.join("agent", csr(), AgentConfig(listen="127.0.0.1:0", timer="dilated(30)"))
    report = await asyncio.to_thread(
        split, planned_net.model, {"x": planned_net.x}, out=tmp_path / "out", rounds=15, most_samples=8, most_gate=16,
        device=device, memory_mb=device.memory_mb,
    )  # fmt: skip
    plan = report.plan
    assert plan.device == NAME
    assert 10 < plan.slowdown < 100  # as its agent.yaml has it, give or take a busy machine
    local = plan.cut("local").device_ms.p50
    assert local == pytest.approx(plan.slowdown * report.details["chain_ms_here"]["p50"], rel=0.01)
    assert local > 5 * plan.cut("input").tail_ms.p50
    assert plan.cut("local").memory_mb > 0
    assert check_plan(tmp_path / "out").faults == ()
    told = json.loads((tmp_path / "out" / "report.json").read_text())["device"]
    assert told["measured"] == "the enrolled device cam-1, by its own agent"
    assert told["cores"] > 0
    assert "measured on cam-1" in (tmp_path / "out" / "report.html").read_text()
    assert "\ndevice: cam-1\n" in (tmp_path / "out" / "split.yaml").read_text()
    assert scene.left_over() == []


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (AgentConfig(listen="127.0.0.1:0", runtimes=("litert",)), "cannot measure a model: it offers no onnxruntime"),
        (AgentConfig(listen="127.0.0.1:0", disk_mb=1), "no room to measure this model: it needs .* of disk"),
        (AgentConfig(listen="127.0.0.1:0", memory_mb=1), "of the memory that is offered \\(memory_mb\\) are left"),
        (AgentConfig(listen="127.0.0.1:0", memory_mb=6), "need more memory than the 6 MiB that the device has left"),
    ],
)
async def test_a_device_that_cannot_says_why_in_one_sentence(
    config: AgentConfig, sentence: str, scene: Scene, csr: Callable[[], str], tmp_path: Path
) -> None:
    device = await scene.join("agent", csr(), config)
    pieces, sample = heavy(tmp_path)
    with pytest.raises(Refused, match=sentence):
        await asyncio.to_thread(device.figures, tmp_path, pieces, [sample], [()], 2, lambda stage, done, of: None)
    assert scene.left_over() == []


async def test_a_device_that_cannot_measure_leaves_no_plan_behind(
    scene: Scene, csr: Callable[[], str], planned_net: Any, tmp_path: Path
) -> None:
    device = await scene.join("agent", csr(), AgentConfig(listen="127.0.0.1:0", runtimes=("litert",)))
    more = {"out": tmp_path / "out", "rounds": 2, "most_samples": 4, "most_gate": 4, "device": device}
    with pytest.raises(Refused, match="cam-1 cannot measure a model: it offers no onnxruntime"):
        await asyncio.to_thread(split, planned_net.model, {"x": planned_net.x[:4]}, **more)
    assert [name for name in os.listdir(tmp_path) if "out" in name] == []  # noqa: PTH208 - not even a hidden folder


def heavy(folder: Path) -> tuple[Pieces, Any]:
    """Write a segment of two megabytes whose one large tensor takes 32, and return it with an input."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    chance = np.random.default_rng(0)
    first = numpy_helper.from_array(chance.standard_normal((8, 8192)).astype(np.float32), "first")
    second = numpy_helper.from_array(chance.standard_normal((8192, 64)).astype(np.float32) / 100, "second")
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["wide"]),
        helper.make_node("Relu", ["wide"], ["clear"]),
        helper.make_node("MatMul", ["clear", "second"], ["low"]),
        helper.make_node("ReduceMean", ["low"], ["y"], axes=[1], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes, "heavy", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1024, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])], [first, second],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    data = model.SerializeToString()
    (folder / "heavy.onnx").write_bytes(data)
    segment = Segment("heavy.onnx", sha256_hex(data), len(data), ("x",), ("y",))
    live = Live("x", "FP32", (-1, 1024, 8))
    pieces = Pieces((segment,), None, ((live,),), (Live("y", "FP32", (-1, 64)),))
    return pieces, {"x": chance.standard_normal((1, 1024, 8)).astype(np.float32)}


async def test_an_agent_that_does_not_know_the_command_is_called_too_old(
    scene: Scene, csr: Callable[[], str], planned_net: Any
) -> None:
    device = await scene.join("fake", csr())
    assert scene.device is not None
    fake = scene.device
    answer: dict[str, object] = {"ok": False, "error": "this agent does not know the operation 'measure'", "code": 2}
    fake._measure = lambda number, sealed: fake._say(number, answer)  # type: ignore[method-assign]
    with pytest.raises(Refused, match="the agent on cam-1 is too old to measure: update it"):
        await measured(device, planned_net)
    assert scene.left_over() == []


async def test_a_device_that_went_away_or_answers_for_another_work_gives_no_figures(
    scene: Scene, csr: Callable[[], str], planned_net: Any
) -> None:
    device = await scene.join("fake", csr())
    assert scene.device is not None
    right = scene.device.figures

    def other(sha256: str, work: Work) -> Figures:
        return dataclasses.replace(right(sha256, work), work="0" * 64)

    scene.device.figures = other
    with pytest.raises(SkerryError, match="measured something else"):
        await measured(device, planned_net)
    assert scene.left_over() == []
    scene.controller.fleet.heard_nothing(NAME)
    clock = itertools.count(0.0, 10.0)
    hasty = dataclasses.replace(device, clock=lambda: next(clock), pause=lambda seconds: None)
    with pytest.raises(Unreachable, match="cam-1 is not connected"):
        await measured(hasty, planned_net)


@pytest.mark.parametrize("kind", ["fake", "agent"])
async def test_answers_that_are_lost_on_the_way_do_not_end_the_measurement(
    kind: str, scene: Scene, csr: Callable[[], str], planned_net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = await scene.join(kind, csr())
    relay, asked = scene.controller.delivery.relay, list[bytes]()

    async def lossy(name: str, op: str, header: Any, order: bytes, deadline_s: float) -> Any:
        answer = await relay(name, op, header, order, deadline_s)
        asked.append(order)
        if len(asked) < 3:
            raise (DeadlineExceeded if len(asked) == 1 else Unreachable)("the answer was lost")
        return answer

    monkeypatch.setattr(scene.controller.delivery, "relay", lossy)
    figures = await measured(dataclasses.replace(device, pause=lambda seconds: None), planned_net)
    assert len(figures.heads) > 1
    assert len(set(asked)) == 1  # one work, lent and begun once
    kinds = [event.kind for event in scene.controller.fleet.events(100)]
    assert kinds.count("device.measuring") == 1
    assert scene.left_over() == []


async def test_a_work_that_was_not_uploaded_whole_is_not_ordered(
    scene: Scene, csr: Callable[[], str], planned_net: Any
) -> None:
    device = await scene.join("fake", csr())
    samples = [{"x": planned_net.x[:1]}]
    work, _ = packed(planned_net.folder, pieces_of(planned_net.folder), samples, codings_of(planned_net.folder), 2)
    data = encode_json(work)
    await asyncio.to_thread(device.door.lend_object, sha256_hex(data), data)
    with pytest.raises(NotFound, match="of the work was not uploaded"):
        await scene.controller.measuring.ask(NAME, sha256_hex(data), 5)


async def test_a_second_planner_does_not_take_away_what_the_first_one_lent(
    scene: Scene, csr: Callable[[], str], planned_net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = await scene.join("fake", csr())
    assert scene.device is not None
    fake, refused = scene.device, []

    def busy(number: str, sealed: bytes) -> None:
        refused.append(number)
        fake._say(number, {"ok": False, "error": "cam-1 is measuring something else", "code": Refused.exit_code})

    samples = [{"x": planned_net.x[:1]}]
    first, objects = packed(
        planned_net.folder, pieces_of(planned_net.folder), samples, codings_of(planned_net.folder), 2
    )
    data = encode_json(first)
    for name, content in {**objects, sha256_hex(data): data}.items():
        await asyncio.to_thread(device.door.lend_object, name, content)
    now = asyncio.get_running_loop().time()
    scene.controller.delivery.loans.lend(NAME, sha256_hex(data), first.objects | {sha256_hex(data)}, now + 60)
    monkeypatch.setattr(fake, "_measure", busy)
    with pytest.raises(Refused, match="measuring something else"):
        await measured(device, planned_net)
    monkeypatch.undo()
    assert len(refused) == 1
    assert (await scene.controller.measuring.ask(NAME, sha256_hex(data), 20))["state"] == "done"
    assert scene.left_over() == []
