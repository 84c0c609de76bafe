"""The one door to paho-mqtt: MQTT 3.1.1, events into a queue that is bounded by bytes, publishes bounded likewise.

Depends on nothing beyond MQTT 3.1.1. The session is clean: desired state is retained, everything else is acknowledged by
the application, so a broker's offline queue is never relied on.
"""

import asyncio
import collections
import contextlib
import dataclasses
import random
import socket
import ssl
import threading
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from skills.errors import DeadlineExceeded, FormatError, MissingExtra, Unreachable
from skills.messaging import Connected, Disconnected, Message, MqttEvent, Will

KEEPALIVE_S = 30
RECONNECT_MAX_S = 30
DEFAULT_QUEUE_BYTES = 32 << 20
MESSAGE_BYTES = 200  # what a message takes beside topic and payload


@dataclasses.dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of a mutual TLS connection."""

    ca: Path
    cert: Path
    key: Path


def _at_once(_client: Any, _data: Any, connection: socket.socket) -> None:
    """Send small packets at once: waiting for the broker's acknowledgement costs 40 ms a message (RFC 896 with RFC 1122)."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Mqtt:
    """An `MqttClient` over paho. `dropped` counts arrivals that found the queue full."""

    def __init__(
        self,
        url: str,
        client_id: str,
        *,
        tls: TlsFiles | None = None,
        will: Will | None = None,
        max_queue_bytes: int = DEFAULT_QUEUE_BYTES,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname:
            raise FormatError(f"{url!r} is no broker address: expected mqtt://HOST:PORT or mqtts://HOST:PORT")
        self._host, self._tls, self._secure = parts.hostname, tls, parts.scheme == "mqtts"
        self._port = parts.port or (8883 if self._secure else 1883)
        self._user = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
        self._client_id, self._will, self._max = client_id, will, max_queue_bytes
        self._filters: tuple[str, ...] = ()
        self._events: collections.deque[MqttEvent] = collections.deque()
        self._queued = 0
        self._pending: dict[int, int] = {}  # bytes by message number
        self._subscribing: int | None = None
        self._early: set[int] = set()  # acknowledged before publish() could enter them as pending
        self._lock = threading.Lock()
        self._wake: asyncio.Event = asyncio.Event()
        self._acknowledged: asyncio.Event = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: Any = None
        self.dropped = 0

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._client = self._build()
        try:
            self._client.connect_async(self._host, self._port, keepalive=KEEPALIVE_S)
        except ValueError as error:
            raise FormatError(f"the broker address {self._host}:{self._port} cannot be used: {error}") from None
        self._client.loop_start()

    async def stop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.disconnect()
            await asyncio.to_thread(client.loop_stop)

    def subscribe(self, filters: tuple[str, ...]) -> None:
        self._filters = tuple(dict.fromkeys((*self._filters, *filters)))
        if self._client is not None and self._client.is_connected():
            self._client.subscribe([(name, 1) for name in filters])

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        if self._client is None or not self._client.is_connected():
            raise Unreachable(f"the broker {self._host}:{self._port} is not connected")
        with self._lock:
            waiting = sum(self._pending.values())
            if waiting + len(payload) > self._max:
                raise Unreachable(f"{waiting} bytes wait for the broker {self._host}:{self._port}, no more are taken")
        info = self._client.publish(topic, payload, qos=qos, retain=retain)
        if info.rc != 0:
            raise Unreachable(f"the broker {self._host}:{self._port} takes no message: {_reason(info.rc)}")
        with self._lock:
            if info.mid in self._early:
                self._early.discard(info.mid)
            else:
                self._pending[info.mid] = len(payload)

    async def settled(self, deadline_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                while self._client is not None and self._client.is_connected():
                    with self._lock:
                        if not self._pending:
                            return True
                        self._acknowledged.clear()
                    await self._acknowledged.wait()
        return False

    async def next(self, deadline_s: float) -> MqttEvent:
        try:
            async with asyncio.timeout(deadline_s):
                while True:
                    with self._lock:
                        if self._events:
                            event = self._events.popleft()
                            if isinstance(event, Message):
                                self._queued -= _weight(event)
                            return event
                        self._wake.clear()
                    await self._wake.wait()
        except TimeoutError:
            raise DeadlineExceeded(f"nothing came from the broker within {deadline_s:g} s") from None

    def _build(self) -> Any:
        try:
            from paho.mqtt import client as paho
            from paho.mqtt.enums import CallbackAPIVersion
        except ImportError:
            raise MissingExtra("paho-mqtt is not installed: pip install 'skerry[edge]' or 'skerry[cloud]'") from None
        client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=self._client_id, protocol=paho.MQTTv311, clean_session=True
        )
        client.max_inflight_messages_set(64)
        # paho doubles its waiting time without jitter: a fleet that lost its broker would come back in step.
        client.reconnect_delay_set(min_delay=1, max_delay=random.randint(RECONNECT_MAX_S // 2, RECONNECT_MAX_S))  # noqa: S311 - no secret
        client.suppress_exceptions = False
        if self._user is not None:
            client.username_pw_set(*self._user)
        if self._secure:
            client.tls_set_context(self._context())
        if self._will is not None:
            client.will_set(self._will.topic, self._will.payload, qos=1)
        client.on_socket_open = _at_once
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_connect_fail = lambda *_: self._put(Disconnected(f"{self._host}:{self._port} does not answer"))
        client.on_disconnect = self._on_disconnect
        client.on_message = lambda _client, _data, message: self._put(Message(message.topic, message.payload))
        client.on_publish = self._on_publish
        return client

    def _context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=None if self._tls is None else str(self._tls.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self._tls is not None:
            context.load_cert_chain(self._tls.cert, self._tls.key)
        return context

    def _on_connect(self, client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            self._put(Disconnected(f"{self._host}:{self._port} refused the connection: {reason}"))
            return
        if not self._filters:
            self._put(Connected())
            return
        _, self._subscribing = client.subscribe([(name, 1) for name in self._filters])

    def _on_subscribe(self, _client: Any, _data: Any, mid: int, reasons: Any, _properties: Any) -> None:
        if mid != self._subscribing:
            return
        if any(reason.is_failure for reason in reasons):
            self._put(Disconnected(f"{self._host}:{self._port} refuses the subscription to this client's own topics"))
            return
        # Not before: what another client sends now would pass by.
        self._put(Connected())

    def _on_disconnect(self, _client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        with self._lock:
            self._pending.clear()
            self._early.clear()
        self._tell(self._acknowledged)
        self._put(Disconnected(f"{self._host}:{self._port}: {reason}"))

    def _on_publish(self, _client: Any, _data: Any, mid: int, _reason: Any, _properties: Any) -> None:
        with self._lock:
            if self._pending.pop(mid, None) is None:
                self._early.add(mid)
        self._tell(self._acknowledged)

    def _put(self, event: MqttEvent) -> None:
        with self._lock:
            if isinstance(event, Message):
                if self._queued + _weight(event) > self._max:
                    self.dropped += 1
                    return
                self._queued += _weight(event)
            self._events.append(event)
        self._tell(self._wake)

    def _tell(self, event: asyncio.Event) -> None:
        """Set an event of the loop from a thread of paho's."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(event.set)


def _weight(message: Message) -> int:
    """Return what a waiting message counts: an empty one takes memory too."""
    return len(message.topic) + len(message.payload) + MESSAGE_BYTES


def _reason(code: int) -> str:
    from paho.mqtt.client import error_string

    return str(error_string(code)).rstrip(".")
