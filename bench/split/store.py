"""Measurements as they finish: one JSON file each, named after what it was made from, so that an interrupted bench goes on."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Store:
    """Cells under a folder; `say` is told what is measured and what was there."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self._say = folder, say
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, made_from: Mapping[str, object], measure: Callable[[], Any]) -> Any:
        """Return the cell `name` that was made from the same things, or measure and keep it."""
        text = json.dumps(made_from, sort_keys=True, default=str)
        file = self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        if file.is_file():
            return json.loads(file.read_text())
        self._say(name)
        found = measure()
        part = file.with_suffix(".part")
        with part.open("w") as stream:
            json.dump(found, stream)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
        return json.loads(file.read_text())
