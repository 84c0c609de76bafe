"""How a controller is set up: its options, its data directory, and the ports that devices were told about."""

import argparse
import contextlib
import dataclasses
import socket
import tempfile
from pathlib import Path
from typing import Annotated

from cloud.broker import check_port, free_port, loopback_of
from skills.errors import FormatError, Unreachable, UsageError
from skills.files import read_bytes, storage_errors, write_atomic, xdg_data
from skills.wire import Limits, decode_json, encode_json

LOOPBACK = "127.0.0.1"
ROOM_BYTES = 1 << 20  # a first start writes a third of this
Port = Annotated[int, Limits(min=1, max=65535)]


@dataclasses.dataclass(frozen=True, slots=True)
class Ports:
    """Where the three doors listen; kept in ports.json, for enrolled devices know them."""

    api: Port = 8443
    mqtt: Port = 8883
    tail: Port = 8444


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """All options of one controller. A port of None is the remembered or usual one, 0 any free one."""

    data: Path
    listen: str = LOOPBACK
    api_port: int | None = None
    mqtt_port: int | None = None
    tail_port: int | None = None
    broker: str | None = None
    embedded_broker: bool = False
    database: str | None = None
    log_level: str = "info"
    broker_deadline_s: float = 15.0
    quiet_when_ready: bool = False

    @property
    def database_url(self) -> str:
        """The database in SQLAlchemy's form."""
        return self.database or f"sqlite:///{self.data / 'skerry.db'}"

    @property
    def log_file(self) -> Path:
        """Where the controller writes what happens."""
        return self.data / "controller.log"

    @property
    def run_file(self) -> Path:
        """What a running controller tells about itself; written when everything is ready, removed at its end."""
        return self.data / "run.json"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m cloud.controller`."""
    parser.add_argument(
        "--data", type=Path, default=xdg_data("controller"), help="data directory (default: %(default)s)"
    )
    parser.add_argument("--listen", default=LOOPBACK, help="address to listen on (default: this machine only)")
    for door, what in (("api", "the API"), ("mqtt", "the broker"), ("tail", "the tail server")):
        parser.add_argument(
            f"--{door}-port", type=int, help=f"port of {what}; 0 takes any free one (default: {getattr(Ports(), door)})"
        )
    parser.add_argument("--broker", metavar="URL", help="a broker that somebody else runs, mqtts://HOST:PORT")
    parser.add_argument(
        "--broker-deadline", type=float, default=15.0, metavar="S", help="seconds to wait for the broker at the start"
    )
    parser.add_argument("--embedded-broker", action="store_true", help="run amqtt even where a mosquitto is installed")
    parser.add_argument(
        "--database",
        metavar="URL",
        help="an SQLAlchemy URL, e.g. of PostgreSQL (default: skerry.db in the data directory)",
    )
    parser.add_argument(
        "--until-eof", action="store_true", help="stop at the end of standard input, as when its writer ends"
    )
    parser.add_argument("--quiet-when-ready", action="store_true", help="once ready, log to the file only")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))


def settings_from(given: argparse.Namespace) -> Settings:
    """Check the options.

    Raises:
        UsageError: a port beyond 65535, or an address that is none.
    """
    ports = {f"{door}_port": getattr(given, f"{door}_port") for door in ("api", "mqtt", "tail")}
    for name, port in ports.items():
        if port is not None and not 0 <= port <= 65535:
            raise UsageError(f"--{name.replace('_', '-')} {port} is no port: give 0 to 65535")
    return Settings(
        data=given.data.absolute(),
        listen=resolve_address(given.listen),
        broker=given.broker,
        embedded_broker=given.embedded_broker,
        database=given.database,
        log_level=given.log_level,
        broker_deadline_s=given.broker_deadline,
        quiet_when_ready=given.quiet_when_ready,
        **ports,
    )


def resolve_address(listen: str) -> str:
    """Return the numeric form of an address of this machine.

    Raises:
        UsageError: it names nothing, or another machine.
    """
    try:
        found = socket.getaddrinfo(listen, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise UsageError(
            f"the address {listen!r} is not known here: give an address of this machine, or 0.0.0.0 for all"
        ) from None
    family, address = found[0][0], str(found[0][4][0])
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError as error:
        raise UsageError(
            f"cannot listen on {listen}: {(error.strerror or str(error)).lower()}; "
            "give an address of this machine, or 0.0.0.0 for all"
        ) from None
    return address


def choose_ports(settings: Settings) -> Ports:
    """Settle the three ports; `keep_ports` remembers them.

    A port that was asked for or that devices already know must be free; at the first start a usual one that is taken is
    replaced by a free one.

    Raises:
        Unreachable: a port is taken.
        StorageError: ports.json cannot be read.
    """
    known = _known_ports(settings.data)

    def settle(door: str, what: str) -> int:
        asked, remembered = getattr(settings, f"{door}_port"), getattr(known, door, None)
        return _settle(settings.listen, asked, remembered, getattr(Ports(), door), what, f"--{door}-port")

    ports = Ports(
        api=settle("api", "the API"),
        mqtt=(known or Ports()).mqtt if settings.broker else settle("mqtt", "the broker"),
        tail=settle("tail", "the tail server"),
    )
    if len({ports.api, ports.mqtt, ports.tail}) < 3:
        raise UsageError(
            f"the API, the broker and the tail server need three different ports, not {ports.api}, {ports.mqtt}, {ports.tail}"
        )
    return ports


def keep_ports(data: Path, ports: Ports) -> None:
    """Remember the ports of a start that succeeded: from now on devices may know them.

    Raises:
        StorageError: ports.json cannot be written.
    """
    if ports != _known_ports(data):
        write_atomic(data / "ports.json", encode_json(dataclasses.asdict(ports)))


def _known_ports(data: Path) -> Ports | None:
    path = data / "ports.json"
    return decode_json(Ports, read_bytes(path, "the list of ports", 4096), str(path)) if path.exists() else None


def _settle(listen: str, asked: int | None, known: int | None, usual: int, what: str, option: str) -> int:
    port = asked or known
    if asked == 0:  # any free one: the remembered one if it is, for devices know it
        with contextlib.suppress(Unreachable):
            if known is not None:
                check_port(listen, known, what, option)
                return known
        return free_port(listen)
    if port is not None:
        check_port(listen, port, what, option)
        return port
    try:
        check_port(listen, usual, what, option)
    except Unreachable:
        return free_port(listen)
    return usual


def hosts_of(listen: str) -> tuple[str, ...]:
    """Return the names and addresses by which devices may know this machine; the first is the one to tell them."""
    if listen not in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        return (listen,)
    found = [_outward_address(), socket.gethostname(), loopback_of(listen)]
    return tuple(dict.fromkeys(host for host in found if host))


def _outward_address() -> str:
    """Return the address that this machine has towards the rest of the world; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return ""


def make_directory(path: Path) -> None:
    """Make the data directory for its owner only.

    Raises:
        StorageError: it cannot be made or written.
    """
    with storage_errors(path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)


def check_room(data: Path) -> None:
    """Look why a start failed: on a full disk each part complains in words of its own, or cannot even do that.

    Raises:
        StorageError: the data directory has no room for what a start writes.
    """
    with storage_errors(data), tempfile.TemporaryFile(dir=data, buffering=0) as file:
        left = ROOM_BYTES
        while left > 0:
            left -= file.write(bytes(left)) or left


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """run.json: a controller that is ready, and how to reach it."""

    pid: int
    started: float
    url: str
    mqtt_url: str
    tail_url: str
    broker: str
    ca: str
    log: str
    version: str
    listen: str = ""  # empty: a version that did not tell


def read_run(path: Path) -> Run | None:
    """Return what a controller last wrote about itself, or None where there is nothing to believe."""
    try:
        return decode_json(Run, path.read_bytes(), str(path))
    except (OSError, FormatError):
        return None
