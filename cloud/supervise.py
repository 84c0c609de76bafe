"""Start, look at and stop a controller process from outside: what `skerry up`, `down` and `status` call.

A controller is believed only when its run.json is there, its process lives and holds the lock of the data directory; a
run.json that a crash left behind is recognised by that and ignored. Imports nothing heavy.
"""

import dataclasses
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from cloud.broker import external_broker
from cloud.config import Run, Settings, check_room, make_directory, read_run
from cloud.lock import is_held
from skills.errors import DeadlineExceeded, NotFound, SkerryError, StorageError, UsageError, error_for
from skills.files import read_bytes

START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 20.0
LOOK_EVERY_S = 0.05


@dataclasses.dataclass(frozen=True, slots=True)
class Running:
    """A controller that is ready, and all that a client needs to talk to it."""

    run: Run
    token: str
    ca: Path
    already: bool = False


def start(settings: Settings, *, detach: bool = True, deadline_s: float = START_DEADLINE_S) -> Running:
    """Start a controller in a process of its own and wait until it is ready; one that runs already is returned.

    With `detach` it lives on after this process and its terminal; else it ends with this process, however that ends.

    Raises:
        SkerryError: the controller's own error, with its sentence and exit code.
        DeadlineExceeded: it was not ready in time; it is stopped again.
    """
    make_directory(settings.data)
    known = status(settings.data)
    if known is not None:
        return dataclasses.replace(known, already=True)
    pid = _spawn(settings, detach=detach)
    try:
        return _wait_ready(settings, pid, deadline_s)
    except BaseException:
        _end(pid, lambda: _exit_code(pid) is not None, STOP_DEADLINE_S)
        raise


def _spawn(settings: Settings, *, detach: bool) -> int:
    log = str(settings.data / "start.log")
    command = [
        sys.executable,
        "-P",
        "-m",
        "cloud.controller",
        *options(settings),
        "--quiet-when-ready",
        *([] if detach else ["--until-eof"]),
    ]
    # The outputs of a controller must not keep the caller's terminal or pipe open.
    actions = [
        (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    read_end, write_end = os.pipe()  # write_end is never closed: the kernel does that when this process ends
    actions.append(
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0) if detach else (os.POSIX_SPAWN_DUP2, read_end, 0)
    )
    try:
        return os.posix_spawn(sys.executable, command, os.environ, file_actions=actions, setsid=True)
    except OSError as error:
        raise StorageError(f"cannot start the controller: {error.strerror or error}") from None
    finally:
        os.close(read_end)
        if detach:
            os.close(write_end)


def status(data: Path) -> Running | None:
    """Return the controller that runs on a data directory, or None."""
    run = read_run(data / "run.json")
    if run is None or not is_held(data) or not _alive(run.pid):
        return None
    try:
        token = read_bytes(data / "token", "the API's token", 4096).decode().strip()
    except NotFound:
        return None
    return Running(run, token, Path(run.ca))


def stop(data: Path, deadline_s: float = STOP_DEADLINE_S) -> bool:
    """Stop the controller of a data directory with all its children; False when none ran.

    It is stopped when its process is gone: the lock is free a moment earlier.

    Raises:
        DeadlineExceeded: it did not end in time, not even by force.
    """
    path = data / "run.json"
    running = status(data)
    if running is None:
        if not is_held(data):
            path.unlink(missing_ok=True)  # left behind by a crash
        return False
    _end(running.run.pid, lambda: _gone(running.run.pid), deadline_s)
    path.unlink(missing_ok=True)
    return True


def check_same(run: Run, asked: Settings, *, listen_given: bool) -> None:
    """Refuse settings that were asked for and that a running controller does not have; what nobody gave may be anything.

    Raises:
        UsageError: it runs with other settings.
    """
    other = []
    if listen_given and run.listen and asked.listen != run.listen:
        other.append(f"--listen {run.listen}, not {asked.listen}")
    for option, port, url in (
        ("--api-port", asked.api_port, run.url),
        ("--mqtt-port", asked.mqtt_port, None if run.broker == "external" else run.mqtt_url),
        ("--tail-port", asked.tail_port, run.tail_url),
    ):
        if port and url is not None and port != urlsplit(url).port:
            other.append(f"{option} {urlsplit(url).port}, not {port}")
    if asked.broker is not None and (run.broker, run.mqtt_url) != (
        "external",
        url := external_broker(asked.broker).url,
    ):
        own = run.mqtt_url if run.broker == "external" else f"its own {run.broker}"
        other.append(f"the broker {own}, not {url}")
    if other:
        raise UsageError(
            f"the controller (pid {run.pid}) runs with other settings ({'; '.join(other)}): skerry down first"
        )


def options(settings: Settings) -> list[str]:
    """Return the command line of `python -m cloud.controller` for these settings."""
    words = ["--data", str(settings.data), "--listen", settings.listen, "--log-level", settings.log_level]
    for name in ("api_port", "mqtt_port", "tail_port", "broker", "database"):
        value = getattr(settings, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return [*words, "--embedded-broker"] if settings.embedded_broker else words


def _wait_ready(settings: Settings, pid: int, deadline_s: float) -> Running:
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        code = _exit_code(pid)
        if code is not None:
            raise _why(settings.data, code)
        running = status(settings.data)
        if running is not None and running.run.pid == pid:
            return running
        time.sleep(LOOK_EVERY_S)
    raise DeadlineExceeded(f"the controller was not ready within {deadline_s:g} s; its log: {settings.log_file}")


def _why(data: Path, code: int) -> SkerryError:
    """Return the error that a controller ended with: the sentence of its last line, else that line itself.

    Raises:
        StorageError: the disk is so full that the controller could not even say so.
    """
    log = data / "start.log"
    try:
        with log.open(errors="replace") as file:
            lines = deque((line.strip() for line in file), maxlen=5)
    except OSError:
        lines = deque()
    for line in reversed(lines):
        if "controller.failed error=" in line:
            sentence = line.split("controller.failed error=", 1)[1]
            return error_for(code, _unquoted(sentence))
    check_room(data)
    return SkerryError(
        f"the controller ended with code {code}: {lines[-1] if lines else 'it said nothing'} (see {log})"
    )


def _unquoted(text: str) -> str:
    import json

    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, str) else text


def _exit_code(pid: int) -> int | None:
    """Return how a child of ours ended, or None while it runs."""
    try:
        found, state = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return None if _alive(pid) else 1
    return os.waitstatus_to_exitcode(state) if found else None


def _gone(pid: int) -> bool:
    """Say whether a process has ended; one that only waits for its parent to look is gone too."""
    if _exit_code(pid) is not None:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return not _alive(pid)
    return not state or state[0] in "ZX"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _end(pid: int, ended: Callable[[], bool], deadline_s: float) -> None:
    for number, wait_s in ((signal.SIGTERM, deadline_s), (signal.SIGKILL, 5.0)):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        end = time.monotonic() + wait_s
        while time.monotonic() < end:
            if ended():
                return
            time.sleep(LOOK_EVERY_S)
    raise DeadlineExceeded(f"the controller (process {pid}) does not end")
