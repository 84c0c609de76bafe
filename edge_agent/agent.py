"""The daemon: serves from the disk first, then talks to its controller.

Five tasks, each the owner of its state: `reconcile` brings the device to what is wanted, `listen` takes what the broker
brings, `accept` checks assignments, `report` says what changed, the local endpoint answers programs on the device. The
network is on none of the paths that lead to serving.
"""

import asyncio
import collections
import contextlib
import dataclasses
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edge_agent.config import AgentConfig
from edge_agent.identity import Identity
from edge_agent.intake import Intake, Offload
from edge_agent.links import Links, NoLinks
from edge_agent.logs import last_lines
from edge_agent.measuring import Measuring
from edge_agent.reconcile import Reconciler
from edge_agent.serve import LocalEndpoint
from edge_agent.service import Service
from edge_agent.standing import Standing, unknown
from edge_agent.store import Store
from edge_agent.trust import Trust
from edge_agent.usage import UsageLog
from edge_agent.worker import pss_kb
from edge_agent.workers import Workers
from skills import __version__, topics
from skills.errors import DeadlineExceeded, FormatError, SkerryError, StorageError, TrustError, Unreachable, UsageError
from skills.files import write_atomic
from skills.messaging import Connected, Disconnected, Message, MqttClient
from skills.report import DeviceState, Hello, SkillState, decode_chunk
from skills.resolve import Capabilities
from skills.wire import encode_json, pack_frame, to_plain, unpack_frame

LOG = logging.getLogger("skerry.agent")
LISTEN_S = 5.0
RETRY_S = 5.0
FAREWELL_S = 2.0  # how long a stop waits for the broker to take the last message
REPORT_EVERY_S = 60.0
REPORT_PAUSE_S = 0.25  # progress is told at most four times a second
MAX_COMMAND_BYTES = 256 << 10
MAX_COMMANDS_AT_ONCE = 32
REMEMBERED_COMMANDS = 256
MAX_LOG_LINES = 2000
RUN_FILE = "run.json"
UNEXPLAINED = "Unspecified error"  # paho's words for every end of a connection that the broker did not explain
FOREIGN = "what answers at the broker's address does not prove with TLS that it is the controller's broker"
LOOK_EVERY_S = 60.0  # how often a device without a broker asks whether it is still known


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """What an agent is built of; each has a fake."""

    store: Store
    mqtt: MqttClient
    workers: Workers
    trust: Trust
    capabilities: Callable[[], Capabilities]
    links: Links = dataclasses.field(default_factory=NoLinks)
    standing: Callable[[], Standing] = lambda: "silent"
    offload: Offload = asyncio.to_thread
    chance: Callable[[], float] = secrets.SystemRandom().random


class Agent:
    """One device."""

    def __init__(self, data: Path, identity: Identity, config: AgentConfig, parts: Parts) -> None:
        self._data, self._identity, self._config, self._mqtt = data, identity, config, parts.mqtt
        self._store, self._trust = parts.store, parts.trust
        self._usage = UsageLog(data / "usage")
        self.service = Service(self._usage, config.max_waiting)
        self._intake = Intake(parts.mqtt, identity.device, parts.store, chance=parts.chance, offload=parts.offload)
        self.reconciler = Reconciler(
            parts.store,
            config,
            self._intake,
            self.service,
            parts.workers,
            parts.trust,
            parts.capabilities,
            parts.links,
            offload=parts.offload,
        )
        self.endpoint = LocalEndpoint(
            self.service, self.status, max_bytes=config.max_request_bytes, deadline_s=config.request_deadline_s
        )
        self._measuring = Measuring(
            data, identity.device, parts.mqtt, parts.workers, parts.trust, config, parts.capabilities,
            lambda: sum(worker.pss_kb for worker in self.reconciler.workers()) >> 10,
            chance=parts.chance, offload=parts.offload,
        )  # fmt: skip
        self._look_at_standing, self._offload = parts.standing, parts.offload
        self._looked_at, self._unknown, self._away = -LOOK_EVERY_S, False, ""
        self._boot = secrets.token_hex(8)
        self._nonce = ""
        self._sealed: bytes | None = None  # the newest assignment that came; an older one that waits is of no more use
        self._arrived = asyncio.Event()
        self._seq = 0
        self._reported: tuple[SkillState, ...] | None = None
        self._commands: set[asyncio.Task[None]] = set()
        self._seen_commands: collections.deque[str] = collections.deque(maxlen=REMEMBERED_COMMANDS)
        self._tasks: list[asyncio.Task[None]] = []
        self._started = time.monotonic()

    async def start(self) -> None:
        """Take up what the disk says, serve it, then begin to connect.

        Raises:
            Unreachable: the local endpoint's port is taken.
            StorageError: the data directory cannot be used.
        """
        self._store.prepare()
        self._measuring.clear()
        self.reconciler.boot()
        await self.endpoint.start(self._config.host, self._config.port)
        self._tasks.append(asyncio.create_task(self._forever(self.reconciler.run), name="reconcile"))
        run = {"pid": os.getpid(), "port": self.endpoint.port, "device": self._identity.device}
        with contextlib.suppress(StorageError):
            write_atomic(self._data / RUN_FILE, encode_json(run))
        LOG.info(
            "agent.started device=%s version=%s endpoint=http://%s:%s",
            self._identity.device,
            __version__,
            self._config.host,
            self.endpoint.port,
        )
        self._mqtt.subscribe((topics.down_filter(self._identity.device),))
        await self._mqtt.start()
        self._tasks.append(asyncio.create_task(self._forever(self._accept), name="accept"))
        self._tasks.append(asyncio.create_task(self._forever(self._listen), name="listen"))
        self._tasks.append(asyncio.create_task(self._forever(self._report), name="report"))

    async def stop(self) -> None:
        """End cleanly; what is on the disk is what the next start finds."""
        for task in [*self._tasks, *self._commands]:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._commands, return_exceptions=True)
        with contextlib.suppress(SkerryError):
            # The will again: a broker sends it for those who vanish only, and nobody should wait for one that left.
            self._mqtt.publish(topics.up(self._identity.device, "state"), b"")
        await self.endpoint.stop()
        await self._measuring.close()
        await self.reconciler.close()
        if self.reconciler.connected and not await self._mqtt.settled(FAREWELL_S):
            LOG.warning("farewell.lost device=%s", self._identity.device)
        await self._mqtt.stop()
        self._usage.close()
        (self._data / RUN_FILE).unlink(missing_ok=True)
        LOG.info("agent.stopped device=%s", self._identity.device)

    def status(self) -> dict[str, Any]:
        """Return what `skerry-agent status --json` shows of a running agent."""
        return {
            "device": self._identity.device,
            "running": True,
            "pid": os.getpid(),
            "version": __version__,
            "endpoint": f"http://{self._config.host}:{self.endpoint.port}",
            "controller": self._identity.controller.url,
            "connected": self.reconciler.connected,
            "away": "" if self.reconciler.connected else self._away,
            "uptime_s": round(time.monotonic() - self._started, 1),
            "pss_kb": pss_kb(),
            "answers": self._usage.answers,
            "usage_lost": self._usage.lost,
            "skills": [to_plain(state) for state in self.reconciler.states()],
            "split": {
                skill: {
                    "where": ran.where,
                    "cut": ran.cut,
                    "ago_s": round(max(0.0, time.time() - ran.time), 1),
                    "tail": ran.away,
                }
                for skill, ran in self.service.whereabouts().items()
            },
            "workers": [
                {"skill": w.load.skill, "version": w.load.version, "pss_kb": w.pss_kb}
                for w in self.reconciler.workers()
            ],
        }

    # --- tasks ------------------------------------------------------------------------------------

    async def _forever(self, work: Callable[[], Any]) -> None:
        pause = 0.5
        while True:
            try:
                await work()
            except asyncio.CancelledError:
                raise
            except SkerryError as error:
                LOG.error("task.failed task=%s error=%r", work.__name__, str(error))  # noqa: TRY400 - one sentence says it
            except Exception:
                LOG.exception("task.broke task=%s", work.__name__)
            await asyncio.sleep(pause)
            pause = min(pause * 2, 30.0)

    async def _accept(self) -> None:
        """Take up the last accepted assignment, then every newer one that comes."""
        if self.reconciler.assignment is None:
            await self._recall()
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            sealed, self._sealed = self._sealed, None
            if sealed is None:
                continue
            try:
                await self._judge(sealed)
            except (FormatError, TrustError) as error:
                LOG.warning("assignment.refused error=%r", str(error))
            except SkerryError as error:
                LOG.error("assignment.delayed error=%r", str(error))  # noqa: TRY400 - one sentence says it
                if self._sealed is None:
                    self._sealed = sealed
                await asyncio.sleep(RETRY_S)
                self._arrived.set()

    async def _recall(self) -> None:
        """Without a last assignment, or with a damaged one, the pointers alone decide."""
        sealed = self._store.read_assignment()
        if sealed is None:
            return
        try:
            last = await self._trust.open(sealed, self._identity.device, None)
        except (FormatError, TrustError) as error:
            LOG.warning("assignment.damaged error=%r", str(error))
            return
        self.reconciler.assign(last, fresh=False)

    async def _judge(self, sealed: bytes) -> None:
        last = self.reconciler.assignment
        assignment = await self._trust.open(sealed, self._identity.device, last)
        if last is not None and assignment.time < last.time:
            # Trusted time never runs backwards, whatever the controller's clock does.
            assignment = dataclasses.replace(assignment, time=last.time)
        fresh = bool(self._nonce) and secrets.compare_digest(assignment.nonce, self._nonce)
        if last is None or dataclasses.replace(assignment, nonce=last.nonce, time=last.time) != last or fresh:
            # Before anything is done about it: after a crash the device must not fall behind what it has accepted.
            self._store.write_assignment(sealed)
        if last is None or last.counter != assignment.counter:
            LOG.info("assignment.accepted counter=%s skills=%s", assignment.counter, len(assignment.skills))
        self.reconciler.assign(assignment, fresh=fresh)

    async def _listen(self) -> None:
        while True:
            try:
                event = await self._mqtt.next(LISTEN_S)
            except DeadlineExceeded:
                if self.reconciler.connected and not self._nonce:
                    self._greet()
                continue
            match event:
                case Connected():
                    LOG.info("broker.connected")
                    self._nonce, self._reported = "", None
                    self._looked_at, self._unknown = -LOOK_EVERY_S, False
                    self.reconciler.online(connected=True)
                    self._greet()
                case Disconnected(reason):
                    reason = reason.replace(UNEXPLAINED, "the connection was closed, and the broker gave no reason")
                    if not self._unknown:
                        self._away = reason
                    if self.reconciler.connected:
                        LOG.warning("broker.lost reason=%r", reason)
                    else:
                        LOG.debug("broker.away reason=%r", reason)
                    self.reconciler.online(connected=False)
                    self._wonder()
                case Message():
                    self._hear(event)

    def _wonder(self) -> None:
        """Find out, beside everything else, whether the connection is gone because the controller removed this device."""
        now = asyncio.get_running_loop().time()
        if self._unknown or now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        task = asyncio.create_task(self._question_standing(), name="standing")
        self._commands.add(task)
        task.add_done_callback(self._commands.discard)

    async def _question_standing(self) -> None:
        found = await self._offload(self._look_at_standing)
        if self.reconciler.connected or self._unknown:
            return
        if found == "unknown":
            self._unknown, self._away = True, unknown(self._identity)
            LOG.warning("device.unknown device=%s what=%r", self._identity.device, self._away)
        elif found == "foreign":
            LOG.warning("broker.foreign what=%r", FOREIGN)
            self._away = FOREIGN

    def _greet(self) -> None:
        nonce, device = secrets.token_hex(16), self._identity.device
        hello = Hello(device, nonce, self._boot, self.reconciler.refresh_capabilities())
        try:
            self._mqtt.publish(topics.up(device, "hello"), encode_json(hello))
        except Unreachable as error:
            LOG.debug("hello.delayed error=%r", str(error))  # said again soon, while no nonce is out
            return
        self._nonce = nonce

    def _hear(self, message: Message) -> None:
        try:
            device, kind = topics.parse_down(message.topic)
            if device != self._identity.device or not message.payload:
                return
            match kind:
                case "blk":
                    chunk = decode_chunk(message.payload)
                    self._intake.arrived(chunk)
                    self._measuring.arrived(chunk)
                case "desired":
                    self._sealed = message.payload
                    self._arrived.set()
                case "cmd":
                    self._command(message.payload)
        except (FormatError, TrustError) as error:
            LOG.warning("message.refused topic=%s error=%r", message.topic, str(error))

    # --- reports ----------------------------------------------------------------------------------

    async def _report(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_EVERY_S):
                    await self.reconciler.told.wait()
            due = not self.reconciler.told.is_set()
            self.reconciler.told.clear()
            if self.reconciler.connected:
                self._tell(due=due)
            await asyncio.sleep(REPORT_PAUSE_S)

    def _tell(self, *, due: bool) -> None:
        states = self.reconciler.states()
        if states == self._reported and not due:
            return
        assignment = self.reconciler.assignment
        self._seq += 1
        report = DeviceState(self._identity.device, self._seq, assignment.counter if assignment else 0, states[:64])
        try:
            self._mqtt.publish(topics.up(self._identity.device, "state"), encode_json(report))
            self._reported = states
        except SkerryError as error:
            LOG.debug("report.delayed error=%r", str(error))

    # --- questions over MQTT ----------------------------------------------------------------------

    def _command(self, payload: bytes) -> None:
        header, body = unpack_frame(payload, MAX_COMMAND_BYTES)
        number = header.get("id")
        if not isinstance(number, str) or len(number) > 64:
            raise FormatError("a command without a usable id")
        if number in self._seen_commands:
            return  # QoS 1 may deliver twice
        self._seen_commands.append(number)
        if len(self._commands) >= MAX_COMMANDS_AT_ONCE:
            self._reply(number, SkerryError(f"{MAX_COMMANDS_AT_ONCE} questions are being answered: try again"))
            return
        task = asyncio.create_task(self._obey(number, header, bytes(body)))
        self._commands.add(task)
        task.add_done_callback(self._commands.discard)

    async def _obey(self, number: str, header: Mapping[str, Any], body: bytes) -> None:
        try:
            match header.get("op"):
                case "infer":
                    reply, answer = await self._infer(header, body)
                case "hello":  # the controller was away when this device came: it may not have heard its first words
                    self._greet()
                    reply, answer = {}, b""
                case "logs":
                    lines = header.get("lines", 100)
                    if not isinstance(lines, int) or not 0 < lines <= MAX_LOG_LINES:
                        raise UsageError(f"{lines!r} log lines were asked for, expected 1 to {MAX_LOG_LINES}")
                    reply, answer = {}, last_lines(self._data, lines)
                case "measure":
                    reply, answer = await self._measuring.ask(body, _seconds(header))
                case other:
                    raise UsageError(f"this agent ({__version__}) does not know the operation {other!r}")
            frame = pack_frame({"id": number, "ok": True, **reply}, answer)
            if len(frame) > MAX_COMMAND_BYTES:
                raise FormatError(
                    f"the answer has {len(frame)} bytes, over MQTT at most {MAX_COMMAND_BYTES} may travel"
                )
            self._mqtt.publish(topics.up(self._identity.device, "res"), frame)
        except SkerryError as error:
            self._reply(number, error)
        except Exception:
            LOG.exception("command.broke op=%s", header.get("op"))
            self._reply(number, SkerryError("the agent failed, its log says more"))

    async def _infer(self, header: Mapping[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        skill, version, json_len = header.get("skill"), header.get("version"), header.get("json_len", len(body))
        if not isinstance(skill, str) or not (version is None or isinstance(version, str)):
            raise FormatError("the question names no skill")
        if not isinstance(json_len, int) or not 0 <= json_len <= len(body):
            raise FormatError(f"json_len is {json_len!r}, the body has {len(body)} bytes")
        return await self.service.infer(skill, version, body, json_len, _seconds(header))

    def _reply(self, number: str, error: SkerryError) -> None:
        frame = pack_frame({"id": number, "ok": False, "error": str(error), "code": error.exit_code})
        with contextlib.suppress(SkerryError):
            self._mqtt.publish(topics.up(self._identity.device, "res"), frame)


def _seconds(header: Mapping[str, Any]) -> float:
    """Return how long the asker waits."""
    deadline_ms = header.get("deadline_ms", 10_000)
    if not isinstance(deadline_ms, int | float) or isinstance(deadline_ms, bool):
        raise FormatError(f"deadline_ms is {deadline_ms!r}, expected a number")
    return deadline_ms / 1000
