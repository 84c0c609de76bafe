"""One bounded record for each answer: from these metering, drift, A/B and hard examples are read, and from nothing else.

`usage/usage.jsonl` is rotated once, so the records take at most two files of MAX_FILE_BYTES; what is older is dropped. A full
disk loses records, never answers: `lost` counts them.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO

MAX_FILE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class UsageRecord:
    """What one answer cost and where it came from; `time` is Unix time, `ms` the whole of it on the device."""

    time: float
    skill: str
    version: str
    release: str
    variants: Mapping[str, str]
    where: str
    cut: str
    ms: float
    confidence: float | None = None


class UsageLog:
    """Appends records below `folder`."""

    def __init__(self, folder: Path, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self._path = folder / "usage.jsonl"
        self._max = max_file_bytes
        self._file: IO[bytes] | None = None
        self.answers = 0
        self.lost = 0

    def add(self, record: UsageRecord) -> None:
        """Append one record; never raises for a disk that refuses."""
        self.answers += 1
        fields = {name: getattr(record, name) for name in UsageRecord.__dataclass_fields__}
        fields["ms"] = round(record.ms, 3)
        if record.confidence is None:
            del fields["confidence"]
        line = json.dumps(fields, separators=(",", ":")).encode() + b"\n"
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("ab")
            if self._file.tell() + len(line) > self._max:
                self._file.close()
                self._file = None
                self._path.replace(self._path.with_suffix(".1.jsonl"))
                self._file = self._path.open("ab")
            self._file.write(line)
            self._file.flush()
        except OSError:
            self.lost += 1
            self.close()

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:
                self.lost += 1
