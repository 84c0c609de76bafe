"""Measurements as they finish: one JSON file each, named after what it was made from, so that an interrupted bench goes on.

What a measurement was made from is also the code that was measured: after a change of it nothing of before is taken again.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def digest(folders: Iterable[Path], apart_from: Iterable[str] = ()) -> str:
    """Return a hash over every Python file in `folders`, apart from files of these names."""
    found, skipped = hashlib.sha256(), set(apart_from)
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            if file.name not in skipped:
                content = hashlib.sha256(file.read_bytes()).hexdigest()
                found.update(f"{folder.name}/{file.relative_to(folder).as_posix()} {content}\n".encode())
    return found.hexdigest()[:16]


class Store:
    """Cells under a folder, all made from `of` as well; `say` is told what is measured."""

    def __init__(self, folder: Path, say: Callable[[str], None], of: Mapping[str, object]) -> None:
        self.folder, self._say, self._of = folder, say, dict(of)
        self._days: dict[str, str] = {}  # of the cells that were there, by file name
        self._asked: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, made_from: Mapping[str, object], measure: Callable[[], Any]) -> Any:
        """Return the cell `name` that was made from the same things, or measure and keep it."""
        text = json.dumps(self._of | dict(made_from), sort_keys=True, default=str)
        file = self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        if not file.is_file():
            self._say(name)
            self._write(file, {"day": time.strftime("%Y-%m-%d"), "found": measure()})
        elif file.name not in self._asked:
            self._days[file.name] = str(json.loads(file.read_text())["day"])
        self._asked.add(file.name)
        return json.loads(file.read_text())["found"]

    def kept(self) -> str:
        """Say how many cells were there already, and from when; nothing where none was."""
        if not self._days:
            return ""
        first, last = min(self._days.values()), max(self._days.values())
        return f"{len(self._days)} of {len(self._asked)} cells kept from {first}" + (
            f" to {last}" if last > first else ""
        )

    def _write(self, file: Path, cell: Mapping[str, Any]) -> None:
        part = file.with_suffix(".part")
        with part.open("w") as stream:
            json.dump(cell, stream)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
