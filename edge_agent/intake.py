"""Objects on their way in: asks over MQTT, takes chunks, hands good ones to the disk. The doing to `fetch`'s deciding."""

import asyncio
import collections
import random
from collections.abc import Awaitable, Callable
from typing import Any

from edge_agent.fetch import BAD_CHUNKS_THAT_REFUSE, Transfer
from edge_agent.store import PartialPart, Store
from skills import topics
from skills.bundle import Part
from skills.desired import ObjectRef
from skills.errors import NotFound, TrustError, Unreachable
from skills.messaging import MqttClient
from skills.report import CHUNK_BYTES, Chunk
from skills.wire import encode_json

Offload = Callable[..., Awaitable[Any]]
MAX_WAITING_CHUNKS = 64  # 4 MiB; what comes on top is dropped and asked for again
MAX_WHOLE_BYTES = 8 << 20
GONE_ROUNDS_THAT_REFUSE = 3


class Lacking(NotFound):
    """The controller has no such object, and said so more than once."""


class Intake:
    """One object at a time; what was begun is gone on with at the next call."""

    def __init__(
        self,
        mqtt: MqttClient,
        device: str,
        store: Store,
        *,
        chance: Callable[[], float] = random.random,
        offload: Offload = asyncio.to_thread,
    ) -> None:
        self._mqtt, self._device, self._store, self._chance, self._offload = mqtt, device, store, chance, offload
        self._inbox: collections.deque[Chunk] = collections.deque()
        self._news = asyncio.Event()
        self._interrupted = False
        self._transfer: Transfer | None = None
        self._bad: collections.Counter[str] = collections.Counter()
        self._gone: collections.Counter[str] = collections.Counter()
        self.dropped = 0

    def arrived(self, chunk: Chunk) -> None:
        """Take a chunk from the network."""
        if self._transfer is None or chunk.transfer != self._transfer.number:
            return
        if len(self._inbox) >= MAX_WAITING_CHUNKS:
            self.dropped += 1
            return
        self._inbox.append(chunk)
        self._news.set()

    def interrupt(self) -> None:
        """Have the fetch that is going on return soon: something else may be more urgent."""
        self._interrupted = True
        self._news.set()

    def forget(self, sha256: str) -> None:
        """Count an object's failures anew."""
        self._bad.pop(sha256, None)
        self._gone.pop(sha256, None)

    async def whole(self, ref: ObjectRef) -> int:
        """Fetch an object of which only the hash is known; returns the bytes received.

        Raises:
            TrustError: what comes has another hash, again and again.
            Lacking: the controller does not have it, again and again.
            Unreachable: nothing comes; asking again later may help.
        """
        if ref.size > MAX_WHOLE_BYTES:
            raise TrustError(f"the object {ref.sha256[:12]}… has {ref.size} bytes, the limit is {MAX_WHOLE_BYTES}")
        count = max(-(-ref.size // CHUNK_BYTES), 1)
        pieces: dict[int, bytes] = {}

        def keep(index: int, data: bytes) -> bool:
            if not 0 <= index < count or len(data) != min(CHUNK_BYTES, ref.size - index * CHUNK_BYTES):
                return False
            pieces[index] = data
            return True

        self._transfer = Transfer(self._number(), ref.sha256, count, set())
        self._interrupted = False
        while not await self._run(self._transfer, keep):
            if self._interrupted:
                return 0
        content = b"".join(pieces[index] for index in range(count))
        try:
            self._store.put_object(ref.sha256, content)
        except TrustError as error:
            self._spoiled(ref.sha256, str(error))
            return 0
        return ref.size

    async def part(self, part: Part, told: Callable[[int, int], None]) -> int:
        """Fetch a part until it is an object, or until something interrupts; returns the bytes received.

        Raises:
            TrustError: a chunk has another hash than the signed manifest states, again and again.
            Lacking: the controller does not have it, again and again.
            Unreachable: nothing comes; asking again later may help.
            StorageError: the disk is full or refuses.
        """
        received = 0
        with PartialPart(self._store, part) as partial:
            if self._transfer is None or self._transfer.sha256 != part.wire_sha256 or self._transfer.done:
                self._transfer = Transfer(self._number(), part.wire_sha256, len(part.chunks), set(partial.have))
            transfer = self._transfer

            def keep(index: int, data: bytes) -> bool:
                nonlocal received
                fresh = index not in partial.have
                if not partial.write(index, data):
                    self._spoiled(
                        part.wire_sha256,
                        f"part {part.path}: chunk {index} arrived with another hash than the signed manifest states",
                    )
                    return False
                if fresh:
                    received += len(data)
                    told(len(partial.have), len(part.chunks))
                return True

            self._interrupted = False
            while not await self._run(transfer, keep):
                if self._interrupted:
                    return received
        await self._offload(self._store.finish_part, part)
        self._transfer = None
        return received

    async def _run(self, transfer: Transfer, keep: Callable[[int, bytes], bool]) -> bool:
        """Ask once and take what comes until the window wants more, or nothing comes; True when all is here."""
        need = transfer.need()
        if need is not None:
            self._mqtt.publish(topics.up(self._device, "need"), encode_json(need))
        if not self._inbox and not transfer.done:
            self._news.clear()
            try:
                async with asyncio.timeout(transfer.idle_s(self._chance())):
                    await self._news.wait()
            except TimeoutError:
                transfer.idle()
                if transfer.stalled:
                    raise Unreachable(
                        f"no chunk of {transfer.sha256[:12]}… came in {transfer.empty_rounds} rounds"
                    ) from None
                return False
        while self._inbox:
            chunk = self._inbox.popleft()
            if chunk.transfer != transfer.number:
                continue
            if chunk.gone:
                self._inbox.clear()
                transfer.in_flight.clear()
                self._lacking(transfer.sha256, chunk.data.decode(errors="replace")[:500])
            elif keep(chunk.index, chunk.data):
                transfer.arrived(chunk.index)
            else:
                transfer.spoiled(chunk.index)
        return transfer.done

    def _spoiled(self, sha256: str, reason: str) -> None:
        self._bad[sha256] += 1
        if self._bad[sha256] >= BAD_CHUNKS_THAT_REFUSE:
            self.forget(sha256)
            raise TrustError(reason)

    def _lacking(self, sha256: str, reason: str) -> None:
        self._gone[sha256] += 1
        if self._gone[sha256] >= GONE_ROUNDS_THAT_REFUSE:
            self.forget(sha256)
            raise Lacking(f"the controller cannot give {sha256[:12]}…: {reason}")
        raise Unreachable(f"the controller cannot give {sha256[:12]}… now: {reason}")

    def _number(self) -> int:
        self._inbox.clear()
        return int(self._chance() * 0xFFFFFFFF)
