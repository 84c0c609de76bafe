"""Virtual environments for tools whose packages cannot live beside ours: made on first use, whole or not at all.

What goes in is a list of exact versions beside this file (`vela.txt`, `litert.txt`); its hash is part of the folder's name, so
that another list is another environment. They lie in `$XDG_CACHE_HOME/skerry/environments` and may be removed at any time.
"""

import dataclasses
import fcntl
import hashlib
import importlib.resources
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping
from pathlib import Path

from skills.errors import DeadlineExceeded, NotFound, SkerryError, StorageError, Unreachable
from skills.files import storage_errors

STEP_S = 1800.0  # no conversion takes so long; one that does hangs
OFFLINE = ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError", "Connection refused", "ProxyError")
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Environment:
    """A named list of pinned packages; `megabytes` is what they take on the disk."""

    name: str
    megabytes: int

    def requirements(self) -> str:
        """Return the list, one `package==version` a line."""
        return (importlib.resources.files("compress") / "converters" / f"{self.name}.txt").read_text()


def cache(variables: Mapping[str, str]) -> Path:
    """Return where environments lie, by the XDG base directory specification. Pure.

    Raises:
        NotFound: neither XDG_CACHE_HOME nor HOME says where.
    """
    base = Path(variables.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():  # the specification: a relative path there is to be ignored
        return base / "skerry" / "environments"
    if not variables.get("HOME"):
        raise NotFound("neither XDG_CACHE_HOME nor HOME is set: there is no place for a converter's environment")
    return Path(variables["HOME"], ".cache", "skerry", "environments")


def folder_name(name: str, requirements: str, python: str, machine: str) -> str:
    """Return the folder's name: other packages, another Python or another machine make another folder. Pure."""
    told = "\n".join((*sorted(requirements.split()), python, machine))
    return f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def folder(environment: Environment) -> Path:
    """Return where an environment lies, or will."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return cache(os.environ) / folder_name(environment.name, environment.requirements(), python, platform.machine())


def installed(environment: Environment) -> bool:
    """Say whether the environment is there."""
    try:
        return (folder(environment) / "bin" / "python").exists()
    except NotFound:  # there is no place for one
        return False


def ready(environment: Environment, say: Say) -> Path:
    """Return the environment's interpreter, made first if it is not there; `say` is told what is going on.

    Raises:
        Unreachable: the package index does not answer.
        StorageError: the disk has too little room or refuses.
        SkerryError: pip could not install it, in pip's words.
    """
    place = folder(environment)
    interpreter = place / "bin" / "python"
    if interpreter.exists():
        return interpreter
    with storage_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.with_suffix(".lock").open("w") as lock:
            # 1. One process makes it, the others wait here and find it. The lock goes with the process that held it.
            say(f"waiting for the environment of {environment.name}")
            fcntl.flock(lock, fcntl.LOCK_EX)
            if interpreter.exists():
                return interpreter
            # 2. It is made under another name. A crash leaves that; nobody uses it, and the next one begins anew.
            partial = place.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            _check_room(environment, place.parent)
            try:
                _make(environment, partial, say)
                # 3. Commit point: the environment gets its name. Only `bin/python` is ever called, which may be moved.
                partial.rename(place)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return interpreter


def call(environment: Environment, script: str, work: Path, say: Say, seconds: float = STEP_S) -> str:
    """Run `compress/converters/scripts/SCRIPT WORK` in the environment and return what it printed.

    Files go in and come out in the folder `work`. The script sees none of our packages.

    Raises:
        SkerryError: it failed; the sentence is its last line.
        DeadlineExceeded: it took longer than `seconds`.
        Unreachable, StorageError: as `ready`.
    """
    interpreter = ready(environment, say)
    say(f"running {environment.name}")
    with importlib.resources.as_file(importlib.resources.files("compress") / "converters" / "scripts" / script) as path:
        try:
            done = subprocess.run(
                [interpreter, "-I", path, work], check=False, capture_output=True, text=True, errors="replace",
                env={**os.environ, **QUIET}, cwd=work, timeout=seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise DeadlineExceeded(f"{environment.name} did not come to an end in {seconds:g} seconds") from None
    if done.returncode:
        raise SkerryError(f"{environment.name} failed: {_last_line(done.stderr) or f'exit code {done.returncode}'}")
    return done.stdout


def _check_room(environment: Environment, where: Path) -> None:
    free = shutil.disk_usage(where).free >> 20
    if free < environment.megabytes:
        raise StorageError(
            f"the environment of {environment.name} takes {environment.megabytes} MB, {where} has {free} MB: "
            "make room, or set XDG_CACHE_HOME to another disk"
        )


def _make(environment: Environment, partial: Path, say: Say) -> None:
    title = f"making the environment of {environment.name}, once ({environment.megabytes} MB)"
    say(title)
    interpreter, wanted = partial / "bin" / "python", partial / "requirements.txt"
    ours = importlib.util.find_spec("pip") is not None  # then the environment needs none of its own
    venv.create(partial, with_pip=not ours)
    wanted.write_text(environment.requirements())
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter)] if ours else [str(interpreter), "-m", "pip"]
    run = subprocess.Popen(
        [*pip, "install", "--disable-pip-version-check", "--no-input", "--retries", "2", "-r", str(wanted)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    said: list[str] = []
    try:
        for line in run.stdout or ():
            said.append(line.strip())
            if line.startswith(("Collecting", "Installing")):
                say(f"{title}: {line.split('(')[0].strip()[:60]}")
        code = run.wait()
    finally:
        run.kill()
        run.wait()
    if code:
        raise failure(environment.name, said)


def failure(name: str, said: list[str]) -> SkerryError:
    """Return the error that pip's lines speak of. Pure."""
    text = "\n".join(said)
    if any(word in text for word in OFFLINE):
        return Unreachable(
            f"the environment of {name} cannot be made: the package index does not answer. It is needed once: connect, then "
            "run this again"
        )
    if "No space left" in text:
        return StorageError(f"the environment of {name} cannot be made: no space left on the disk")
    errors = [line for line in said if line.startswith("ERROR:")]
    return SkerryError(
        f"the environment of {name} cannot be made: {(errors or said or ['pip said nothing'])[-1][:300]}"
    )


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:400] if lines else ""
