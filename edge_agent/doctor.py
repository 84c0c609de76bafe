"""Is this device fit to run skills? One finding a line: what was looked at, how it is, what to do."""

import dataclasses
import importlib.util
import socket
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from edge_agent.capabilities import accelerators, capabilities, free_mb, memory_mb
from edge_agent.config import AgentConfig
from edge_agent.identity import Identity, load_identity
from edge_agent.runtimes import installed
from edge_agent.standing import look, unknown
from skills.errors import SkerryError
from skills.resolve import Capabilities

Level = Literal["good", "note", "bad"]
REACH_S = 5.0
ENOUGH_MB = 256  # with less than this free, the first larger skill waits for room
PACKAGES = {
    "paho.mqtt": "paho-mqtt",
    "cryptography": "cryptography",
    "numpy": "numpy",
    "h11": "h11",
    "tuf": "tuf",
    "grpc": "grpcio",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    level: Level
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings, and what the device would report of itself."""

    findings: tuple[Finding, ...]
    capabilities: Capabilities

    @property
    def healthy(self) -> bool:
        return all(finding.level != "bad" for finding in self.findings)


def diagnose(config: AgentConfig, data: Path, root: Path = Path("/")) -> Diagnosis:
    """Look at everything; never raises for what it finds."""
    found = capabilities(config, root)
    findings = [
        Finding("machine", "good", f"{found.arch}, {', '.join(found.isa) or 'no known instruction sets'}"),
        *_runtimes(config),
        *_packages(),
        *_accelerators(root),
        Finding("memory", "good", f"{found.ram_mb} of {memory_mb(root)} MiB are offered to skills (memory_mb)"),
        _disk(data),
        *_identity(data),
    ]
    return Diagnosis(tuple(findings), found)


def _runtimes(config: AgentConfig) -> list[Finding]:
    found = installed(config.runtimes)
    findings = [Finding("runtime", "good", f"{name} {version}") for name, version in found.items()]
    findings += [
        Finding("runtime", "note", f"{name} is not installed") for name in config.runtimes if name not in found
    ]
    if not found:
        findings.append(Finding("runtime", "bad", "no model runtime at all: pip install 'skerry[edge]'"))
    return findings


def _packages() -> list[Finding]:
    missing = []
    for module, distribution in PACKAGES.items():
        try:
            there = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            there = False
        if not there:
            missing.append(distribution)
    if missing:
        return [Finding("packages", "bad", f"{', '.join(missing)} not installed: pip install 'skerry[edge]'")]
    return [Finding("packages", "good", "all are installed")]


def _accelerators(root: Path) -> list[Finding]:
    found = accelerators(root)
    if not found:
        return [Finding("accelerator", "note", "none found; models run on the CPU")]
    return [
        Finding("accelerator", "good" if entry.node and entry.library else "note", f"{entry.name}: {entry.state}")
        for entry in found
    ]


def _disk(data: Path) -> Finding:
    free = free_mb(data)
    level: Level = "good" if free > ENOUGH_MB else "bad"
    return Finding("disk", level, f"{free} MiB free at {data}")


def _identity(data: Path) -> list[Finding]:
    try:
        identity = load_identity(data)
    except SkerryError as error:
        return [Finding("identity", "bad", str(error))]
    findings = [Finding("identity", "good", f"enrolled as {identity.device} with {identity.controller.url}")]
    for what, url in (("controller", identity.controller.url), ("broker", identity.controller.mqtt_url)):
        parts = urlsplit(url)
        port = parts.port or {"https": 443, "mqtts": 8883, "mqtt": 1883}.get(parts.scheme, 443)
        try:
            socket.create_connection((parts.hostname or "", port), timeout=REACH_S).close()
            findings.append(Finding(what, "good", f"{parts.hostname}:{port} answers"))
        except OSError as error:
            text = f"{parts.hostname}:{port} does not answer ({error.strerror or error}); skills go on without it"
            findings.append(Finding(what, "note", text))
    if identity.controller.mqtt_url.startswith("mqtts"):
        findings += _standing(identity)
    return findings


def _standing(identity: Identity) -> list[Finding]:
    match look(identity):
        case "known":
            return [Finding("standing", "good", "the broker takes this device's certificate")]
        case "unknown":
            return [Finding("standing", "bad", unknown(identity))]
        case "foreign":
            return [Finding("standing", "bad", "what answers is not the broker of the controller this device joined")]
        case "silent":
            return []  # said above
