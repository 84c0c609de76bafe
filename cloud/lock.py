"""The lock of a data directory: one controller at a time, and anybody can see whether one runs.

It is the kernel's (flock): whoever holds it is alive, and it is gone with its holder whatever happens.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from cloud.config import make_directory
from skills.errors import StorageError, Unreachable


@contextlib.contextmanager
def only_one(data: Path) -> Iterator[None]:
    """Hold the data directory for this process.

    Raises:
        Unreachable: another controller runs on it.
        StorageError: it cannot be written.
    """
    make_directory(data)
    try:
        descriptor = os.open(data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"cannot write to the data directory {data}: {error.strerror or error}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise Unreachable(
                f"another controller runs on {data}: stop it with skerry down, or give another --data"
            ) from None
        yield
    finally:
        os.close(descriptor)


def is_held(data: Path) -> bool:
    """Say whether a living process holds the lock of a data directory.

    Raises:
        StorageError: the lock cannot be looked at.
    """
    lock = data / "lock"
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StorageError(f"cannot open {lock}: {error.strerror or error}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return True
        raise StorageError(f"cannot lock {lock}: {error.strerror or error}") from None
    finally:
        os.close(descriptor)
