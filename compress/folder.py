"""The result folder: it appears whole under its name, or not at all; and what a run keeps beside it until then.

While a run goes on, `.OUT.work/` holds the best so far in `best/` and the answers of passes in a `Cache`. A run that ends
well removes it; one that is interrupted leaves it, and the next one with `resume` finds there what it need not do again.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from skills.errors import Refused, StorageError, UsageError
from skills.files import fsync_directory, sha256_hex, storage_errors, write_atomic

MARK = "report.json"  # a folder with this file, and nothing but what a result has, is an earlier result and may be replaced
WRITTEN = frozenset(
    (
        "model.onnx",
        "model.tflite",
        "model_vela.tflite",
        "recipe.yaml",
        "lineage.json",
        "search.json",
        "report.html",
        "best.txt",  # of a run that goes on
        MARK,
    )
)
KEPT = re.compile(r"\d+\.(onnx|tflite)")  # in the folder `pareto`
CACHE_BYTES = 4 << 30
HASH_BYTES = 32  # in front of each value: what a failing disk changed counts as not there


def check_out(out: Path) -> None:
    """Refuse, before any work is done, a name that holds something else.

    Raises:
        UsageError: `out` is a file, a folder that is not an earlier result, or one that cannot be renamed.
    """
    if out.is_symlink():
        raise UsageError(f"{out} is a link, and a result gets its place by renaming: give {out.resolve()}")
    mounted = os.path.ismount(out)
    if mounted or Path.cwd().is_relative_to(out.resolve()):
        why = "is a mount point" if mounted else "is the folder that you work in"
        raise UsageError(
            f"{out} {why}, and a result gets its place by renaming: give a folder inside it, {out / 'out'}"
        )
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
        raise UsageError(f"{out} holds files that are not an earlier result (no {MARK}): give another folder")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: give a folder")
    if out.is_dir() and (others := sorted(_others(out))):
        raise UsageError(
            f"{out} is an earlier result and also has {others[0]}, which is no part of one: give another folder"
        )


def _others(out: Path) -> Iterator[str]:
    """Yield what is in the folder of a result and no part of it."""
    for path in out.iterdir():
        if path.is_symlink():
            yield path.name
        elif path.name == "pareto" and path.is_dir():
            yield from (
                f"pareto/{one.name}" for one in path.iterdir() if not (KEPT.fullmatch(one.name) and one.is_file())
            )
        elif not (path.name in WRITTEN and path.is_file()):
            yield path.name


@contextlib.contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Hold the name `out` for this run: without that, a second one would remove what the first one keeps beside it.

    The lock is the kernel's (flock) on a hidden file beside `out`; it is gone with its holder whatever happens.

    Raises:
        UsageError: as `check_out`.
        Refused: another run is at work on it.
        StorageError: the disk refuses.
    """
    check_out(out)
    path = out.parent / f".{out.name}.lock"
    with contextlib.ExitStack() as stack:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                lock = stack.enter_context(path.open("a+"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    lock.seek(0)
                    raise Refused(
                        f"another run (process {lock.read() or 'unknown'}) is at work on {out}: "
                        "wait for it or end it, or give another folder"
                    ) from None
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                        break  # else its last holder removed the name in between
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
        try:
            yield
        finally:  # the name first: who opens it from here on makes a new one
            path.unlink(missing_ok=True)


def workdir(out: Path) -> Path:
    """Return the hidden folder beside `out` in which a run keeps what it has so far; an interrupt leaves it."""
    return out.parent / f".{out.name}.work"


def best_folder(out: Path) -> Path:
    """Return where the best so far lies while a run goes on, written by `write_folder` and so always whole."""
    return workdir(out) / "best"


def forget(out: Path) -> None:
    """Remove what a run kept beside `out`: it ended well, or begins anew."""
    shutil.rmtree(workdir(out), ignore_errors=True)


class Cache:
    """Bytes by key, on the disk: what a pass made of what it was given. A key says all that the value depends on.

    Values are written atomically, so that death at any moment leaves each one whole or absent. All together take at
    most `most` bytes: the values that were neither written nor read for the longest time go first, and one that is
    larger than that alone is not kept. One process at a time uses a folder.
    """

    def __init__(self, folder: Path, most: int = CACHE_BYTES) -> None:
        self.folder, self.most = folder, most
        with storage_errors(folder):
            for stray in folder.glob(".*.tmp"):  # of a process that died while it wrote
                stray.unlink(missing_ok=True)

    def get(self, key: str) -> bytes | None:
        """Return the value, or None where there is none that is whole."""
        path = self._path(key)
        try:
            raw = path.read_bytes()
            if hashlib.sha256(raw[HASH_BYTES:]).digest() != raw[:HASH_BYTES]:
                path.unlink()
                return None
            os.utime(path)
        except OSError:
            return None
        return raw[HASH_BYTES:]

    def put(self, key: str, value: bytes) -> None:
        """Keep a value.

        Raises:
            StorageError: the disk is full or refuses; the earlier value of this key, if any, is still there.
        """
        if HASH_BYTES + len(value) > self.most:
            return
        with storage_errors(self.folder):  # not before: a run that keeps nothing leaves no folder
            self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path(key), hashlib.sha256(value).digest() + value)
        with storage_errors(self.folder):
            self._shrink()

    def _path(self, key: str) -> Path:
        return self.folder / sha256_hex(key.encode())

    def _shrink(self) -> None:
        known = sorted(((path.stat(), path) for path in self.folder.iterdir()), key=lambda pair: pair[0].st_mtime_ns)
        total = sum(facts.st_size for facts, _ in known)
        for facts, path in known:
            if total <= self.most:
                break
            path.unlink()
            total -= facts.st_size


def write_folder(out: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` (name, which may be nested as in `pareto/3.onnx`, -> content) into the folder `out`, replacing an
    earlier result.

    What was put into that while the new one was made stays.

    Raises:
        StorageError: the disk is full or refuses: `out` is as it was, unless the message says that it is written.
    """
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        # 1. Everything is written beside OUT. A crash leaves a hidden .partial folder that nobody reads.
        with _partial(out) as temporary:
            folders = {temporary}
            for name, data in files.items():
                path = temporary / name
                if path.parent not in folders:
                    path.parent.mkdir(parents=True)
                folders.update(above for above in path.parents if above.is_relative_to(temporary))
                with path.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            for folder in folders:
                fsync_directory(folder)
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
            # 4. What was put into the earlier result while this one was made moves over. A crash leaves it under the .old name.
            left = _moved_over(old, out) if old.exists() else []
            try:
                fsync_directory(out.parent)
            finally:
                if not left:
                    shutil.rmtree(old, ignore_errors=True)
    if left:
        raise StorageError(
            f"{out} is written, but {left[0]}, which was put into the earlier result meanwhile, could not be moved over: "
            f"it lies in {old}"
        )


def _moved_over(old: Path, out: Path) -> list[str]:
    """Move what is in the folder of an earlier result and no part of it into the new one; return what would not go."""
    left, folders = [], set[Path]()
    for name in sorted(_others(old)):
        path = out / name
        try:
            if os.path.lexists(path):
                raise FileExistsError(path)
            path.parent.mkdir(exist_ok=True)
            (old / name).rename(path)
            folders |= {path.parent, out}
        except OSError:
            left.append(name)
    for folder in folders:
        with contextlib.suppress(OSError):
            fsync_directory(folder)
    return left


@contextlib.contextmanager
def _partial(out: Path) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
