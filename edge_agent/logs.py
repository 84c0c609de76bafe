"""agent.log: rotating, bounded, one event a line; and its end, for whoever asks."""

import logging
import logging.handlers
import os
import sys
from pathlib import Path

FILE_NAME = "agent.log"
MAX_FILE_BYTES = 1 << 20
BACKUPS = 2
MAX_TAIL_BYTES = 192 << 10


def start_logging(data: Path, level: str, *, console: bool) -> None:
    """Send the agent's events to `agent.log`, and to the terminal as well where there is one."""
    logger = logging.getLogger("skerry")
    logger.setLevel(level.upper())
    logger.propagate = False
    logging.raiseExceptions = False  # a full disk must not end the daemon over its log
    form = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%dT%H:%M:%S%z")
    handlers: list[logging.Handler] = [
        logging.handlers.RotatingFileHandler(data / FILE_NAME, maxBytes=MAX_FILE_BYTES, backupCount=BACKUPS, delay=True)
    ]
    if console:
        handlers.append(logging.StreamHandler(sys.stderr))
    for handler in handlers:
        handler.setFormatter(form)
        logger.addHandler(handler)


def last_lines(data: Path, count: int) -> bytes:
    """Return the last lines of the log, newest last, in at most MAX_TAIL_BYTES."""
    pieces: list[bytes] = []
    missing, room = count, MAX_TAIL_BYTES
    for path in (data / FILE_NAME, data / f"{FILE_NAME}.1"):
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - room, 0))
                text = file.read(room)
        except OSError:
            continue
        if size > room:
            text = text.partition(b"\n")[2]
        lines = text.splitlines(keepends=True)[-missing:]
        pieces.insert(0, b"".join(lines))
        missing -= len(lines)
        room -= len(pieces[0])
        if missing <= 0 or room <= 0:
            break
    return b"".join(pieces)
