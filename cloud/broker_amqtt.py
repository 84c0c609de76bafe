"""The broker for trying things out: amqtt behind a door of our own, run as a child by the controller.

amqtt 0.12 has no packet limit, keeps the queues of absent clients without a bound, takes the client's name from what the
client says, and asks for a certificate without insisting. So the door does what amqtt does not: TLS with a certificate of
our CA or nothing, CN = client id, no persistent sessions, a bound on packets and on what waits for a slow reader, and one
connection a client. Topics are checked by a plugin (the same rules as mosquitto's ACL).
"""

import argparse
import asyncio
import contextlib
import logging
import signal
import ssl
import sys
from pathlib import Path

from amqtt.adapters import ReaderAdapter, StreamWriterAdapter
from amqtt.broker import Broker
from amqtt.contexts import Action
from amqtt.plugins.base import BaseAuthPlugin, BaseTopicPlugin
from amqtt.session import Session
from cryptography import x509

from cloud.authority import CONTROLLER
from cloud.broker import MAX_PACKET_BYTES
from skills.topics import ROOT, shard_of

CONNECT_DEADLINE_S = 10.0
MAX_CONNECTIONS = 2000
MAX_WAITING_BYTES = 8 << 20  # for one slow reader; beyond it the connection is cut and the device comes back
REFUSED_IDENTIFIER = b"\x20\x02\x00\x02"


def may(client: str, topic: str, action: Action) -> bool:
    """Say whether a client may do this: a device writes its own `up/`, reads its own `dn/`; the controller both."""
    if client == CONTROLLER:
        return topic.startswith(f"{ROOT}/")
    own = f"{ROOT}/{shard_of(client)}/{client}"
    return topic.startswith(f"{own}/up/" if action == Action.PUBLISH else f"{own}/dn/")


class KnownByCertificate(BaseAuthPlugin):  # type: ignore[misc]  # amqtt is read without types
    """Accept every session: the door has let through only clients whose certificate carries their client id."""

    async def authenticate(self, *, session: Session) -> bool | None:
        """Take the checked client id as the user's name."""
        session.username = session.client_id
        return True


class OwnTopics(BaseTopicPlugin):  # type: ignore[misc]  # amqtt is read without types
    """Keep every device to its own topics."""

    async def topic_filtering(
        self, *, session: Session | None = None, topic: str | None = None, action: Action | None = None
    ) -> bool | None:
        """Allow what `may` allows."""
        return (
            session is not None
            and topic is not None
            and action is not None
            and may(session.client_id or "", topic, action)
        )


class _Reader(ReaderAdapter):  # type: ignore[misc]  # amqtt is read without types
    """Gives amqtt the CONNECT that was already read, then the rest, and cuts the connection at an oversized packet."""

    def __init__(self, first: bytes, reader: asyncio.StreamReader, transport: asyncio.WriteTransport) -> None:
        self._first = first
        self._reader = reader
        self._transport = transport

    async def read(self, n: int = -1) -> bytes:
        if self._first:
            data, self._first = self._first[:n], self._first[n:]
            return data
        if n > MAX_PACKET_BYTES:
            self._transport.abort()
            raise asyncio.IncompleteReadError(b"", n)
        return await self._reader.readexactly(n)

    def feed_eof(self) -> None:
        self._transport.abort()


class _Writer(StreamWriterAdapter):  # type: ignore[misc]  # amqtt is read without types
    """Cuts the connection of a reader that is too slow, instead of keeping ever more bytes for it."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        super().__init__(writer)
        self._transport = writer.transport

    def write(self, data: bytes) -> None:
        if self._transport.get_write_buffer_size() > MAX_WAITING_BYTES:
            self._transport.abort()
            return
        super().write(data)

    async def close(self) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            await super().close()


class Door:
    """Accepts TLS connections and hands the trustworthy ones to amqtt."""

    def __init__(self, broker: Broker, crl: Path) -> None:
        self._broker = broker
        self._crl_file = crl
        self._revoked: frozenset[int] = frozenset()
        self._open: dict[str, tuple[int, asyncio.StreamWriter]] = {}
        self.reload()

    def reload(self) -> None:
        """Read the list of revoked certificates again and cut their connections."""
        crl = x509.load_pem_x509_crl(self._crl_file.read_bytes())
        self._revoked = frozenset(entry.serial_number for entry in crl)
        for serial, writer in list(self._open.values()):
            if serial in self._revoked:
                writer.transport.abort()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        name = ""
        try:
            name, serial = _identity(writer)
            if serial in self._revoked or (len(self._open) >= MAX_CONNECTIONS and name != CONTROLLER):
                return
            connect = await asyncio.wait_for(_read_connect(reader), CONNECT_DEADLINE_S)
            if client_id(connect) != name:
                writer.write(REFUSED_IDENTIFIER)
                await writer.drain()
                return
            if name in self._open:
                self._open.pop(name)[1].transport.abort()
            self._open[name] = (serial, writer)
            await self._broker.external_connected(
                _Reader(clean_session(connect), reader, writer.transport), _Writer(writer), "default"
            )
        except (ValueError, OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            logging.getLogger(__name__).warning("connection of %s dropped: %s", name or "a stranger", error)
        finally:
            if name in self._open and self._open[name][1] is writer:
                del self._open[name]
            writer.transport.abort()


def _identity(writer: asyncio.StreamWriter) -> tuple[str, int]:
    tls: ssl.SSLObject = writer.get_extra_info("ssl_object")
    der = tls.getpeercert(binary_form=True)
    if not der:
        raise ValueError("no certificate")
    cert = x509.load_der_x509_certificate(der)
    names = cert.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    if len(names) != 1:
        raise ValueError("a certificate without one common name")
    return str(names[0].value), cert.serial_number


async def _read_connect(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readexactly(2)
    if head[0] != 0x10:
        raise ValueError("the first packet is not CONNECT")
    length, shift, seen = head[1] & 0x7F, 7, head
    while seen[-1] & 0x80:
        if shift > 14:
            raise ValueError("an oversized CONNECT")
        seen += await reader.readexactly(1)
        length |= (seen[-1] & 0x7F) << shift
        shift += 7
    if not 12 <= length <= MAX_PACKET_BYTES:
        raise ValueError(f"a CONNECT of {length} bytes")
    return seen + await reader.readexactly(length)


def _variable_header(connect: bytes) -> int:
    at = 1
    while connect[at] & 0x80:
        at += 1
    at += 1
    if connect[at : at + 7] != b"\x00\x04MQTT\x04":
        raise ValueError("a client that does not speak MQTT 3.1.1")
    return at


def client_id(connect: bytes) -> str:
    """Return the client id inside a CONNECT packet.

    Raises:
        ValueError: not a CONNECT of MQTT 3.1.1.
    """
    at = _variable_header(connect) + 10
    size = int.from_bytes(connect[at : at + 2], "big")
    name = connect[at + 2 : at + 2 + size]
    if len(name) != size:
        raise ValueError("a CONNECT that is cut off")
    return name.decode()


def clean_session(connect: bytes) -> bytes:
    """Return the packet with its clean-session flag set, so that nothing is queued for whoever is away."""
    at = _variable_header(connect) + 7
    return connect[:at] + bytes([connect[at] | 0x02]) + connect[at + 1 :]


async def serve(host: str, port: int, ca: Path, cert: Path, key: Path, crl: Path) -> None:
    """Run until SIGTERM; SIGHUP reads the list of revoked certificates again."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(ca)
    context.load_cert_chain(cert, key)
    module = "cloud.broker_amqtt"
    broker = Broker(
        {
            "listeners": {"default": {"type": "external"}},
            "plugins": {f"{module}.KnownByCertificate": {}, f"{module}.OwnTopics": {}},
        }
    )
    await broker.start()
    door = Door(broker, crl)
    server = await asyncio.start_server(
        door.connected, host, port, ssl=context, ssl_handshake_timeout=CONNECT_DEADLINE_S
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, stop.set)
    loop.add_signal_handler(signal.SIGHUP, door.reload)
    await stop.wait()
    logging.disable()  # what amqtt says while it is torn down helps nobody
    server.close()


def main() -> int:
    """Run the broker as a process of its own; it holds nothing that must be saved."""
    parser = argparse.ArgumentParser(
        prog="cloud.broker_amqtt", description="MQTT broker for trying things out, run by the controller."
    )
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", required=True, type=int)
    for name in ("ca", "cert", "key", "crl"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    given = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger(__name__).setLevel(logging.WARNING)
    asyncio.run(serve(given.host, given.port, given.ca, given.cert, given.key, given.crl))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
