"""skerry-agent: the device's command line. argparse on purpose: it starts in milliseconds on a small board."""

import argparse
import contextlib
import fcntl
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from edge_agent.config import default_data, load_config
from skills import __version__, strangers
from skills.errors import Interrupted, Refused, SkerryError, UsageError
from skills.files import storage_errors

EPILOG = """\
first steps on a board:
  pip install 'skerry[edge]'           in an environment of its own
  skerry-agent doctor                  is this board fit?
  skerry-agent enroll TOKEN            the line that `skerry devices invite` printed
  skerry-agent run                     serves until it is stopped; keep it running with systemd

exit codes: 0 all good, 1 something went wrong, 2 wrong usage, 65 wrong format, 66 not found, 69 nobody answers,
74 disk, 75 too late, 77 not trusted, 78 a package is missing, 79 refused, 130 interrupted (docs/exit-codes.md).
The data directory is --data, else SKERRY_AGENT_DATA, else {data}.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        given = parser().parse_args(arguments)
    except UsageError as wrong:
        print(f"skerry-agent: {wrong}", file=sys.stderr)
        return wrong.exit_code
    if "data" in given:
        given.data = given.data.absolute()  # workers run in other directories
    try:
        strangers.check()
        return int(given.work(given))
    except KeyboardInterrupt:
        error: SkerryError = Interrupted("interrupted")
        if given.debug:
            raise
    except SkerryError as caught:
        error = caught
        if given.debug:
            raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if getattr(given, "json", False):
        print(json.dumps({"error": str(error), "code": error.exit_code}))
    else:
        print(f"skerry-agent: {error}", file=sys.stderr)
    return error.exit_code


class OneSentence(argparse.ArgumentParser):
    """A grammar whose errors are those of every other command: one sentence, raised."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see: {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    common = OneSentence(add_help=False)
    common.add_argument("--data", type=Path, metavar="DIR", default=_data(), help="the agent's data directory")
    common.add_argument("--config", type=Path, metavar="FILE", help="settings (default: DIR/agent.yaml, may be absent)")
    common.add_argument("--debug", action="store_true", help="log more, and show tracebacks")
    prints = OneSentence(add_help=False)
    prints.add_argument("--json", action="store_true", help="print JSON")

    top = OneSentence(
        prog="skerry-agent",
        description="Runs signed AI skills on this device: fetches, verifies, probes, serves and reports them.",
        epilog=EPILOG.format(data=default_data()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"skerry-agent {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    run = commands.add_parser(
        "run",
        parents=[common],
        help="serve this device's skills until stopped",
        description="Serves what is on the disk at once, then connects to the controller. SIGTERM ends it cleanly.",
    )
    run.set_defaults(work=_run)
    enroll = commands.add_parser(
        "enroll",
        parents=[common, prints],
        help="join a controller with an invitation",
        description="Makes this device's key, has it certified and pins the controller. The key never leaves the device.",
    )
    enroll.add_argument("token", metavar="TOKEN", nargs="+", help="the invitation, alone or after the controller's URL")
    enroll.add_argument("--name", help="this device's name in the fleet (default: chosen by the controller)")
    enroll.set_defaults(work=_enroll)
    status = commands.add_parser(
        "status",
        parents=[common, prints],
        help="what serves here, asked of the running agent or read from disk",
        description="Shows the skills of this device and how far each is.",
    )
    status.set_defaults(work=_status)
    doctor = commands.add_parser(
        "doctor",
        parents=[common, prints],
        help="is this device fit? what can it do?",
        description="Looks at runtimes, accelerators, memory, disk, identity and network; exit code 1 when something is bad.",
    )
    doctor.set_defaults(work=_doctor)
    return top


def _run(given: argparse.Namespace) -> int:
    import asyncio

    from edge_agent.identity import load_identity
    from edge_agent.logs import start_logging

    config = load_config(given.config, given.data)
    identity = load_identity(given.data)
    with _alone(given.data):
        start_logging(
            given.data, "debug" if given.debug else config.log_level, console=sys.stderr.isatty() or given.debug
        )
        interrupted = asyncio.run(_serve(given.data, identity, config))
    if interrupted:
        raise Interrupted("stopped by Ctrl-C; the skills' state is on the disk")
    return 0


async def _serve(data: Path, identity: Any, config: Any) -> bool:
    """Run the agent until a signal comes; True when it was Ctrl-C."""
    import asyncio

    from edge_agent.agent import Agent, Parts
    from edge_agent.capabilities import capabilities
    from edge_agent.links import LinkKeeper
    from edge_agent.standing import look
    from edge_agent.store import Store
    from edge_agent.trust import TrustProcess
    from edge_agent.workers import ZygoteWorkers
    from skills import topics
    from skills.messaging import Will
    from skills.mqtt import Mqtt, TlsFiles

    files = identity.files
    tls = TlsFiles(files.ca, files.cert, files.key) if identity.controller.mqtt_url.startswith("mqtts") else None
    parts = Parts(
        store=Store(data),
        # An empty state is what the controller reads as "this device is gone".
        mqtt=Mqtt(
            identity.controller.mqtt_url, identity.device, tls=tls, will=Will(topics.up(identity.device, "state"), b"")
        ),
        workers=ZygoteWorkers(config.runtimes),
        trust=TrustProcess(data),
        capabilities=lambda: capabilities(config),
        links=LinkKeeper(
            config.tail_url or identity.controller.tail_url,
            files.folder,
            data / config.tail_ca if config.tail_ca else None,
        ),
        standing=lambda: look(identity) if tls is not None else "silent",
    )
    agent = Agent(data, identity, config, parts)
    ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def end(*, interrupted: bool) -> None:
        if not ended.done():
            ended.set_result(interrupted)

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, lambda: end(interrupted=False))
    loop.add_signal_handler(signal.SIGINT, lambda: end(interrupted=True))
    try:
        await agent.start()
        # Not before: with the port taken there is nothing to announce.
        print(f"skerry-agent {__version__}: {identity.device}, log in {data / 'agent.log'}", flush=True)
        print(f"skills at http://{config.host}:{agent.endpoint.port}/v2", flush=True)
        return await ended
    finally:
        await agent.stop()


def _enroll(given: argparse.Namespace) -> int:
    from edge_agent.enroll import enroll, writable

    if len(given.token) > 2:
        raise UsageError("enroll takes the invitation, or the controller's URL and the invitation")
    writable(given.data)
    url = given.token[0] if len(given.token) == 2 else None
    controller = enroll(given.data, given.token[-1], url=url, name=given.name)
    if given.json:
        print(json.dumps({"device": controller.device, "controller": controller.url, "data": str(given.data)}))
    else:
        print(
            f"enrolled as {controller.device} with {controller.url}; go on with: skerry-agent run --data {given.data}"
        )
    return 0


def _status(given: argparse.Namespace) -> int:
    from edge_agent.status import read_status

    status = read_status(given.data)
    if given.json:
        print(json.dumps(status))
        return 0
    place = f"running (pid {status['pid']}), {status['endpoint']}" if status["running"] else "not running"
    print(f"{status['device']}: {place}")
    if status["running"]:
        away = f"not connected: {status['away']}" if status.get("away") else "not connected"
        print(f"controller {status['controller']}: {'connected' if status['connected'] else away}")
    for entry in status["skills"]:
        variants = ", ".join(f"{model}={variant}" for model, variant in entry.get("variants", {}).items())
        print(
            f"  {entry['skill']} {entry.get('version') or '-'}  {entry['phase']}  {variants}  {entry.get('reason', '')}".rstrip()
        )
        if ran := status.get("split", {}).get(entry["skill"]):
            place = ran["where"] if ran["where"] == "local" else f"{ran['where']} (cut {ran['cut']})"
            print(f"    last request {ran['ago_s']:.0f} s ago: {place}; {ran['tail'] or 'the tail answers'}")
    if not status["skills"]:
        print("  no skills yet")
    return 0


def _doctor(given: argparse.Namespace) -> int:
    from edge_agent.doctor import diagnose
    from skills.wire import to_plain

    diagnosis = diagnose(load_config(given.config, given.data), given.data)
    if given.json:
        print(json.dumps({"healthy": diagnosis.healthy, **to_plain(diagnosis)}))
    else:
        for finding in diagnosis.findings:
            print(f"{finding.level:<5}{finding.what:<12}{finding.text}")
    return 0 if diagnosis.healthy else 1


@contextlib.contextmanager
def _alone(data: Path) -> Iterator[None]:
    """Hold the data directory; two agents on one would undo each other's work.

    Raises:
        Refused: another agent holds it.
    """
    with storage_errors(data):
        lock = (data / "lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(f"another agent runs on {data}: stop it, or choose another --data") from None
        yield


def _data() -> Path:
    named = os.environ.get("SKERRY_AGENT_DATA")
    return Path(named) if named else default_data()


if __name__ == "__main__":
    sys.exit(main())
