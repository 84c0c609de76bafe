"""The controller's whole loop with a broker in memory and devices without models."""

import asyncio
import contextlib
import dataclasses
import datetime as dt
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from cloud.authority import Authority, Invitation
from cloud.broker import Broker
from cloud.config import Ports, Settings
from cloud.controller import Controller
from cloud.device_fake import ANY_PC, FakeDevice, Outcome
from cloud.journal import open_journal
from skills import signing, topics
from skills.bundle import BundleFile
from skills.desired import ObjectRef
from skills.errors import DeadlineExceeded, NotFound, StorageError, TrustError, Unreachable
from skills.mqtt_fake import FakeBroker
from skills.report import DeviceState, Need, Phase, SkillState
from skills.resolve import Capabilities
from skills.wire import encode_json

Build = Callable[..., BundleFile]
NO_ONNX = Capabilities(arch="x86_64", isa=(), npu=(), runtimes={}, ram_mb=64, disk_mb=64, agent="fake/1")


class World:
    """A controller, a broker in memory, and devices."""

    def __init__(self, data: Path, build: Build) -> None:
        self.data, self.build, self.broker = data, build, FakeBroker()
        self.clock = 1_800_000_000.0
        self.devices: dict[str, FakeDevice] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self.controller = self.new_controller()

    def new_controller(self) -> Controller:
        authority = Authority(self.data / "ca", ())
        settings = Settings(data=self.data)
        door = Broker("amqtt", "127.0.0.1", 1)
        mqtt = self.broker.client("controller")
        return Controller(settings, Ports(), door, authority, mqtt, open_journal(None), lambda: self.clock)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.controller.stop()

    def join(
        self,
        name: str,
        csr: str,
        capabilities: Capabilities = ANY_PC,
        outcome: Outcome = lambda wanted: ("serving", ""),
        **labels: str,
    ) -> FakeDevice:
        token = self.controller.fleet.invite("https://x", labels, 60).token()
        self.controller.fleet.enroll(token, csr, name)
        pem = self.controller.registry.director_pem
        device = self.devices[name] = FakeDevice(name, self.broker.client(name), pem, capabilities, outcome)
        self._tasks.append(asyncio.create_task(device.run()))
        return device

    async def publish(self, version: str, **more: object) -> BundleFile:
        bundle = self.build(version, **more)
        registry = self.controller.registry

        async def body(data: bytes) -> AsyncIterator[bytes]:
            yield data

        for sha256, data in {**bundle.objects, bundle.digest: bundle.manifest_bytes}.items():
            await registry.put(sha256, body(data))
        await self.controller.accept(bundle.digest, self.sign(bundle))
        return bundle

    def sign(self, bundle: BundleFile) -> bytes:
        key = signing.load_key(self.data / "keys" / "publisher.pem")
        target = signing.release_target(bundle.bundle.skill.name, bundle.bundle.skill.version)
        ref = ObjectRef(bundle.digest, len(bundle.manifest_bytes))
        now = dt.datetime.fromtimestamp(self.clock, dt.UTC)
        return signing.add_release(self.controller.registry.role("targets"), target, ref, key, now)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - what is waited for lies in several parts
                await asyncio.sleep(0.005)

    def state(self, number: int = 0) -> str:
        return str(self.controller.orders.rollouts()[number]["state"])


@pytest.fixture
async def world(tmp_path: Path, small_bundle: Build) -> AsyncIterator[World]:
    world = World(tmp_path / "data", small_bundle)
    await world.controller.start()
    yield world
    await world.stop()


async def online(world: World, *names: str) -> None:
    await world.until(lambda: all(world.controller.fleet.device(name).online for name in names))


async def test_a_push_reaches_every_device_and_each_fetches_exactly_what_it_needs(
    world: World, csr: Callable[[], str]
) -> None:
    for name in ("a", "b", "c"):
        world.join(name, csr())
    await online(world, "a", "b", "c")
    bundle = await world.publish("1.0.0")
    world.controller.push("tiny", None, "all", "1")
    await world.until(lambda: world.state() == "done")
    assert all(device.serves("tiny", "1.0.0") for device in world.devices.values())
    wanted = {part.wire_sha256 for part in bundle.bundle.parts} | {bundle.digest}
    assert all(set(device.objects) == wanted for device in world.devices.values())
    kinds = [event.kind for event in world.controller.fleet.events(1000)]
    assert {"device.enrolled", "release.published", "rollout.started", "skill.serving", "rollout.done"} <= set(kinds)


async def test_lost_chunks_are_asked_for_again(world: World, csr: Callable[[], str]) -> None:
    seen = 0

    def lose(client: str, message: object) -> bool:
        nonlocal seen
        if client == "a" and getattr(message, "topic", "").endswith("/blk"):
            seen += 1
            return seen % 3 == 0
        return False

    world.broker.lose = lose
    world.join("a", csr())
    await online(world, "a")
    await world.publish("1.0.0", model_bytes=1_000_000)
    world.controller.push("tiny", None, "all", None)
    await world.until(lambda: world.devices["a"].serves("tiny", "1.0.0"))


async def test_the_rest_is_assigned_only_after_the_canary_serves(world: World, csr: Callable[[], str]) -> None:
    held = {"hold": True}
    for name in ("a", "b", "c"):
        world.join(name, csr(), outcome=lambda wanted: ("probing" if held["hold"] else "serving", ""))
    await online(world, "a", "b", "c")
    await world.publish("1.0.0")
    world.controller.push("tiny", "1.0.0", "all", "1")
    await world.until(
        lambda: any("tiny" in d.states and d.states["tiny"].phase == "probing" for d in world.devices.values())
    )
    assert sum(bool(world.controller.fleet.wanted(name)) for name in world.devices) == 1


async def test_a_failing_canary_halts_the_rollout_and_is_given_back_what_it_served(
    world: World, csr: Callable[[], str]
) -> None:
    def outcome(wanted: object) -> tuple[str, str]:
        return (
            ("failed", "probe: 3 of 8 outputs differ") if getattr(wanted, "version", "") == "2.0.0" else ("serving", "")
        )

    for name in ("a", "b"):
        world.join(name, csr(), outcome=outcome)  # type: ignore[arg-type]
    await online(world, "a", "b")
    await world.publish("1.0.0")
    world.controller.push("tiny", "1.0.0", "all", None)
    await world.until(lambda: world.state() == "done")
    await world.publish("2.0.0", code="def run(inputs, model):\n    return {}\n")
    world.controller.push("tiny", "2.0.0", "all", "1")
    await world.until(lambda: world.state() == "halted")
    assert "probe: 3 of 8 outputs differ" in world.controller.orders.rollouts()[0]["reason"]
    assert [world.controller.fleet.wanted(name) for name in ("a", "b")] == [{"tiny": "1.0.0"}] * 2
    await world.until(lambda: all(device.serves("tiny", "1.0.0") for device in world.devices.values()))


async def test_a_device_that_no_variant_fits_refuses_and_blocks_nobody(world: World, csr: Callable[[], str]) -> None:
    world.join("a", csr(), capabilities=NO_ONNX)
    world.join("b", csr())
    await online(world, "a", "b")
    await world.publish("1.0.0")
    shown = world.controller.push("tiny", None, "all", "1")
    await world.until(lambda: world.state() == "done")
    rows = {row["device"]: row for row in world.controller.orders.rollout(shown["id"])["devices"]}
    assert (rows["a"]["stage"], rows["b"]["stage"]) == ("refused", "serving")
    assert "no runtime" in rows["a"]["reason"]
    assert rows["b"]["canary"]


async def test_a_device_whose_disk_is_too_small_refuses_and_blocks_nobody(world: World, csr: Callable[[], str]) -> None:
    world.join("a", csr(), capabilities=dataclasses.replace(ANY_PC, disk_mb=0))
    world.join("b", csr())
    await online(world, "a", "b")
    await world.publish("1.0.0")
    shown = world.controller.push("tiny", None, "all", "1")
    await world.until(lambda: world.state() == "done")
    rows = {row["device"]: row for row in world.controller.orders.rollout(shown["id"])["devices"]}
    assert (rows["a"]["stage"], rows["b"]["stage"]) == ("refused", "serving")
    assert "of disk" in rows["a"]["reason"]


async def test_a_byte_flipped_in_the_store_is_refused_by_the_device_and_halts(
    world: World, csr: Callable[[], str]
) -> None:
    world.join("a", csr())
    await online(world, "a")
    bundle = await world.publish("1.0.0")
    victim = world.controller.registry.path_of(bundle.bundle.parts[0].wire_sha256)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    world.controller.push("tiny", None, "all", "1")
    await world.until(lambda: world.state() == "halted")
    assert not world.devices["a"].serves("tiny", "1.0.0")


async def test_a_device_that_joins_later_gets_the_release_of_a_finished_rollout(
    world: World, csr: Callable[[], str]
) -> None:
    world.join("a", csr(), site="north")
    await online(world, "a")
    await world.publish("1.0.0")
    world.controller.push("tiny", None, "site=north", "1")
    await world.until(lambda: world.state() == "done")
    late = world.join("b", csr(), site="north")
    other = world.join("c", csr(), site="south")
    await world.until(lambda: late.serves("tiny", "1.0.0") and other.fresh.is_set())
    assert not other.states
    await world.until(lambda: world.state() == "done")


async def test_a_rollback_returns_each_device_to_what_it_served_before(world: World, csr: Callable[[], str]) -> None:
    for name in ("a", "b"):
        world.join(name, csr())
    await online(world, "a", "b")
    for version in ("1.0.0", "2.0.0"):
        await world.publish(version)
        world.controller.push("tiny", version, "all", None)
        await world.until(lambda: world.state() == "done")
    world.controller.rollback("tiny", "name=a")
    await world.until(lambda: world.devices["a"].serves("tiny", "1.0.0") and world.state() == "done")
    assert world.devices["b"].serves("tiny", "2.0.0")
    with pytest.raises(NotFound, match="served another version of tiny before"):
        world.controller.rollback("tiny", "name=a")


async def test_a_late_device_gets_what_was_rolled_back_to_and_never_what_was_halted(
    world: World, csr: Callable[[], str]
) -> None:
    def outcome(wanted: object) -> tuple[str, str]:
        return ("failed", "probe") if getattr(wanted, "version", "") == "3.0.0" else ("serving", "")

    world.join("a", csr(), outcome=outcome)  # type: ignore[arg-type]
    await online(world, "a")
    for version in ("1.0.0", "2.0.0"):
        await world.publish(version)
        world.controller.push("tiny", version, "all", None)
        await world.until(lambda: world.state() == "done")
    world.controller.delivery.tell(world.controller.orders.rollback("tiny", "all")[1])
    await world.until(lambda: world.state() == "done")
    await world.publish("3.0.0")
    world.controller.push("tiny", "3.0.0", "all", "1")
    await world.until(lambda: world.state() == "halted")
    late = world.join("b", csr())
    await world.until(lambda: late.serves("tiny", "1.0.0"))


async def test_a_controller_that_comes_back_learns_who_is_there(world: World, csr: Callable[[], str]) -> None:
    world.join("a", csr())
    world.join("b", csr())
    await online(world, "a", "b")
    client = world.controller.delivery._mqtt
    world.broker.cut("controller")
    await world.until(lambda: not world.controller.delivery.connected.is_set())
    world.broker.cut("b")
    world.broker.mend(client)  # type: ignore[arg-type]
    await online(world, "a")
    assert not world.controller.fleet.device("b").online


async def test_every_hello_is_answered_with_its_own_nonce_and_the_same_counter(
    world: World, csr: Callable[[], str]
) -> None:
    device = world.join("a", csr())
    await asyncio.wait_for(device.fresh.wait(), 5)
    first = device.assignment
    device.fresh.clear()
    world.broker.cut("a")
    world.broker.mend(device._mqtt)  # type: ignore[arg-type]  # the fake broker's own client
    await asyncio.wait_for(device.fresh.wait(), 5)
    assert first is not None
    assert device.assignment is not None
    assert device.assignment.nonce != first.nonce
    assert device.assignment.counter == first.counter


async def test_a_broker_that_forgot_everything_is_told_again(world: World, csr: Callable[[], str]) -> None:
    world.join("a", csr())
    await online(world, "a")
    topic = topics.down("a", "desired")
    await world.until(lambda: topic in world.broker.retained)
    world.broker.retained.clear()
    client = world.controller.delivery._mqtt
    world.broker.cut("controller")
    await world.until(lambda: not world.controller.delivery.connected.is_set())
    assert not world.controller.fleet.device("a").online
    world.broker.mend(client)  # type: ignore[arg-type]
    await world.until(lambda: topic in world.broker.retained)


async def test_a_restarted_controller_goes_on_with_the_rollout(world: World, csr: Callable[[], str]) -> None:
    held = {"hold": True}
    for name in ("a", "b"):
        world.join(name, csr(), outcome=lambda wanted: ("probing" if held["hold"] else "serving", ""))
    await online(world, "a", "b")
    await world.publish("1.0.0")
    world.controller.push("tiny", None, "all", "1")
    await world.until(lambda: any(d.states for d in world.devices.values()))
    await world.controller.stop()
    held["hold"] = False
    world.controller = world.new_controller()
    await world.controller.start()
    for device in world.devices.values():
        device.states.clear()
        device._hello()
    await world.until(lambda: world.state() == "done")


async def test_a_question_to_a_device_is_answered_or_ends_at_its_deadline(world: World, csr: Callable[[], str]) -> None:
    world.join("a", csr())
    await online(world, "a")
    header, body = await world.controller.delivery.relay(
        "a", "infer", {"skill": "tiny", "json_len": 4}, b"echo\x00\x01", 5
    )
    assert (bytes(body), header["json_len"]) == (b"echo\x00\x01", 4)
    world.broker.lose = lambda client, message: message.topic.endswith("/cmd")
    with pytest.raises(DeadlineExceeded):
        await world.controller.delivery.relay("a", "logs", {}, b"", 0.05)


async def test_a_device_that_vanishes_is_shown_offline_by_its_will(world: World, csr: Callable[[], str]) -> None:
    world.join("a", csr())
    await online(world, "a")
    outsider = world.broker.client("will of a")
    await outsider.start()
    outsider.publish(topics.up("a", "state"), b"")
    await world.until(lambda: not world.controller.fleet.device("a").online)


async def test_a_removed_device_is_heard_no_more_and_its_retained_assignment_is_gone(
    world: World, csr: Callable[[], str]
) -> None:
    device = world.join("a", csr())
    await online(world, "a")
    await world.until(lambda: topics.down("a", "desired") in world.broker.retained)
    world.controller.fleet.remove("a")
    world.controller.delivery.clear("a")
    assert topics.down("a", "desired") not in world.broker.retained
    device._hello()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(world.until(lambda: topics.down("a", "desired") in world.broker.retained), 0.1)
    assert topics.down("a", "desired") not in world.broker.retained


async def test_a_release_signed_by_an_unlisted_key_is_refused_and_nothing_changes(world: World, tmp_path: Path) -> None:
    bundle = await world.publish("1.0.0")
    before = world.controller.registry.role("targets")
    stranger = signing.new_key()
    forged = world.build("2.0.0")
    ref = ObjectRef(forged.digest, len(forged.manifest_bytes))

    async def body(data: bytes) -> AsyncIterator[bytes]:
        yield data

    for sha256, data in {**forged.objects, forged.digest: forged.manifest_bytes}.items():
        await world.controller.registry.put(sha256, body(data))
    now = dt.datetime.fromtimestamp(world.clock, dt.UTC)
    targets = signing.add_release(before, "skills/tiny/2.0.0.json", ref, stranger, now)
    with pytest.raises(TrustError, match="no key"):
        await world.controller.accept(forged.digest, targets)
    assert world.controller.registry.role("targets") == before
    assert [row.manifest_sha256 for row in world.controller.registry.releases()] == [bundle.digest]


async def test_online_metadata_is_signed_again_before_it_expires(world: World) -> None:
    before = world.controller.registry.metadata
    assert not world.controller.registry.refresh_due()
    world.clock += 3 * 86_400
    assert world.controller.registry.refresh_due()
    after = world.controller.registry.refresh()
    assert after != before
    assert world.controller.registry.size_of(before.sha256) is not None  # a device may still be fetching it


def test_the_invitation_is_one_word_that_holds_everything() -> None:
    token = Invitation("https://10.0.0.1:8443", "s3cret", "ab" * 32).token()
    assert token.isascii()
    assert not set(token) & set("+/= \n'\"")


def allowed(world: World) -> dict[str, dict[str, list[str]]]:
    """Return the tail's table as the tail would read it."""
    return dict(json.loads((world.data / "tails" / "allowed.json").read_text()).get("devices", {}))


async def test_the_tail_knows_of_an_assignment_before_the_device_does(
    world: World, csr: Callable[[], str], split_bundle: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.build, known = split_bundle, []
    client = world.controller.delivery._mqtt
    publish = client.publish

    def watch(topic: str, payload: bytes, **more: object) -> None:
        if topic == topics.down("a", "desired"):
            known.append((bool(world.controller.fleet.wanted("a")), sorted(allowed(world))))
        publish(topic, payload, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(client, "publish", watch)
    world.join("a", csr())
    world.join("b", csr(), site="north")
    await online(world, "a", "b")
    assert allowed(world) == {}
    await world.publish("1.0.0")
    world.controller.push("halves", None, "name=a", None)
    await world.until(lambda: world.devices["a"].serves("halves", "1.0.0"))
    assert {names == ["a"] for wanted, names in known if wanted} == {True}
    (plan,) = (path.name for path in (world.data / "tails").iterdir() if path.is_dir())
    assert {device: list(plans) for device, plans in allowed(world).items()} == {"a": [plan]}
    await world.controller.remove("a")
    assert allowed(world) == {}


async def test_during_an_update_the_plan_that_still_serves_is_allowed_too_and_none_that_was_never_assigned(
    world: World, csr: Callable[[], str], split_bundle: Build
) -> None:
    world.build = split_bundle
    fleet, registry = world.controller.fleet, world.controller.registry
    fleet.enroll(fleet.invite("https://x", {}, 60).token(), csr(), "a")
    plan, manifest = {}, {}
    for version in ("1.0.0", "2.0.0", "3.0.0"):
        bundle = await world.publish(version)
        (plan[version],) = registry.plans_of(bundle.digest)
        manifest[version] = bundle.digest

    def says(*versions: tuple[str, Phase]) -> None:
        """Report as the device would, and let the controller look at everything."""
        skills = tuple(SkillState("halves", version, manifest[version], phase) for version, phase in versions)
        fleet.heard_state("a", encode_json(DeviceState("a", 1, fleet.device("a").counter, skills)))
        world.controller.orders.step()
        world.controller.permits.rebuild()

    def told(version: str) -> None:
        world.controller.permits.update(world.controller.orders.push("halves", version, "all", None)[1])

    told("1.0.0")
    assert set(allowed(world)["a"]) == {plan["1.0.0"]}
    says(("1.0.0", "serving"))
    told("2.0.0")
    assert set(allowed(world)["a"]) == {plan["1.0.0"], plan["2.0.0"]}
    says(("1.0.0", "serving"), ("2.0.0", "fetching"), ("3.0.0", "serving"))  # it claims what nobody gave it
    assert set(allowed(world)["a"]) == {plan["1.0.0"], plan["2.0.0"]}
    says(("2.0.0", "serving"))
    assert set(allowed(world)["a"]) == {plan["2.0.0"]}


async def test_a_device_gets_no_object_that_its_assignment_does_not_lead_to(
    world: World, csr: Callable[[], str]
) -> None:
    for name in ("a", "b"):
        world.join(name, csr())
    await online(world, "a", "b")
    bundle = await world.publish("1.0.0")
    world.controller.push("tiny", None, "name=a", None)
    await world.until(lambda: world.devices["a"].serves("tiny", "1.0.0"))
    outsider = world.devices["b"]
    wanted = (bundle.digest, bundle.bundle.parts[0].wire_sha256, "0" * 64)
    frames = [world.controller.delivery._frame("b", 7, sha256, 0) for sha256 in wanted]
    assert all(b"the assignment of b names no object" in frame for frame in frames)
    outsider._mqtt.publish(topics.up("b", "need"), encode_json(Need(7, bundle.digest, ((0, 1),))))
    heard: list[bytes] = []
    outsider._take = heard.append  # type: ignore[method-assign]
    await world.until(lambda: bool(heard))
    assert heard == [frames[0]]
    for sha256 in (bundle.digest, bundle.bundle.parts[0].wire_sha256, world.controller.registry.metadata.sha256):
        assert b"names no object" not in world.controller.delivery._frame("a", 7, sha256, 0)
    world.controller.push("tiny", None, "all", None)
    await world.until(lambda: outsider.serves("tiny", "1.0.0") or bool(heard[1:]))
    assert b"names no object" not in world.controller.delivery._frame("b", 7, bundle.digest, 0)


async def test_a_disk_that_keeps_refusing_is_warned_of_once_and_its_recovery_is_said(
    world: World, csr: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    controller, said = world.controller, []
    for level in ("debug", "info", "warning"):
        monkeypatch.setattr(controller.journal, level, lambda kind, level=level, **_: said.append((level, kind)))
    monkeypatch.setattr("cloud.delivery.RETRY_S", 0.0)
    world.join("a", csr())
    await online(world, "a")
    await world.until(world.devices["a"].fresh.is_set)
    assignment, errors = controller.orders.assignment, [Unreachable("full"), *[StorageError("no space left")] * 3]

    def refuses(device: str) -> bytes:
        if errors:
            raise errors.pop(0)
        return assignment(device)

    monkeypatch.setattr(controller.orders, "assignment", refuses)
    said.clear()
    controller.delivery.tell({"a"})
    await world.until(lambda: ("info", "assignment.flowing") in said)
    about = [(level, kind) for level, kind in said if kind.startswith("assignment.")]
    delayed = [(level, "assignment.delayed") for level in ("debug", "warning", "debug", "debug")]
    assert about == [*delayed, ("info", "assignment.flowing")]
