"""The controller's log: one event a line, stable words, `key=value`; in a rotating file and, in the foreground, on stderr."""

import json
import logging
import logging.handlers
import sys
import time
from pathlib import Path

MAX_BYTES = 4 << 20
BACKUPS = 3


class Journal:
    """Writes events; a `kind` is two words joined by a dot, like `device.enrolled`."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def debug(self, kind: str, **fields: object) -> None:
        """Write what only a developer wants to see."""
        self._write(logging.DEBUG, kind, fields)

    def info(self, kind: str, **fields: object) -> None:
        """Write what happened."""
        self._write(logging.INFO, kind, fields)

    def warning(self, kind: str, **fields: object) -> None:
        """Write what went wrong and will be tried again."""
        self._write(logging.WARNING, kind, fields)

    def error(self, kind: str, **fields: object) -> None:
        """Write what a person must act on."""
        self._write(logging.ERROR, kind, fields)

    def exception(self, kind: str, **fields: object) -> None:
        """Write an unexpected error with its traceback, from inside an except block."""
        self._logger.exception("%s", _line(kind, fields))  # noqa: LOG004 - called from inside one

    def leave_screen(self) -> None:
        """Write to the file only from now on."""
        for handler in list(self._logger.handlers):
            if type(handler) is logging.StreamHandler:
                self._logger.removeHandler(handler)

    def close(self) -> None:
        """Write no more."""
        for handler in list(self._logger.handlers):
            self._logger.removeHandler(handler)
            handler.close()

    def _write(self, level: int, kind: str, fields: dict[str, object]) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, "%s", _line(kind, fields))


def _line(kind: str, fields: dict[str, object]) -> str:
    return " ".join([kind, *(f"{key}={_value(value)}" for key, value in fields.items() if value is not None)])


def _value(value: object) -> str:
    text = str(value)
    plain = text.isprintable() and text and not any(ch in text for ch in ' "=')
    return text if plain else json.dumps(text, ensure_ascii=False)


def open_journal(path: Path | None, *, level: str = "info", screen: bool = False) -> Journal:
    """Start writing to `path` (rotating, at most 16 MiB in all) and to stderr when `screen` is set.

    A log that cannot be written never stops the controller: the line is lost.
    """
    logger = logging.Logger("skerry.controller", level.upper())  # noqa: LOG001 - handed down, never global
    form = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    form.converter = time.gmtime
    handlers: list[logging.Handler] = []
    if path is not None:
        file = _QuietFile(path, maxBytes=MAX_BYTES, backupCount=BACKUPS, encoding="utf-8", delay=True)
        handlers.append(file)
    if screen:
        handlers.append(logging.StreamHandler(sys.stderr))
    for handler in handlers:
        handler.setFormatter(form)
        logger.addHandler(handler)
    return Journal(logger)


class _QuietFile(logging.handlers.RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is logging's
        """Drop the line: a full disk must not fill stderr with tracebacks."""
