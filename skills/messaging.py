"""What crosses the MQTT door: events as values, and the shape that the real client and the fake share."""

import dataclasses
from typing import Protocol


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One message that arrived."""

    topic: str
    payload: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Connected:
    """The broker accepted the connection, and every filter is subscribed again."""


@dataclasses.dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection is gone; the client goes on trying by itself."""

    reason: str


MqttEvent = Message | Connected | Disconnected


@dataclasses.dataclass(frozen=True, slots=True)
class Will:
    """What the broker says for a client that vanishes."""

    topic: str
    payload: bytes


class MqttClient(Protocol):
    """A connection that mends itself. One task calls `next`; nothing is delivered anywhere else."""

    async def start(self) -> None:
        """Begin to connect, and go on trying until `stop`."""

    async def stop(self) -> None:
        """Disconnect and end every thread."""

    def subscribe(self, filters: tuple[str, ...]) -> None:
        """Subscribe (QoS 1) now and after every reconnect."""

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        """Hand over a message; acceptance is no proof of delivery.

        Raises:
            Unreachable: not connected, or more bytes are waiting than the bound allows. The message is dropped.
        """

    async def settled(self, deadline_s: float) -> bool:
        """Wait until the broker has acknowledged what was published with QoS 1; False when it has not in time."""

    async def next(self, deadline_s: float) -> MqttEvent:
        """Return the next event.

        Raises:
            DeadlineExceeded: nothing happened within `deadline_s` seconds.
        """
