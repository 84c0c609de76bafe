"""Running a skill's recipe: a program of its own that rebuilds the skill's models, `python RECIPE --out FOLDER`."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from cloud.interrupts import held_back
from skills.errors import DeadlineExceeded, SkerryError, error_for
from skills.files import storage_errors

RECIPE_DEADLINE_S = 1800.0

Say = Callable[[str], None]


def run_recipe(
    folder: Path,
    recipe: str,
    missing: tuple[str, ...],
    say: Say = lambda line: None,
    deadline_s: float = RECIPE_DEADLINE_S,
) -> None:
    """Let a recipe rebuild a skill in a folder beside it, and take over what is missing; `say` hears each line it prints.

    Raises:
        SkerryError: the recipe failed, with its own last words and exit code.
        DeadlineExceeded: it took longer than `deadline_s`.
        StorageError: the disk is full or refuses.
    """
    with storage_errors(folder):
        with held_back():
            work = tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.resolve().parent)
        with work as name:
            made = Path(name) / "made"
            _run([sys.executable, str(folder.resolve() / recipe), "--out", str(made)], say, deadline_s)
            for path in _files(made):
                target = folder / path
                if str(path) in missing or not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(made / path, target)


def _files(folder: Path) -> Iterator[PurePosixPath]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield PurePosixPath(path.relative_to(folder))


def _run(command: list[str], say: Say, deadline_s: float) -> None:
    """Run a program to its end; it dies with us, and so does all that it started."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "ORT_DISABLE_TELEMETRY": "1"}
    process: subprocess.Popen[str] | None = None
    watch: threading.Timer | None = None
    late = threading.Event()
    last = ""
    try:
        with held_back():
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environment,
                start_new_session=True,
            )
        watch = threading.Timer(deadline_s, _end, (process, late))
        watch.daemon = True
        watch.start()
        for line in process.stdout or ():
            if line.strip():
                last = line.strip()
                say(last)
        code = process.wait()
    finally:
        if watch is not None:
            watch.cancel()
        if process is not None:
            if process.poll() is None:
                _end(process)
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
    if late.is_set():
        raise DeadlineExceeded(f"the recipe took longer than {deadline_s:g} s")
    if code > 2:
        raise error_for(code, f"the recipe failed: {last.removeprefix('recipe.py: ')}")
    if code:
        raise SkerryError(f"the recipe failed: {last or f'it was ended by signal {-code}'}")


def _end(process: "subprocess.Popen[str]", late: threading.Event | None = None) -> None:
    if late is not None:
        late.set()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
