"""Every error that Skerry raises on purpose, split by what the caller can do about it.

    SkerryError                 1   something went wrong; the message says what
    ├── UsageError              2   the command was called in a way that makes no sense: call it differently
    ├── NotReached              3   the work was done and its best result kept, but the target was missed
    ├── FormatError            65   a file or message is not what it should be: repair it
    ├── NotFound               66   what was named does not exist
    ├── Unreachable            69   the other side does not answer: try again later
    ├── StorageError           74   the disk is full or refuses: make room, then try again
    ├── DeadlineExceeded       75   no answer in time: try again, or allow more time
    ├── TrustError             77   a signature, hash or counter is wrong: never retried by itself
    ├── MissingExtra           78   an optional dependency is not installed
    ├── Refused                79   a device or a policy said no, and the message says why
    └── Interrupted           130   the person pressed Ctrl-C

The number is the exit code of every command that ends with that error (docs/exit-codes.md).
Nobody catches `Exception` except the outermost loop of a process.
"""


class SkerryError(Exception):
    """Base of the tree; `str(error)` is one sentence that says what was found and what to do."""

    exit_code = 1


class UsageError(SkerryError):
    exit_code = 2


class NotReached(SkerryError):
    exit_code = 3


class FormatError(SkerryError):
    exit_code = 65


class NotFound(SkerryError):
    exit_code = 66


class Unreachable(SkerryError):
    exit_code = 69


class StorageError(SkerryError):
    exit_code = 74


class DeadlineExceeded(SkerryError):
    exit_code = 75


class TrustError(SkerryError):
    exit_code = 77


class MissingExtra(SkerryError):
    exit_code = 78


class Refused(SkerryError):
    exit_code = 79


class Interrupted(SkerryError):
    exit_code = 130


def error_for(code: int, message: str) -> SkerryError:
    """Rebuild the error that another process reported as (exit code, sentence)."""
    for kind in SkerryError.__subclasses__():
        if kind.exit_code == code:
            return kind(message)
    return SkerryError(message)
