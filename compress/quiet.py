"""Keep off the terminal what C++ libraries write past Python and without a switch."""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Send descriptors 1 and 2 to nowhere for the length of the block; what matters comes back as an exception."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        yield
    finally:
        for at, saved in zip((1, 2), kept, strict=True):
            os.dup2(saved, at)
            os.close(saved)
        os.close(nothing)
