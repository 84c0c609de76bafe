"""What we ask of a broker: the same tests on the one in memory, on amqtt behind our door, and on mosquitto."""

import asyncio
import os
import signal
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from cloud.authority import Authority, Issued
from cloud.broker import Broker, choose_broker, find_mosquitto, free_port
from cloud.children import Child
from cloud.journal import open_journal
from edge_agent.identity import Controller, Identity, IdentityFiles
from edge_agent.standing import look
from skills import topics
from skills.errors import DeadlineExceeded
from skills.messaging import Connected, Disconnected, Message, MqttClient, Will
from skills.mqtt import Mqtt, TlsFiles
from skills.mqtt_fake import FakeBroker
from skills.report import CHUNK_BYTES

WINDOW = 8
DEADLINE_S = 10.0
SILENCE_S = 0.3
MOSQUITTO = pytest.param("mosquitto", marks=pytest.mark.mosquitto)
Csr = Callable[[], tuple[str, bytes]]


class Site:
    """One broker and the clients that were made for it."""

    def __init__(self) -> None:
        self.clients: list[MqttClient] = []

    async def client(self, name: str, will: Will | None = None, *, subscribe: bool = True) -> MqttClient:
        """Return a connected client that is subscribed to its own topics."""
        client = self.make(name, will)
        if subscribe:
            client.subscribe((topics.CONTROLLER_FILTER if name == "controller" else topics.down_filter(name),))
        await client.start()
        self.clients.append(client)
        assert isinstance(await client.next(DEADLINE_S), Connected)
        return client

    def make(self, name: str, will: Will | None = None) -> MqttClient:
        raise NotImplementedError

    def vanish(self, name: str, client: MqttClient) -> None:
        """Break a client's connection as a power cut does."""
        raise NotImplementedError

    async def close(self) -> None:
        for client in self.clients:
            await client.stop()


class FakeSite(Site):
    def __init__(self) -> None:
        super().__init__()
        self.broker = FakeBroker()

    def make(self, name: str, will: Will | None = None) -> MqttClient:
        return self.broker.client(name, will)

    def vanish(self, name: str, client: MqttClient) -> None:
        self.broker.cut(name)


class RealSite(Site):
    def __init__(self, folder: Path, new_csr: Csr) -> None:
        super().__init__()
        self.folder, self.new_csr = folder, new_csr
        self.authority = Authority(folder / "ca", ())
        self.broker: Broker
        self.child: Child
        self.issued: dict[str, Issued] = {}

    async def open(self, kind: str) -> None:
        port = free_port("127.0.0.1")
        self.broker = choose_broker(
            None, "127.0.0.1", port, self.authority, self.folder / "broker", embedded=kind == "amqtt"
        )
        assert self.broker.kind == kind
        self.child = Child("broker", self.broker.command, open_journal(None))
        await self.child.start()
        await self.child.ready(self._listens, DEADLINE_S)

    def _listens(self) -> bool:
        import socket

        try:
            socket.create_connection((self.broker.host, self.broker.port), timeout=1).close()
        except OSError:
            return False
        return True

    def make(self, name: str, will: Will | None = None) -> MqttClient:
        return Mqtt(self.broker.url, name, tls=self.files(name), will=will)

    def files(self, name: str) -> TlsFiles:
        if name == "controller":
            own = self.authority.controller
            return TlsFiles(self.authority.ca_file, own.cert, own.key)
        files = TlsFiles(self.authority.ca_file, self.folder / f"{name}.pem", self.folder / f"{name}.key")
        if not files.cert.exists():
            csr, key = self.new_csr()
            self.issued[name] = self.authority.certify(csr, name)
            files.cert.write_text(self.issued[name].cert_pem)
            files.key.write_bytes(key)
        return files

    def vanish(self, name: str, client: MqttClient) -> None:
        client._client.socket().shutdown(2)  # type: ignore[attr-defined]  # as a power cut: no DISCONNECT is sent

    async def close(self) -> None:
        await super().close()
        await self.child.stop()


async def open_site(kind: str, folder: Path, new_csr: Csr) -> Site:
    if kind == "memory":
        return FakeSite()
    if kind == "mosquitto" and find_mosquitto() is None:
        if os.environ.get("SKERRY_REQUIRE_MOSQUITTO") == "1":
            pytest.fail("no mosquitto is installed")
        pytest.skip("no mosquitto is installed")
    site = RealSite(folder, new_csr)
    await site.open(kind)
    return site


@pytest.fixture(params=["memory", "amqtt", MOSQUITTO])
async def site(request: pytest.FixtureRequest, tmp_path: Path, new_csr: Csr) -> AsyncIterator[Site]:
    opened = await open_site(request.param, tmp_path, new_csr)
    yield opened
    await opened.close()


@pytest.fixture(params=["amqtt", MOSQUITTO])
async def real(request: pytest.FixtureRequest, tmp_path: Path, new_csr: Csr) -> AsyncIterator[RealSite]:
    opened = await open_site(request.param, tmp_path, new_csr)
    assert isinstance(opened, RealSite)
    yield opened
    await opened.close()


async def messages(client: MqttClient, count: int) -> list[Message]:
    found: list[Message] = []
    while len(found) < count:
        event = await client.next(DEADLINE_S)
        if isinstance(event, Message):
            found.append(event)
    return found


async def silent(client: MqttClient) -> bool:
    """Say whether nothing arrives for a while."""
    try:
        return not isinstance(await client.next(SILENCE_S), Message)
    except DeadlineExceeded:
        return True


async def test_what_a_device_says_reaches_the_controller_in_order(site: Site) -> None:
    controller, device = await site.client("controller"), await site.client("cam-1")
    for number in range(50):
        device.publish(topics.up("cam-1", "state"), str(number).encode())
    assert [int(message.payload) for message in await messages(controller, 50)] == list(range(50))


async def test_what_was_said_before_a_clean_stop_is_with_the_broker(site: Site) -> None:
    controller, device = await site.client("controller"), await site.client("cam-1")
    device.publish(topics.up("cam-1", "state"), b"")
    assert await device.settled(DEADLINE_S)
    await device.stop()
    assert await messages(controller, 1) == [Message(topics.up("cam-1", "state"), b"")]
    assert not await device.settled(DEADLINE_S)  # and without a connection nobody waits


async def test_a_retained_assignment_awaits_a_device_that_comes_later(site: Site) -> None:
    controller = await site.client("controller")
    controller.publish(topics.down("cam-1", "desired"), b"old", retain=True)
    controller.publish(topics.down("cam-1", "desired"), b"new", retain=True)
    other = await site.client("cam-2")
    controller.publish(topics.down("cam-2", "cmd"), b"now the first two have arrived")
    await messages(other, 1)
    device = await site.client("cam-1")
    assert await messages(device, 1) == [Message(topics.down("cam-1", "desired"), b"new")]


async def test_a_cleared_assignment_is_gone(site: Site) -> None:
    controller, other = await site.client("controller"), await site.client("cam-2")
    controller.publish(topics.down("cam-1", "desired"), b"x", retain=True)
    controller.publish(topics.down("cam-1", "desired"), b"", retain=True)
    controller.publish(topics.down("cam-2", "cmd"), b"both have arrived")
    await messages(other, 1)
    assert await silent(await site.client("cam-1"))


async def test_chunks_inside_a_window_arrive_unchanged_and_in_order(site: Site) -> None:
    controller, device = await site.client("controller"), await site.client("cam-1")
    # QoS 0: a broker may drop what a slow reader does not take, so no more is under way than a device asks for.
    for start in range(0, 64, WINDOW):
        chunks = [bytes([number]) * (CHUNK_BYTES + 12) for number in range(start, start + WINDOW)]
        for chunk in chunks:
            controller.publish(topics.down("cam-1", "blk"), chunk, qos=0)
        assert [message.payload for message in await messages(device, WINDOW)] == chunks


async def test_a_device_that_vanishes_leaves_its_will(site: Site) -> None:
    controller = await site.client("controller")
    device = await site.client("cam-1", Will(topics.up("cam-1", "state"), b""))
    site.vanish("cam-1", device)
    assert await messages(controller, 1) == [Message(topics.up("cam-1", "state"), b"")]


async def test_a_client_that_was_cut_comes_back_with_its_subscriptions(real: RealSite) -> None:
    controller, device = await real.client("controller"), await real.client("cam-1")
    real.vanish("cam-1", device)
    assert isinstance(await device.next(DEADLINE_S), Disconnected)
    while not isinstance(await device.next(DEADLINE_S), Connected):
        pass
    device.publish(topics.up("cam-1", "hello"), b"here again")
    await messages(controller, 1)
    controller.publish(topics.down("cam-1", "cmd"), b"welcome")
    assert (await messages(device, 1))[0].payload == b"welcome"


async def test_a_device_can_neither_read_nor_write_what_is_another_ones(real: RealSite) -> None:
    controller, device = await real.client("controller"), await real.client("cam-1")
    spy = await real.client("cam-2")
    spy.subscribe((topics.down_filter("cam-1"), "sk/#", "#", topics.CONTROLLER_FILTER))
    spy.publish(topics.up("cam-1", "state"), b"forged")
    spy.publish(topics.down("cam-1", "desired"), b"forged", retain=True)
    spy.publish(topics.up("cam-2", "state"), b"its own")
    assert await messages(controller, 1) == [Message(topics.up("cam-2", "state"), b"its own")]
    controller.publish(topics.down("cam-1", "desired"), b"for cam-1")
    assert await messages(device, 1) == [Message(topics.down("cam-1", "desired"), b"for cam-1")]
    assert await silent(spy)


async def test_nobody_enters_without_a_certificate_of_our_own(real: RealSite, tmp_path: Path) -> None:
    stranger = Authority(tmp_path / "stranger", ())
    for cert in (None, stranger.controller):
        context = ssl.create_default_context(cafile=str(real.authority.ca_file))
        if cert is not None:
            context.load_cert_chain(cert.cert, cert.key)
        with pytest.raises((ConnectionError, ssl.SSLError, asyncio.IncompleteReadError)):
            await knock(real, context)


async def knock(site: RealSite, context: ssl.SSLContext) -> bytes:
    """Send a CONNECT and return the broker's answer to it."""
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection(site.broker.host, site.broker.port, ssl=context)
        try:
            writer.write(b"\x10\x13\x00\x04MQTT\x04\x02\x00\x3c\x00\x07cam-999")
            return await reader.readexactly(4)
        finally:
            writer.close()


async def test_a_certificate_does_not_serve_to_pose_as_another_device(real: RealSite) -> None:
    controller, victim = await real.client("controller"), await real.client("cam-1")
    poser = Mqtt(real.broker.url, "cam-1", tls=real.files("cam-2"))
    poser.subscribe((topics.down_filter("cam-1"),))
    await poser.start()
    real.clients.append(poser)
    await poser.next(DEADLINE_S)  # refused (amqtt), or let in under its own name (mosquitto)
    controller.publish(topics.down("cam-1", "cmd"), b"secret")
    assert (await messages(victim, 1))[0].payload == b"secret"
    assert await silent(poser)


async def test_a_revoked_certificate_is_refused_after_a_hangup_signal(real: RealSite) -> None:
    import signal

    device = await real.client("cam-1")
    await device.stop()
    real.clients.remove(device)
    real.authority.revoke([real.issued["cam-1"].serial])
    real.child.signal(signal.SIGHUP)
    async with asyncio.timeout(DEADLINE_S):
        while True:  # the signal takes a moment
            client = real.make("cam-1")
            await client.start()
            event = await client.next(DEADLINE_S)
            await client.stop()
            if isinstance(event, Disconnected):
                break
    other = await real.client("cam-2")
    assert await silent(other)


async def test_an_oversized_message_ends_its_sender_and_nobody_else(real: RealSite) -> None:
    controller = await real.client("controller")
    noisy, calm = await real.client("cam-1"), await real.client("cam-2")
    noisy.publish(topics.up("cam-1", "log"), b"x" * 400_000, qos=0)
    assert isinstance(await noisy.next(DEADLINE_S), Disconnected)
    calm.publish(topics.up("cam-2", "state"), b"fine")
    assert await messages(controller, 1) == [Message(topics.up("cam-2", "state"), b"fine")]


async def test_a_device_can_tell_that_it_was_removed_from_a_broker_that_is_away(real: RealSite, tmp_path: Path) -> None:
    tls = real.files("cam-1")
    folder = tmp_path / "identity"
    folder.mkdir()
    for source, name in ((tls.ca, "ca.pem"), (tls.cert, "cert.pem"), (tls.key, "key.pem")):
        (folder / name).write_bytes(source.read_bytes())
    identity = Identity(IdentityFiles(folder), Controller("cam-1", "https://localhost:1", real.broker.url))
    assert await asyncio.to_thread(look, identity) == "known"
    real.authority.revoke([real.issued["cam-1"].serial])
    real.child.signal(signal.SIGHUP)
    async with asyncio.timeout(DEADLINE_S):
        while await asyncio.to_thread(look, identity) != "unknown":
            pass  # the list of revoked certificates is being read
    (folder / "ca.pem").write_text(Authority(tmp_path / "other", ()).ca_pem)
    assert await asyncio.to_thread(look, identity) == "foreign"
    await real.child.stop()
    assert await asyncio.to_thread(look, identity) == "silent"
