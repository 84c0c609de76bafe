"""The MQTT topics: `sk/1/{shard}/{device}/{up|dn}/{kind}`. Pure.

The shard (CRC-32 of the device's name modulo 64, two hexadecimal digits) lets several controllers share a fleet and
keep each device's messages in order. A device may write its own `up/#` and read its own `dn/#`, nothing else.
"""

import zlib
from typing import Literal

from skills.errors import FormatError

ROOT = "sk/1"
SHARDS = 64
CONTROLLER_FILTER = f"{ROOT}/+/+/up/#"
UP_KINDS = ("hello", "state", "need", "res", "log")
DOWN_KINDS = ("desired", "cmd", "blk")

UpKind = Literal["hello", "state", "need", "res", "log"]
DownKind = Literal["desired", "cmd", "blk"]


def shard_of(device: str) -> str:
    """Return the shard of a device as two hexadecimal digits."""
    return f"{zlib.crc32(device.encode()) % SHARDS:02x}"


def up(device: str, kind: UpKind) -> str:
    """Return the topic on which a device writes."""
    return f"{ROOT}/{shard_of(device)}/{device}/up/{kind}"


def down(device: str, kind: DownKind) -> str:
    """Return the topic on which a device is written to."""
    return f"{ROOT}/{shard_of(device)}/{device}/dn/{kind}"


def down_filter(device: str) -> str:
    """Return the one filter to which a device subscribes."""
    return f"{ROOT}/{shard_of(device)}/{device}/dn/#"


def parse_up(topic: str) -> tuple[str, UpKind]:
    """Return (device, kind) of a topic that a device wrote on.

    Raises:
        FormatError: not such a topic, or a shard that is not the device's.
    """
    parts = topic.split("/")
    if len(parts) == 6 and "/".join(parts[:2]) == ROOT and parts[2] == shard_of(parts[3]) and parts[4] == "up":
        for kind in UP_KINDS:
            if parts[5] == kind:
                return parts[3], kind  # type: ignore[return-value]
    raise FormatError(f"{topic!r} is no topic of a device")


def parse_down(topic: str) -> tuple[str, DownKind]:
    """Return (device, kind) of a topic that a device reads.

    Raises:
        FormatError: not such a topic.
    """
    parts = topic.split("/")
    if len(parts) == 6 and "/".join(parts[:2]) == ROOT and parts[2] == shard_of(parts[3]) and parts[4] == "dn":
        for kind in DOWN_KINDS:
            if parts[5] == kind:
                return parts[3], kind  # type: ignore[return-value]
    raise FormatError(f"{topic!r} is no topic to a device")
