"""The result folder: it appears whole under its name, or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from skills.errors import UsageError
from skills.files import fsync_directory, storage_errors

MARK = "report.json"  # a folder with this file is an earlier result and may be replaced


def check_out(out: Path) -> None:
    """Refuse, before any work is done, a name that holds something else.

    Raises:
        UsageError: `out` is a file, or a folder that is not an earlier result.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
        raise UsageError(f"{out} holds files that are not an earlier result (no {MARK}): give another folder")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: give a folder")


def workdir(out: Path) -> Path:
    """Return the hidden folder beside `out` in which a run keeps what it has so far; an interrupt leaves it."""
    return out.parent / f".{out.name}.work"


def best_folder(out: Path) -> Path:
    """Return where the best so far lies while a run goes on, written by `write_folder` and so always whole."""
    return workdir(out) / "best"


def write_folder(out: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` into the folder `out`, replacing an earlier result.

    Raises:
        StorageError: the disk is full or refuses; `out` is as it was.
    """
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        # 1. Everything is written beside OUT. A crash leaves a hidden .partial folder that nobody reads.
        with _partial(out) as temporary:
            for name, data in files.items():
                with (temporary / name).open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            fsync_directory(temporary)
            # 2. An earlier result moves aside. A crash here leaves it, whole, under the .old name.
            old = temporary.with_suffix(".old")
            if out.exists():
                out.rename(old)
            # 3. Commit point: the new folder gets its name.
            try:
                temporary.rename(out)
            except OSError:
                if old.exists():
                    old.rename(out)
                raise
            try:
                fsync_directory(out.parent)
            finally:
                shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _partial(out: Path) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
