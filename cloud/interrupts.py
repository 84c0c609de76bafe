"""Ctrl-C and SIGTERM at a bad moment: between the birth of a process or a folder and the line that remembers it."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

HELD_BACK = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Let these signals wait until the end of the block, which must be short; in other threads nothing is held."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []

    def wait(number: int, _frame: FrameType | None) -> None:
        waiting.append(number)

    # Python-level handlers, not a signal mask: a child that is born in the block would inherit the mask.
    handlers = {number: signal.signal(number, wait) for number in HELD_BACK}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for held in dict.fromkeys(waiting):
            signal.raise_signal(held)
