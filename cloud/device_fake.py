"""A device without models: speaks the whole delivery protocol and says that it serves. For simulations and load tests.

It accepts what its controller's director key signed, fetches the manifest and the parts that it would need, chunk by chunk,
checks every hash, and reports. `outcome` decides what becomes of a version that arrived whole, `figures` what it has measured.
"""

import asyncio
import dataclasses
import secrets
from collections.abc import Callable

from skills import topics
from skills.bundle import Bundle, decode_bundle, fit, parts_for, unpack_part
from skills.desired import Assignment, ObjectRef, WantedSkill, open_sealed
from skills.errors import DeadlineExceeded, FormatError, Refused, SkerryError, TrustError
from skills.files import sha256_hex
from skills.measurement import RUNTIME, Figures, Order, Work, open_order, read_work
from skills.messaging import Connected, Disconnected, Message, MqttClient
from skills.report import CHUNK_BYTES, MAX_CHUNKS_A_NEED, DeviceState, Hello, Need, Phase, SkillState, decode_chunk
from skills.resolve import Capabilities, Misfit
from skills.split_plan import Millis
from skills.wire import encode_json, pack_frame, unpack_frame

ANY_PC = Capabilities(
    arch="x86_64", isa=(), npu=(), runtimes={"onnxruntime": "1.31.0"}, ram_mb=1024, disk_mb=1024, agent="fake/1"
)
ASK_AGAIN_S = 0.5

Outcome = Callable[[WantedSkill], tuple[Phase, str]]


def made_up(sha256: str, work: Work) -> Figures:
    """Return figures of a device that needs a millisecond for each segment, and half of one for each coding."""
    heads = tuple(Millis(float(count), float(count)) for count in range(len(work.segments) + 1))
    codings = tuple(tuple(0.5 for _ in crossing.codings) for crossing in work.crossings)
    memory = tuple(float(count) for count in range(1, len(work.segments) + 1))
    return Figures(sha256, heads, codings, memory, 1, 0.0, 1, "a made-up board", ANY_PC.arch, RUNTIME, ANY_PC.agent)


@dataclasses.dataclass(slots=True)
class _Fetch:
    ref: ObjectRef
    transfer: int
    pieces: dict[int, bytes]

    @property
    def missing(self) -> list[int]:
        count = -(-self.ref.size // CHUNK_BYTES)
        return [index for index in range(count) if index not in self.pieces]


class FakeDevice:
    """One device over one MQTT client; `run` is its only task."""

    def __init__(
        self,
        device: str,
        mqtt: MqttClient,
        director_pem: bytes,
        capabilities: Capabilities = ANY_PC,
        outcome: Outcome = lambda wanted: ("serving", ""),
    ) -> None:
        self.device, self.capabilities, self.outcome = device, capabilities, outcome
        self.assignment: Assignment | None = None
        self.objects: dict[str, bytes] = {}
        self.states: dict[str, SkillState] = {}
        self.gone: list[str] = []
        self.lost = 0  # connections that broke or were refused
        self.fresh = asyncio.Event()
        self._mqtt, self._director = mqtt, director_pem
        self._nonce = ""
        self._seq = 0
        self._fetch: _Fetch | None = None
        self.figures: Callable[[str, Work], Figures] = made_up
        self._order: tuple[Order, str] | None = None  # what it is to measure, and the question that waits for it

    async def run(self) -> None:
        """Connect and follow the controller until cancelled."""
        self._mqtt.subscribe((topics.down_filter(self.device),))
        await self._mqtt.start()
        try:
            while True:
                try:
                    event = await self._mqtt.next(ASK_AGAIN_S)
                except DeadlineExceeded:
                    self._ask()
                    continue
                match event:
                    case Connected():
                        self._hello()
                    case Disconnected():
                        self.lost += 1
                    case Message(topic, payload):
                        self._hear(topics.parse_down(topic)[1], payload)
        finally:
            await self._mqtt.stop()

    def serves(self, skill: str, version: str) -> bool:
        """Say whether it reported that it serves this version."""
        state = self.states.get(skill)
        return state is not None and (state.version, state.phase) == (version, "serving")

    def _hello(self) -> None:
        self._nonce = secrets.token_hex(16)
        hello = Hello(self.device, self._nonce, "boot", self.capabilities)
        self._mqtt.publish(topics.up(self.device, "hello"), encode_json(hello))

    def _hear(self, kind: str, payload: bytes) -> None:
        if kind == "blk":
            self._take(payload)
        elif kind == "cmd":
            self._answer(payload)
        elif payload:
            try:
                self.assignment = open_sealed(payload, self._director, self.device, self.assignment)
            except (TrustError, FormatError):
                return
            if self.assignment.nonce == self._nonce:
                self.fresh.set()
            self._go_on()

    def _answer(self, payload: bytes) -> None:
        header, body = unpack_frame(payload, 256 << 10)
        if header["op"] == "measure":
            self._measure(header["id"], bytes(body))
            return
        answer: dict[str, object] = {"id": header["id"], "ok": True, "json_len": header.get("json_len", len(body))}
        echo = b"a line of the log\n" if header["op"] == "logs" else bytes(body)
        self._mqtt.publish(topics.up(self.device, "res"), pack_frame(answer, echo))

    def _measure(self, number: str, sealed: bytes) -> None:
        try:
            self._order = open_order(sealed, self._director, self.device), number
        except (TrustError, FormatError) as error:
            self._say(number, {"ok": False, "error": str(error), "code": error.exit_code})
            return
        self._go_on()

    def _next_to_measure(self, order: Order, number: str) -> ObjectRef | None:
        """Return what is still missing of a work; where nothing is, answer with its figures."""
        if order.work.sha256 not in self.objects:
            return order.work
        work = read_work(self.objects[order.work.sha256])
        for part in work.parts:
            if part.wire_sha256 not in self.objects:
                return ObjectRef(part.wire_sha256, part.wire_size)
        figures = encode_json(self.figures(order.work.sha256, work))
        self._say(number, {"ok": True, "state": "done", "share": 1.0}, figures)
        return None

    def _say(self, number: str, answer: dict[str, object], body: bytes = b"") -> None:
        self._mqtt.publish(topics.up(self.device, "res"), pack_frame({"id": number, **answer}, body))

    def _go_on(self) -> None:
        """Look at what is wanted and start the next fetch, or report."""
        if self._order is not None:
            ref = self._next_to_measure(*self._order)
            if ref is not None:
                self._fetch = _Fetch(ref, secrets.randbits(32), {})
                self._ask()
                return
            self._order = None
        assignment = self.assignment
        if assignment is None:
            return
        self._fetch = None
        wanted = {skill.skill: skill for skill in assignment.skills}
        for name in [name for name in self.states if name not in wanted]:
            del self.states[name]
        for skill in assignment.skills:
            known = self.states.get(skill.skill)
            if known is not None and (known.manifest_sha256, known.phase) == (skill.manifest.sha256, "serving"):
                continue
            if known is not None and known.manifest_sha256 == skill.manifest.sha256 and known.phase != "fetching":
                continue
            ref = self._next_object(skill)
            if ref is not None:
                self.states[skill.skill] = self._state(skill, "fetching", "")
                self._fetch = _Fetch(ref, secrets.randbits(32), {})
                self._ask()
                break
        self._report()

    def _next_object(self, wanted: WantedSkill) -> ObjectRef | None:
        """Return what is still missing of a version; where nothing is, take its outcome."""
        if wanted.manifest.sha256 not in self.objects:
            return wanted.manifest
        bundle = decode_bundle(self.objects[wanted.manifest.sha256], "the manifest")
        choice = fit(bundle, self.capabilities)
        if isinstance(choice, Misfit):
            self.states[wanted.skill] = self._state(wanted, "refused", str(choice))
            return None
        parts = parts_for(bundle, choice)
        for part in parts:
            if part.wire_sha256 not in self.objects:
                return ObjectRef(part.wire_sha256, part.wire_size)
        self.states[wanted.skill] = self._settled(wanted, bundle)
        return None

    def _settled(self, wanted: WantedSkill, bundle: Bundle) -> SkillState:
        try:
            for part in bundle.parts:
                if part.wire_sha256 in self.objects:
                    unpack_part(part, self.objects[part.wire_sha256])
        except SkerryError as error:
            return self._state(wanted, "refused", str(error))
        return self._state(wanted, *self.outcome(wanted))

    def _state(self, wanted: WantedSkill, phase: Phase, reason: str) -> SkillState:
        return SkillState(wanted.skill, wanted.version, wanted.manifest.sha256, phase, reason)

    def _ask(self) -> None:
        if self._fetch is None:
            return
        missing = self._fetch.missing[: MAX_CHUNKS_A_NEED // 4]
        ranges: list[tuple[int, int]] = []
        for index in missing:
            if ranges and ranges[-1][1] == index:
                ranges[-1] = (ranges[-1][0], index + 1)
            elif len(ranges) < 16:
                ranges.append((index, index + 1))
        need = Need(self._fetch.transfer, self._fetch.ref.sha256, tuple(ranges))
        self._mqtt.publish(topics.up(self.device, "need"), encode_json(need))

    def _take(self, payload: bytes) -> None:
        chunk = decode_chunk(payload)
        fetch = self._fetch
        if fetch is None or chunk.transfer != fetch.transfer:
            return
        if chunk.gone:
            self.gone.append(chunk.data.decode())
            if self._order is not None:
                refused = {"ok": False, "error": self.gone[-1], "code": Refused.exit_code}
                self._say(self._order[1], refused)
                self._order = self._fetch = None
            return
        fetch.pieces[chunk.index] = chunk.data
        if fetch.missing:
            if len(fetch.pieces) % (MAX_CHUNKS_A_NEED // 4) == 0:
                self._ask()
            return
        data = b"".join(fetch.pieces[index] for index in sorted(fetch.pieces))
        if sha256_hex(data) != fetch.ref.sha256:
            name = next(iter(self.states))
            self.states[name] = dataclasses.replace(
                self.states[name], phase="refused", reason="an object arrived with another hash"
            )
        self.objects[fetch.ref.sha256] = data
        self._go_on()

    def _report(self) -> None:
        if self.assignment is None:
            return
        self._seq += 1
        state = DeviceState(self.device, self._seq, self.assignment.counter, tuple(self.states.values()))
        self._mqtt.publish(topics.up(self.device, "state"), encode_json(state))
