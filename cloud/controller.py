"""The controller process: `python -m cloud.controller`. Builds the parts, hands them to each other, runs them in one loop.

Order of a start: directory lock → ports → certificates → registry and database → broker child → connection to it → API →
tail child → ports.json → run.json. run.json is written last: who reads it finds everything ready.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import skills
from cloud.authority import Authority
from cloud.broker import Broker, bracket, choose_broker, loopback_of
from cloud.children import Child
from cloud.config import (
    Ports,
    Run,
    Settings,
    add_options,
    check_room,
    choose_ports,
    hosts_of,
    keep_ports,
    settings_from,
)
from cloud.database import Database, Release
from cloud.delivery import Delivery
from cloud.fleet import Fleet
from cloud.https import serve_https
from cloud.journal import Journal, open_journal
from cloud.lock import only_one
from cloud.measuring import Measuring
from cloud.orders import Orders
from cloud.permits import Permits
from cloud.registry import Registry
from skills.errors import Interrupted, SkerryError, StorageError, Unreachable
from skills.files import read_bytes, write_atomic
from skills.messaging import Connected, MqttClient
from skills.mqtt import Mqtt, TlsFiles
from skills.wire import encode_json

TAIL_DEADLINE_S = 15.0
REFRESH_EVERY_S = 600.0
KICK_DEADLINE_S = 5.0


class Controller:
    """All parts of one controller; broker and tail server are reached through addresses only."""

    def __init__(
        self,
        settings: Settings,
        ports: Ports,
        broker: Broker,
        authority: Authority,
        mqtt: MqttClient,
        journal: Journal,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Open what is on disk; nothing runs before `start`.

        Raises:
            StorageError: the data directory cannot be read or written.
        """
        self.settings, self.journal, self.authority, self.broker = settings, journal, authority, broker
        host = bracket(hosts_of(settings.listen)[0])
        self.url = f"https://{host}:{ports.api}"
        self.tail_url = f"grpcs://{host}:{ports.tail}"
        self.mqtt_url = broker.url if broker.kind == "external" else f"mqtts://{host}:{ports.mqtt}"
        self.token = _load_or_make_token(settings.data / "token")
        self.database = Database(settings.database_url)
        self.fleet = Fleet(self.database, authority, journal, now)
        self.registry = Registry(settings.data, self.database, journal, now)
        self.orders = Orders(self.database, self.fleet, self.registry, now)
        self.permits = Permits(settings.data / "tails" / "allowed.json", self.database, self.registry, journal)
        self.delivery = Delivery(mqtt, self.fleet, self.orders, self.registry, self.permits, journal)
        self.measuring = Measuring(self.fleet, self.registry, self.delivery)
        self.children: dict[str, Child] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._started = now()

    async def start(self) -> None:
        """Begin to serve devices.

        Raises:
            StorageError: the tail's table cannot be written.
        """
        self.permits.rebuild()
        await self.delivery.start()
        self._tasks.append(asyncio.create_task(self._keep_fresh(), name="keep metadata fresh"))

    async def stop(self) -> None:
        """End in order."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.delivery.stop()
        self.database.close()

    # --- what the API asks for --------------------------------------------------------------------

    def push(self, skill: str, version: str | None, selector: str, canary: str | None) -> dict[str, Any]:
        """Start a rollout, tell the first devices, and return it as the API shows it."""
        number, changed = self.orders.push(skill, version, selector, canary)
        self.delivery.tell(changed)
        return self.orders.rollout(number)

    def rollback(self, skill: str, selector: str) -> dict[str, Any]:
        """Start a rollback, tell the devices, and return it as the API shows it."""
        number, changed = self.orders.rollback(skill, selector)
        self.delivery.tell(changed)
        return self.orders.rollout(number)

    async def accept(self, manifest_sha256: str, targets: bytes) -> Release:
        """Take in a signed release."""
        release = await self.registry.accept(manifest_sha256, targets)
        self.fleet.record(
            "release.published", None, skill=release.skill, version=release.version, manifest=manifest_sha256
        )
        return release

    async def remove(self, device: str) -> None:
        """Remove a device: revoke its certificate, take its assignment back, and break its connection."""
        self.fleet.remove(device)
        with contextlib.suppress(Unreachable):
            self.delivery.clear(device)
        with contextlib.suppress(StorageError):  # its certificate is revoked; the next full look takes the row away too
            self.permits.update({device})
        if (child := self.children.get("broker")) is not None:
            child.signal(signal.SIGHUP)  # mosquitto and amqtt read the list of revoked certificates again
        if self.broker.kind != "amqtt":
            await self._kick(device)

    async def _kick(self, device: str) -> None:
        """Break a device's connection by connecting once under its name: MQTT ends the older one of two."""
        folder = self.settings.data / "broker"
        files = TlsFiles(self.authority.ca_file, folder / "kick.pem", folder / "kick.key")
        try:
            self.authority.impersonate(device, files.cert, files.key)
            client = Mqtt(self.broker.url, device, tls=files)
            await client.start()
            try:
                async with asyncio.timeout(KICK_DEADLINE_S):
                    while not isinstance(await client.next(KICK_DEADLINE_S), Connected):
                        pass
            finally:
                await client.stop()
        except (SkerryError, TimeoutError) as error:
            self.journal.warning("device.not_cut", device=device, error=error)
        finally:
            for path in (files.cert, files.key):
                path.unlink(missing_ok=True)

    def status(self) -> dict[str, Any]:
        """Return how the controller is."""
        enrolled, online = self.fleet.count()
        broker, tail = self.children.get("broker"), self.children.get("tail")
        return {
            "version": skills.__version__,
            "pid": os.getpid(),
            "started": self._started,
            "url": self.url,
            "data": str(self.settings.data),
            "log": str(self.settings.log_file),
            "broker": {
                "kind": self.broker.kind,
                "url": self.mqtt_url,
                "connected": self.delivery.connected.is_set(),
                "pid": broker.pid if broker else None,
            },
            "tail": {"url": self.tail_url, "pid": tail.pid if tail else None},
            "devices": {"enrolled": enrolled, "online": online},
            "releases": len(self.registry.releases()),
            "rollouts": {"open": sum(row["state"] in ("running", "paused") for row in self.orders.rollouts())},
            "sent_bytes": self.delivery.sent_bytes,
            "dropped_chunks": self.delivery.dropped_chunks,
        }

    async def _keep_fresh(self) -> None:
        while True:
            try:
                if self.registry.refresh_due():
                    self.registry.refresh()
                    self.delivery.tell_all()
                    self.journal.info("repository.refreshed", metadata=self.registry.metadata.sha256[:12])
            except SkerryError as error:
                self.journal.error("repository.stale", error=error)
            await asyncio.sleep(REFRESH_EVERY_S)


def _load_or_make_token(path: Path) -> str:
    if path.exists():
        return read_bytes(path, "the API's token", 4096).decode().strip()
    token = secrets.token_urlsafe(24)
    write_atomic(path, token.encode(), mode=0o600)
    return token


async def serve(settings: Settings, journal: Journal, stop: asyncio.Event) -> None:
    """Run a controller until `stop`.

    Raises:
        Unreachable: a port is taken or the broker does not answer.
        StorageError: the disk is full or refuses.
    """
    from cloud.api import create_app

    ports = choose_ports(settings)
    hosts = hosts_of(settings.listen)
    broker_hosts = (_host(settings.broker),) if settings.broker else ()
    authority = Authority(settings.data / "ca", (*hosts, *broker_hosts))
    broker = choose_broker(
        settings.broker,
        settings.listen,
        ports.mqtt,
        authority,
        settings.data / "broker",
        embedded=settings.embedded_broker,
    )
    mqtt = Mqtt(
        broker.url, "controller", tls=TlsFiles(authority.ca_file, authority.controller.cert, authority.controller.key)
    )
    controller = Controller(settings, ports, broker, authority, mqtt, journal)
    try:
        if broker.command:
            child = controller.children["broker"] = Child("broker", broker.command, journal)
            await child.start()
            await child.ready(lambda: _answers(broker.host, broker.port), settings.broker_deadline_s)
        await controller.start()
        await _connected(controller, settings.broker_deadline_s)
        async with serve_https(create_app(controller), settings.listen, ports.api, authority):
            await _start_tail(controller, settings, ports)
            run = Run(
                pid=os.getpid(),
                started=time.time(),
                url=controller.url,
                mqtt_url=controller.mqtt_url,
                tail_url=controller.tail_url,
                broker=broker.kind,
                ca=str(authority.ca_file),
                log=str(settings.log_file),
                version=skills.__version__,
                listen=settings.listen,
            )
            keep_ports(settings.data, ports)
            write_atomic(settings.run_file, encode_json(dataclasses.asdict(run)), mode=0o600)
            journal.info(
                "controller.ready",
                url=controller.url,
                mqtt=controller.mqtt_url,
                broker=broker.kind,
                pid=run.pid,
                data=settings.data,
            )
            if settings.quiet_when_ready:
                journal.leave_screen()
            await stop.wait()
            journal.info("controller.stopping")
            settings.run_file.unlink(missing_ok=True)
    finally:
        await controller.stop()
        for name in ("tail", "broker"):
            if name in controller.children:
                await controller.children[name].stop()


async def _connected(controller: Controller, deadline_s: float) -> None:
    try:
        async with asyncio.timeout(deadline_s):
            await controller.delivery.connected.wait()
    except TimeoutError:
        raise Unreachable(
            f"the broker {controller.broker.url} does not let the controller in: "
            f"is it running, and does it trust {controller.authority.ca_file}?"
        ) from None


async def _start_tail(controller: Controller, settings: Settings, ports: Ports) -> None:
    files = controller.authority
    listen = f"{bracket(settings.listen)}:{ports.tail}"
    port_file = settings.data / "tails" / ".port"
    port_file.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-P",
        "-m",
        "cloud.tail",
        "--tails",
        settings.data / "tails",
        "--listen",
        listen,
        "--port-file",
        port_file,
    ]
    command += ["--tls-ca", files.ca_file, "--tls-cert", files.server.cert, "--tls-key", files.server.key]
    command += ["--tls-crl", files.crl_file, "--allowed", settings.data / "tails" / "allowed.json"]
    child = controller.children["tail"] = Child("tail server", [str(word) for word in command], controller.journal)
    await child.start()
    await child.ready(port_file.exists, TAIL_DEADLINE_S)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((loopback_of(host), port), timeout=0.5).close()
    except OSError:
        return False
    return True


def _host(url: str) -> str:
    from cloud.broker import external_broker

    return external_broker(url).host


async def _run(settings: Settings, journal: Journal, *, until_eof: bool) -> None:
    """Serve until a signal comes.

    Raises:
        Interrupted: it was Ctrl-C; everything is stopped.
    """
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        stop.set()

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    if until_eof:
        loop.add_reader(sys.stdin.fileno(), stop.set)  # nobody writes: readable means that the starter has ended
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, interrupt)
    work = asyncio.create_task(serve(settings, journal, stop))
    waiting = asyncio.create_task(stop.wait())
    await asyncio.wait((work, waiting), return_when=asyncio.FIRST_COMPLETED)
    if not work.done() and not settings.run_file.exists():
        work.cancel()  # told to stop before everything was ready
        await asyncio.gather(work, return_exceptions=True)
    else:
        await work
    if interrupted:
        raise Interrupted("stopped by Ctrl-C; everything is on the disk")


def main(arguments: list[str] | None = None) -> int:
    """Run the controller in the foreground; the exit code is that of the error tree."""
    parser = argparse.ArgumentParser(
        prog="python -m cloud.controller", description="Run Skerry's controller in the foreground."
    )
    add_options(parser)
    given = parser.parse_args(arguments)
    data = given.data.absolute()  # for the directory changes below
    journal = open_journal(None, screen=True)
    try:
        settings = settings_from(given)
        with only_one(settings.data):
            settings.run_file.unlink(missing_ok=True)
            journal = open_journal(settings.log_file, level=settings.log_level, screen=True)
            os.chdir(settings.data)  # no other place is held on to
            asyncio.run(_run(settings, journal, until_eof=given.until_eof))
    except Interrupted as error:
        journal.info("controller.interrupted", error=error)
        return error.exit_code
    except (SkerryError, OSError) as error:
        cause = _cause(data, error)
        if cause is None:
            raise
        journal.error("controller.failed", error=cause)
        return cause.exit_code
    finally:
        with contextlib.suppress(OSError):  # what a full disk did not take is lost
            journal.close()
    return 0


def _cause(data: Path, error: SkerryError | OSError) -> SkerryError | None:
    """Return what there is to say about the end of a controller; None for an error that nobody foresaw."""
    if isinstance(error, (OSError, StorageError)):
        try:
            check_room(data)
        except StorageError as full:
            return full
    return None if isinstance(error, OSError) else error


if __name__ == "__main__":
    raise SystemExit(main())
