"""Delivery over MQTT: answers what devices ask for, tells them what to run, and relays questions to them.

One task reads everything that devices say, one task sends chunks. The giver keeps no state of a transfer: a device asks for
ranges of an object, and asks again for what did not come. Sending is bounded three ways: a byte rate for all together, a
queue for each device (what does not fit is dropped and asked for again), and the client's own queue.
"""

import asyncio
import collections
import secrets
from collections.abc import Callable

from cloud.fleet import Fleet
from cloud.journal import Journal
from cloud.loans import Loans
from cloud.orders import Orders
from cloud.permits import Permits
from cloud.registry import Registry
from skills import topics
from skills.errors import DeadlineExceeded, FormatError, NotFound, Refused, SkerryError, Unreachable, error_for
from skills.messaging import Connected, Disconnected, Message, MqttClient
from skills.report import CHUNK_BYTES, MAX_CHUNKS_A_NEED, Chunk, Need, encode_chunk
from skills.wire import decode_json, pack_frame, unpack_frame

BYTES_PER_S = 50 << 20
BURST_BYTES = 1 << 20
QUEUED_CHUNKS_A_DEVICE = 2 * MAX_CHUNKS_A_NEED
MAX_RELAY_BYTES = 256 << 10
MAX_PENDING_RELAYS = 256
LISTEN_S = 5.0
PUBLISH_DEADLINE_S = 5.0
FULL_LOOK_EVERY_S = 60.0
TOLD_AT_ONCE = 20
RETRY_S = 0.5
TELL_PAUSE_S = 0.05  # reports that come close together are looked at together

Asked = tuple[int, str, int]  # transfer, sha256, index


def _sign_of_life() -> bytes:
    """Return a question to which any answer will do."""
    return pack_frame({"id": secrets.token_hex(8), "op": "hello", "deadline_ms": 10_000})


class Delivery:
    """The controller's end of every device's topics."""

    def __init__(
        self,
        mqtt: MqttClient,
        fleet: Fleet,
        orders: Orders,
        registry: Registry,
        permits: Permits,
        journal: Journal,
    ) -> None:
        self._mqtt, self._fleet, self._orders, self._registry, self._journal = mqtt, fleet, orders, registry, journal
        self._permits = permits
        self._named: dict[str, tuple[str, ...]] = {}  # the manifests in a device's assignment, until it is told anew
        self.loans = Loans()  # beside their assignments, until a time of the loop
        self._refusing = False  # the disk or the database: said once, and once more when it is over
        self._queues: dict[str, collections.deque[Asked]] = {}
        self._asked = asyncio.Event()
        self._reported = asyncio.Event()
        self._untold: set[str] = set()
        self._uncalled: set[str] = set()
        self._telling = asyncio.Event()
        self._reports: set[str] = set()
        self._relays: dict[str, tuple[str, asyncio.Future[tuple[dict[str, object], bytes]]]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self.connected = asyncio.Event()
        self.sent_bytes = 0
        self.dropped_chunks = 0

    async def start(self) -> None:
        """Connect and begin to serve."""
        self._mqtt.subscribe((topics.CONTROLLER_FILTER,))
        await self._mqtt.start()
        for work in (self._listen, self._send_chunks, self._follow, self._tell):
            self._tasks.append(asyncio.create_task(self._forever(work), name=f"delivery{work.__name__}"))

    async def stop(self) -> None:
        """Disconnect and end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._mqtt.stop()

    async def _forever(self, work: Callable[[], object]) -> None:
        while True:
            try:
                await work()  # type: ignore[misc]
            except asyncio.CancelledError:
                raise
            except SkerryError as error:
                self._journal.error("delivery.failed", task=work.__name__, error=error)
            except Exception:  # noqa: BLE001 - the outermost loop of this task: one bad message must not end deliveries
                self._journal.exception("delivery.broke", task=work.__name__)
            await asyncio.sleep(0.5)

    # --- telling ----------------------------------------------------------------------------------

    def tell(self, devices: set[str]) -> None:
        """Have the assignments of these devices published; whoever cannot be told now is told after the next connect."""
        if devices:
            self._untold |= devices
            self._telling.set()

    def tell_all(self) -> None:
        """Have every assignment published again: the broker may have forgotten them."""
        self.tell({device.id for device in self._fleet.devices()})

    async def _tell(self) -> None:
        """Publish what is to be told, a few at a time: ten thousand devices must not hold up everything else."""
        while True:
            if not self._untold:
                await self._telling.wait()
            self._telling.clear()
            await self.connected.wait()
            while self._untold:
                wave, self._untold = self._untold, set()
                try:
                    await self._tell_wave(wave)
                finally:
                    self._untold |= wave

    async def _tell_wave(self, wave: set[str]) -> None:
        """Tell these devices; whoever is done with, or waits for the next wave, is taken out of `wave`."""
        try:
            self._permits.update(wave)  # before anybody is told: a device may ask the tail at once
        except SkerryError as error:
            await self._wait_after(None, error)
            return
        failed = False
        for count, device in enumerate(sorted(wave), 1):
            wave.discard(device)
            if device in self._untold:
                continue  # its assignment is newer than the look above: the next wave's
            try:
                self._tell_one(device)
            except SkerryError as error:
                failed = True
                self._untold.add(device)
                await self._wait_after(device, error)
            if count % TOLD_AT_ONCE == 0:
                await asyncio.sleep(0)
        if self._refusing and not failed:
            self._refusing = False
            self._journal.info("assignment.flowing")

    def _tell_one(self, device: str) -> None:
        try:
            assignment = self._orders.assignment(device)
        except NotFound:
            return
        self._mqtt.publish(topics.down(device, "desired"), assignment, qos=1, retain=True)
        self._named.pop(device, None)
        if device in self._uncalled:
            self._mqtt.publish(topics.down(device, "cmd"), _sign_of_life(), qos=1)
            self._uncalled.discard(device)

    async def _wait_after(self, device: str | None, error: SkerryError) -> None:
        """Say why assignments wait, and wait: a full queue passes by itself, anything else is a warning the first time."""
        passing = isinstance(error, Unreachable)
        say = self._journal.debug if passing or self._refusing else self._journal.warning
        say("assignment.delayed", device=device, error=error)
        self._refusing = self._refusing or not passing
        await asyncio.sleep(RETRY_S)
        await self.connected.wait()

    def _forget_permits(self) -> None:
        """Take from the tail's table what devices no longer serve: now and then, not with every report."""
        try:
            self._permits.rebuild()
        except SkerryError as error:
            self._journal.warning("tail.table_old", error=error)

    def clear(self, device: str) -> None:
        """Take back the retained assignment of a device that was removed."""
        self._untold.discard(device)
        self._uncalled.discard(device)
        self._queues.pop(device, None)
        self._named.pop(device, None)
        self.loans.forget(device)
        if self.connected.is_set():
            self._mqtt.publish(topics.down(device, "desired"), b"", qos=1, retain=True)

    async def _follow(self) -> None:
        """Have the rollouts looked at: at everything first and now and then, else at who has just reported."""
        loop = asyncio.get_running_loop()
        next_full = loop.time()
        while True:
            if loop.time() >= next_full:
                self.tell(self._orders.step())
                self._forget_permits()
                next_full = loop.time() + FULL_LOOK_EVERY_S
            try:
                async with asyncio.timeout_at(next_full):
                    await self._reported.wait()
            except TimeoutError:
                continue
            self._reported.clear()
            reports, self._reports = self._reports, set()
            self.tell(self._orders.step(reports))
            await asyncio.sleep(TELL_PAUSE_S)

    # --- listening --------------------------------------------------------------------------------

    async def _listen(self) -> None:
        while True:
            try:
                event = await self._mqtt.next(LISTEN_S)
            except DeadlineExceeded:
                continue
            match event:
                case Connected():
                    self._journal.info("broker.connected")
                    self.connected.set()
                    # Who came or left while we were away is not known otherwise.
                    self._uncalled = {device.id for device in self._fleet.devices()}
                    self.tell(set(self._uncalled))
                case Disconnected(reason):
                    if self.connected.is_set():
                        self._journal.warning("broker.lost", reason=reason)
                        self.connected.clear()
                        self._fleet.broker_lost()
                case Message():
                    self._hear(event)

    def _hear(self, message: Message) -> None:
        device = None
        try:
            device, kind = topics.parse_up(message.topic)
            match kind:
                case "hello":
                    self._fleet.heard_hello(device, message.payload)
                    self.tell(self._orders.joined(device) | {device})
                case "state" if not message.payload:
                    self._fleet.heard_nothing(device)
                case "state":
                    self._fleet.heard_state(device, message.payload)
                    self._reports.add(device)
                    self._reported.set()
                case "need":
                    self._fleet.heard(device)
                    self._ask(device, decode_json(Need, message.payload, f"the need of {device}", 16 << 10))
                case "res":
                    self._fleet.heard(device)
                    self._answer(device, message.payload)
                case "log":
                    self._journal.debug(
                        "device.said", device=device, text=message.payload[:500].decode(errors="replace")
                    )
        except (FormatError, NotFound) as error:
            self._journal.warning("message.dropped", device=device, topic=message.topic, error=error)

    # --- chunks -----------------------------------------------------------------------------------

    def _ask(self, device: str, need: Need) -> None:
        queue = self._queues.setdefault(device, collections.deque())
        waiting = set(queue)
        for first, last in need.ranges:
            for index in range(first, last):
                if (need.transfer, need.sha256, index) in waiting:
                    continue
                if len(queue) >= QUEUED_CHUNKS_A_DEVICE:
                    self.dropped_chunks += 1
                    continue
                queue.append((need.transfer, need.sha256, index))
        self._asked.set()

    async def _send_chunks(self) -> None:
        """Send one chunk to each waiting device in turn, within the byte rate."""
        loop = asyncio.get_running_loop()
        credit, last = float(BURST_BYTES), loop.time()
        while True:
            await self._asked.wait()
            self._asked.clear()
            while self._queues:
                for device in list(self._queues):
                    queue = self._queues.get(device)
                    if not queue:
                        self._queues.pop(device, None)
                        continue
                    frame = self._frame(device, *queue.popleft())
                    credit, last = min(BURST_BYTES, credit + (loop.time() - last) * BYTES_PER_S), loop.time()
                    if credit < len(frame):
                        await asyncio.sleep((len(frame) - credit) / BYTES_PER_S)
                    credit -= len(frame)
                    await self._publish_chunk(device, frame)
                await asyncio.sleep(0)

    def _frame(self, device: str, transfer: int, sha256: str, index: int) -> bytes:
        try:
            self._check_named(device, sha256)
            data = self._registry.read_chunk(sha256, index * CHUNK_BYTES, CHUNK_BYTES)
        except SkerryError as error:
            return encode_chunk(Chunk(transfer, index, str(error).encode()[:CHUNK_BYTES], gone=True))
        if not data:
            reason = f"the object {sha256[:12]}… has no chunk {index}"
            return encode_chunk(Chunk(transfer, index, reason.encode(), gone=True))
        return encode_chunk(Chunk(transfer, index, data))

    def _check_named(self, device: str, sha256: str) -> None:
        """Let a device have what its assignment leads to (a metadata set, its manifests, their parts), and what it is lent.

        Raises:
            Refused: it leads nowhere near this object.
            NotFound, FormatError, StorageError: a manifest of the assignment cannot be read.
        """
        lent = self.loans.holds(device, sha256, asyncio.get_running_loop().time())
        if lent or self._registry.is_metadata(sha256):
            return
        named = self._named.get(device)
        if named is None:
            named = self._named[device] = self._orders.manifests(device)
        if not any(sha256 in self._registry.objects_of(manifest) for manifest in named):
            raise Refused(f"the assignment of {device} names no object {sha256[:12]}…")

    async def _publish_chunk(self, device: str, frame: bytes) -> None:
        end = asyncio.get_running_loop().time() + PUBLISH_DEADLINE_S
        while True:
            try:
                self._mqtt.publish(topics.down(device, "blk"), frame, qos=0)
                self.sent_bytes += len(frame)
                return
            except Unreachable:
                if not self.connected.is_set() or asyncio.get_running_loop().time() > end:
                    self.dropped_chunks += 1
                    return
                await asyncio.sleep(0.02)

    # --- relays -----------------------------------------------------------------------------------

    async def relay(
        self, device: str, op: str, header: dict[str, object], body: bytes, deadline_s: float
    ) -> tuple[dict[str, object], bytes]:
        """Ask a device something over its topics and return its answer (header, body).

        Raises:
            NotFound: no such device.
            Unreachable: the device or the broker is not connected.
            DeadlineExceeded: no answer in time.
            FormatError: the question or the answer is too large.
            SkerryError: what the device itself answered as its error.
        """
        if not self._fleet.device(device).online:
            raise Unreachable(f"the device {device} is not connected")
        if len(self._relays) >= MAX_PENDING_RELAYS:
            raise Refused(f"{MAX_PENDING_RELAYS} questions to devices are already waiting: try again")
        number = secrets.token_hex(8)
        frame = pack_frame({**header, "id": number, "op": op, "deadline_ms": int(deadline_s * 1000)}, body)
        if len(frame) > MAX_RELAY_BYTES:
            raise FormatError(f"the question has {len(frame)} bytes, over MQTT at most {MAX_RELAY_BYTES} may travel")
        future: asyncio.Future[tuple[dict[str, object], bytes]] = asyncio.get_running_loop().create_future()
        self._relays[number] = (device, future)
        try:
            self._mqtt.publish(topics.down(device, "cmd"), frame, qos=1)
            async with asyncio.timeout(deadline_s):
                answer, data = await future
        except TimeoutError:
            raise DeadlineExceeded(f"the device {device} did not answer within {deadline_s:g} s") from None
        finally:
            del self._relays[number]
        if answer.get("ok") is not True:
            code = answer.get("code")
            raise error_for(
                code if isinstance(code, int) else 1, str(answer.get("error") or f"the device {device} gave no reason")
            )
        return answer, data

    def _answer(self, device: str, payload: bytes) -> None:
        header, body = unpack_frame(payload, MAX_RELAY_BYTES)
        number = header.get("id")
        asked, future = self._relays.get(number, ("", None)) if isinstance(number, str) else ("", None)
        if future is None or asked != device:
            self._journal.debug("answer.late", device=device)
            return
        if not future.done():
            future.set_result((header, bytes(body)))
