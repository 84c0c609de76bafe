"""agent.yaml: what the owner of a device decides. Every key has a default, so the file may be absent."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from skills.errors import FormatError, NotFound
from skills.files import read_bytes, xdg_data
from skills.manifest import Runtime
from skills.wire import Doc, Limits, decode_yaml

FILE_NAME = "agent.yaml"
LOOPBACK = ("127.0.0.1", "localhost")


@dataclasses.dataclass(frozen=True, slots=True)
class AgentConfig:
    """Settings of one device agent."""

    listen: Annotated[
        str,
        Limits(pattern=r"(127\.0\.0\.1|localhost):\d{1,5}", hint="a loopback address like 127.0.0.1:8600"),
        Doc("where programs on this device ask the skills; port 0 takes any free one"),
    ] = "127.0.0.1:8600"
    memory_mb: Annotated[int, Limits(min=1), Doc("memory offered to skills, in MiB; caps what the device reports")] = (
        512
    )
    disk_mb: Annotated[int, Limits(min=1), Doc("disk space offered to skills, in MiB")] = 2048
    runtimes: Annotated[tuple[Runtime, ...], Limits(min=1), Doc("model runtimes that may be used")] = (
        "onnxruntime",
        "litert",
    )
    timer: Annotated[
        str,
        Limits(pattern=r"local|dilated\(\d{1,3}(\.\d{1,3})?\)", hint="local or dilated(FACTOR)"),
        Doc("local: run at full speed; dilated(10): behave like a device ten times slower, for trying things out"),
    ] = "local"
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Doc("least level that is logged")] = "info"
    tail_deadline_ms: Annotated[
        int, Limits(min=1, max=60_000), Doc("how long a split skill waits for the cloud before it finishes here")
    ] = 250
    tail_url: Annotated[
        str,
        Limits(
            pattern=r"(grpcs?://(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253}):\d{1,5})?",
            hint="grpcs://HOST:PORT, or grpc://HOST:PORT without TLS",
        ),
        Doc("the server that computes the tails of this device's split skills; empty: the controller's, as enrolled"),
    ] = ""
    tail_ca: Annotated[
        str,
        Limits(max_items=4096),
        Doc("PEM file with the CA that vouches for `tail_url`, from the data directory; empty: the controller's"),
    ] = ""
    request_deadline_s: Annotated[
        float, Limits(min=0.01, max=600), Doc("how long a request to a skill may take when it names no deadline")
    ] = 30.0
    max_request_bytes: Annotated[int, Limits(min=1024, max=256 << 20), Doc("largest request on the local endpoint")] = (
        16 << 20
    )
    max_waiting: Annotated[
        int, Limits(min=1, max=10_000), Doc("requests that may wait for one skill; more get 503")
    ] = 64
    trial_s: Annotated[
        float,
        Limits(min=0.1, max=86_400),
        Doc("how long a new version is on trial: if it keeps dying, the old one returns"),
    ] = 60.0

    def __post_init__(self) -> None:
        if self.port > 65535:
            raise FormatError(f"'listen' names port {self.port}, the largest is 65535")
        if self.tail_url and not 0 < int(self.tail_url.rpartition(":")[2]) <= 65535:
            raise FormatError(f"'tail_url' is {self.tail_url}: a port is 1 to 65535")
        if self.tail_ca and not self.tail_url.startswith("grpcs:"):
            raise FormatError("'tail_ca' counts only for a 'tail_url' that begins with grpcs://")

    @property
    def host(self) -> str:
        return self.listen.rpartition(":")[0]

    @property
    def port(self) -> int:
        return int(self.listen.rpartition(":")[2])


def load_config(path: Path | None, data: Path) -> AgentConfig:
    """Read `path`, or `agent.yaml` in the data directory when there is one, or take the defaults.

    Raises:
        NotFound: `path` was named and does not exist.
        FormatError: what is wrong, with the line and the nearest right key.
        StorageError: it cannot be read.
    """
    try:
        text = read_bytes(path or data / FILE_NAME, "the configuration", 64 << 10)
    except NotFound:
        if path is not None:
            raise
        return AgentConfig()
    try:
        return decode_yaml(AgentConfig, text.decode(), str(path or data / FILE_NAME))
    except UnicodeDecodeError:
        raise FormatError(f"the configuration {path or data / FILE_NAME} is not UTF-8 text") from None


def default_data() -> Path:
    """Return the data directory of an agent that was told none."""
    return xdg_data("agent")
