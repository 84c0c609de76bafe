"""A broker in memory, with clients of the same shape as the real door: for tests, simulations and trying things out.

Keeps retained messages, sends wills, and can be told to lose messages, to cut a client or to be down.
"""

import asyncio
import collections
from collections.abc import Callable

from skills.errors import DeadlineExceeded, Unreachable
from skills.messaging import Connected, Disconnected, Message, MqttEvent, Will


class FakeBroker:
    """All clients of one broker. `lose` is asked for every delivery: true drops it. `log` keeps what was published."""

    def __init__(self) -> None:
        self.retained: dict[str, bytes] = {}
        self.log: list[Message] = []
        self.lose: Callable[[str, Message], bool] = lambda client_id, message: False
        self.up = True
        self._clients: list[FakeMqtt] = []

    def client(self, client_id: str, will: Will | None = None) -> "FakeMqtt":
        """Return a new client of this broker; it is not connected before `start`."""
        return FakeMqtt(self, client_id, will)

    def cut(self, client_id: str, reason: str = "connection lost") -> None:
        """Break a client's connection as a dying network does: its will is sent. It stays away until `mend`."""
        for client in [c for c in self._clients if c.client_id == client_id]:
            self._clients.remove(client)
            client.put(Disconnected(reason))
            if client.will is not None:
                self.deliver(Message(client.will.topic, client.will.payload), retain=False)

    def mend(self, client: "FakeMqtt") -> None:
        """Let a client in (again)."""
        if client not in self._clients:
            self._clients.append(client)
            client.put(Connected())
            self.send_retained(client, client.filters)

    def deliver(self, message: Message, *, retain: bool) -> None:
        """Hand a message to every client that subscribes to its topic."""
        self.log.append(message)
        if retain:
            self.retained[message.topic] = message.payload
            if not message.payload:
                del self.retained[message.topic]
        for client in list(self._clients):
            if any(matches(name, message.topic) for name in client.filters) and not self.lose(
                client.client_id, message
            ):
                client.put(message)

    def send_retained(self, client: "FakeMqtt", filters: tuple[str, ...]) -> None:
        """Hand the retained messages of the filters to a client that has just subscribed."""
        for topic, payload in self.retained.items():
            if any(matches(name, topic) for name in filters):
                client.put(Message(topic, payload))

    def connected(self, client: "FakeMqtt") -> bool:
        return self.up and client in self._clients

    def forget(self, client: "FakeMqtt") -> None:
        if client in self._clients:
            self._clients.remove(client)


class FakeMqtt:
    """An `MqttClient` of a `FakeBroker`."""

    def __init__(self, broker: FakeBroker, client_id: str, will: Will | None) -> None:
        self.client_id, self.will = client_id, will
        self.filters: tuple[str, ...] = ()
        self._broker = broker
        self._events: collections.deque[MqttEvent] = collections.deque()
        self._wake = asyncio.Event()

    async def start(self) -> None:
        self._broker.mend(self)

    async def stop(self) -> None:
        self._broker.forget(self)

    def subscribe(self, filters: tuple[str, ...]) -> None:
        fresh = tuple(name for name in filters if name not in self.filters)
        self.filters += fresh
        if self._broker.connected(self):
            self._broker.send_retained(self, fresh)

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        if not self._broker.connected(self):
            raise Unreachable("the broker is not connected")
        self._broker.deliver(Message(topic, payload), retain=retain)

    async def settled(self, deadline_s: float) -> bool:
        return self._broker.connected(self)

    async def next(self, deadline_s: float) -> MqttEvent:
        try:
            async with asyncio.timeout(deadline_s):
                while not self._events:
                    self._wake.clear()
                    await self._wake.wait()
        except TimeoutError:
            raise DeadlineExceeded(f"nothing came from the broker within {deadline_s:g} s") from None
        return self._events.popleft()

    def put(self, event: MqttEvent) -> None:
        self._events.append(event)
        self._wake.set()


def matches(name: str, topic: str) -> bool:
    """Tell whether a filter with `+` and `#` covers a topic (MQTT 3.1.1, section 4.7)."""
    wanted, given = name.split("/"), topic.split("/")
    for at, level in enumerate(wanted):
        if level == "#":
            return True
        if at >= len(given) or level not in ("+", given[at]):
            return False
    return len(wanted) == len(given)
