"""Frames between the supervisor and its children: u32 big-endian length, then a `wire.pack_frame`."""

import asyncio
import socket
import struct
from collections.abc import Mapping
from typing import Any

from skills.errors import FormatError
from skills.wire import pack_frame, unpack_frame

MAX_FRAME_BYTES = 512 << 20
MAX_ESTIMATES = 64  # the link tells a worker so many since it last spoke, and no more: it may be reading none
_LENGTH = struct.Struct(">I")


def frame(header: Mapping[str, object], body: bytes | memoryview = b"") -> bytes:
    """Return the bytes of one frame."""
    packed = pack_frame(header, body)
    return _LENGTH.pack(len(packed)) + packed


def receive(channel: socket.socket) -> tuple[dict[str, Any], memoryview] | None:
    """Block for the next frame; None when the other side is gone.

    Raises:
        FormatError: the other side speaks something else.
    """
    head = _exactly(channel, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME_BYTES:
        raise FormatError(f"a frame announces {length} bytes, the limit is {MAX_FRAME_BYTES}")
    data = _exactly(channel, length)
    return None if data is None else unpack_frame(memoryview(data), MAX_FRAME_BYTES)


async def read(reader: asyncio.StreamReader) -> tuple[dict[str, Any], memoryview] | None:
    """Wait for the next frame; None when the other side is gone.

    Raises:
        FormatError: the other side speaks something else.
    """
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > MAX_FRAME_BYTES:
            raise FormatError(f"a frame announces {length} bytes, the limit is {MAX_FRAME_BYTES}")
        return unpack_frame(await reader.readexactly(length), MAX_FRAME_BYTES)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _exactly(channel: socket.socket, count: int) -> bytearray | None:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        try:
            got = channel.recv_into(view)
        except ConnectionError:
            return None
        if got == 0:
            return None
        view = view[got:]
    return data
