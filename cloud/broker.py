"""The door to the MQTT broker: a mosquitto found on PATH, else amqtt, both as children; or a broker given by its URL.

All three demand a client certificate of the controller's own CA, take the client's name from it, and let a device write
its own `up/` topics and read its own `dn/` topics only. Nothing relies on a broker's memory: the database is the truth.
"""

import dataclasses
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from cloud.authority import CONTROLLER, Authority
from skills.errors import MissingExtra, Unreachable, UsageError
from skills.files import storage_errors, write_atomic
from skills.topics import ROOT

MAX_PACKET_BYTES = 300_000  # a relayed answer is at most 256 KiB
Kind = Literal["mosquitto", "amqtt", "external"]


@dataclasses.dataclass(frozen=True, slots=True)
class Broker:
    """How to reach the broker, and the command that runs it (none: somebody else runs it)."""

    kind: Kind
    host: str
    port: int
    command: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """The broker's address for a client on this machine."""
        return f"mqtts://{bracket(self.host)}:{self.port}"


def choose_broker(
    url: str | None, listen: str, port: int, authority: Authority, directory: Path, *, embedded: bool = False
) -> Broker:
    """Decide which broker serves, and write its configuration to `directory`.

    `embedded` asks for amqtt even where a mosquitto is installed.

    Raises:
        UsageError: the URL is not mqtts://HOST[:PORT].
        MissingExtra: neither mosquitto nor amqtt is installed.
    """
    with storage_errors(directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(directory / "acl", ACL.encode())
    mosquitto = find_mosquitto()
    config = directory / "mosquitto.conf"
    write_atomic(config, mosquitto_config(listen, port, authority, directory).encode())
    if url is not None:
        return external_broker(url)
    if mosquitto is not None and not embedded:
        return Broker("mosquitto", loopback_of(listen), port, (mosquitto, "-c", str(config)))
    try:
        import amqtt  # noqa: F401
    except ImportError:
        raise MissingExtra(
            "no MQTT broker: install mosquitto (apt-get install mosquitto), or pip install 'skerry[broker]', or give --broker URL"
        ) from None
    files = (
        "--ca",
        authority.ca_file,
        "--cert",
        authority.server.cert,
        "--key",
        authority.server.key,
        "--crl",
        authority.crl_file,
    )
    where = ("--host", listen, "--port", str(port))
    return Broker(
        "amqtt", loopback_of(listen), port, (sys.executable, "-P", "-m", "cloud.broker_amqtt", *where, *map(str, files))
    )


def external_broker(url: str) -> Broker:
    """Read the URL of a broker that somebody else runs.

    Raises:
        UsageError: not mqtts://HOST[:PORT].
    """
    parts = urlsplit(url)
    try:
        port = parts.port or 8883
    except ValueError:
        port = 0
    if parts.scheme != "mqtts" or not parts.hostname or not port or parts.path not in ("", "/") or parts.username:
        raise UsageError(
            f"the broker {url!r} is not understood, expected mqtts://HOST:PORT (clients are known by their certificate)"
        )
    return Broker("external", parts.hostname, port)


def find_mosquitto() -> str | None:
    """Return the path of a mosquitto on this machine; Debian keeps it in /usr/sbin, which is not on everybody's PATH."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


ACL = f"""\
# %u is the common name of the client's certificate: a device's id.
user {CONTROLLER}
topic readwrite {ROOT}/#
topic read $SYS/#
pattern write {ROOT}/+/%u/up/#
pattern read {ROOT}/+/%u/dn/#
"""


def mosquitto_config(listen: str, port: int, authority: Authority, directory: Path) -> str:
    """Return the configuration of mosquitto 2.0; it is also the example for a broker of your own."""
    lines = [
        "per_listener_settings false",
        # Started by root it would drop to a user who cannot read the keys; the controller should not run as root at all.
        *(["user root"] if os.geteuid() == 0 else []),
        f"listener {port} {listen}",
        "protocol mqtt",
        f"cafile {authority.ca_file}",
        f"certfile {authority.server.cert}",
        f"keyfile {authority.server.key}",
        f"crlfile {authority.crl_file}",
        "require_certificate true",
        "use_identity_as_username true",
        "use_username_as_clientid true",
        "tls_version tlsv1.2",
        "allow_anonymous false",
        f"acl_file {directory / 'acl'}",
        "max_connections 20000",
        "max_keepalive 300",
        f"max_packet_size {MAX_PACKET_BYTES}",
        "max_inflight_messages 32",
        # The default of 1000 messages loses bursts silently; bytes are the real bound of each client.
        "max_queued_messages 100000",
        "max_queued_bytes 67108864",
        "queue_qos0_messages false",
        "allow_zero_length_clientid false",
        "persistent_client_expiration 1d",
        "memory_limit 2147483648",
        "set_tcp_nodelay true",
        # The controller publishes every assignment again after a restart: a file could only bring back older ones.
        "persistence false",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "connection_messages false",
        "log_timestamp false",
    ]
    return "\n".join(lines) + "\n"


def loopback_of(listen: str) -> str:
    """Return the address at which this machine reaches its own listener."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listen, listen)  # noqa: S104 - compared


def bracket(host: str) -> str:
    """Write a host as it stands in a URL."""
    return f"[{host}]" if ":" in host else host


def free_port(listen: str) -> int:
    """Return a TCP port that nobody listens on at the moment."""
    with _bound(listen, 0) as listener:
        return int(listener.getsockname()[1])


def check_port(listen: str, port: int, what: str, option: str) -> None:
    """Refuse a port that is taken.

    Raises:
        Unreachable: it is taken, or the address is not this machine's.
    """
    try:
        _bound(listen, port).close()
    except OSError as error:
        raise Unreachable(
            f"cannot listen for {what} on {bracket(listen)}:{port}: {(error.strerror or str(error)).lower()}; "
            f"free it or choose another one with {option}"
        ) from None


def _bound(listen: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in listen else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((listen, port))
        listener.listen(1)
    except OSError:
        listener.close()
        raise
    return listener
