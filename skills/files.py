"""Durable files: nothing is ever half-written, and a full disk is one clear sentence."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from skills.errors import NotFound, StorageError

READ_BYTES = 1 << 20


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace `path` by `data`: after a crash at any moment the old or the new content is there, whole.

    Raises:
        StorageError: the disk is full or refuses; `path` is as it was and no temporary file is left.
    """
    write_atomic_pieces(path, (data,), mode)


def write_atomic_pieces(path: Path, pieces: Iterable[bytes], mode: int = 0o644) -> None:
    """Do as `write_atomic` does with content that comes in pieces; what `pieces` itself raises leaves `path` as it was.

    Raises:
        StorageError: the disk is full or refuses; `path` is as it was and no temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        try:
            # 1. The new bytes reach the disk under another name. A crash leaves a stray .tmp file that nobody reads.
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            # 2. Commit point: the name moves. Before it the old content is read, after it the new.
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        # 3. The name itself reaches the disk. A power cut before this may bring the old content back, whole.
        fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a StorageError that names `path` and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"no space left to write {path}: free some, then try again") from error
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def read_bytes(path: Path, what: str, max_bytes: int) -> bytes:
    """Read a whole file of at most `max_bytes`.

    Raises:
        NotFound: there is no such file, and the message calls it `what`.
        StorageError: it cannot be read or is larger.
    """
    try:
        with path.open("rb") as file:
            # Asked for more than there is, Python takes memory for all of that before it reads.
            data = file.read(min(max_bytes, os.fstat(file.fileno()).st_size) + 1)
            if len(data) <= max_bytes and (more := file.read(1)):  # /proc says 0 bytes, and a file may be growing
                data += more + file.read(max_bytes - len(data))
    except FileNotFoundError:
        raise NotFound(f"{what} {path} does not exist") from None
    except OSError as error:
        raise StorageError(f"cannot read {what} {path}: {error.strerror or error}") from error
    if len(data) > max_bytes:
        raise StorageError(f"{what} {path} is larger than the limit of {max_bytes} bytes")
    return data


def read_pieces(path: Path, what: str) -> Iterator[bytes]:
    """Yield a file's content, at most a MiB at once.

    Raises:
        NotFound: there is no such file, and the message calls it `what`.
        StorageError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            while piece := file.read(READ_BYTES):
                yield piece
    except FileNotFoundError:
        raise NotFound(f"{what} {path} does not exist") from None
    except OSError as error:
        raise StorageError(f"cannot read {what} {path}: {error.strerror or error}") from error


def sha256_hex(data: bytes | memoryview) -> str:
    """Return the SHA-256 of `data` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def xdg_data(*parts: str) -> Path:
    """Return a path below the user's data directory for Skerry (XDG Base Directory Specification)."""
    return _xdg("XDG_DATA_HOME", ".local/share", parts)


def xdg_config(*parts: str) -> Path:
    """Return a path below the user's configuration directory for Skerry."""
    return _xdg("XDG_CONFIG_HOME", ".config", parts)


def _xdg(variable: str, fallback: str, parts: tuple[str, ...]) -> Path:
    # A relative value is invalid by the specification and must be ignored.
    home = Path(os.environ.get(variable, ""))
    root = home if home.is_absolute() else Path.home() / fallback
    return root.joinpath("skerry", *parts)
