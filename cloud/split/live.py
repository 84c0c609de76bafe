"""A live device's part in a plan: the segments go to it, and its own agent measures what this machine could only guess."""

import dataclasses
import io
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cloud.split.profile import Costs
from cloud.split.segment import Pieces
from cloud.views import MeasureView
from skills import zstd
from skills.bundle import MAX_PART_BYTES, Part, chunk_hashes
from skills.coding import Coding
from skills.errors import DeadlineExceeded, FormatError, Unreachable
from skills.files import read_bytes, sha256_hex
from skills.measurement import Crossing, Figures, Work
from skills.wire import decode_json, encode_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

MOST_SAMPLES = 8
DEADLINE_S = 1800.0  # of one measurement, the way of the segments to the device included
PATIENCE_S = 60.0  # of no answer at all: the device keeps its work for longer, and goes on where it was
PAUSE_S = 2.0  # before the next question after one that nobody answered
WIRE_LEVEL = 3  # these objects are sent once
SAMPLES_FILE = "samples.npz"
BUSY = 0.2  # from this share on, other work on the device is worth a warning

Codings = Sequence[tuple[Coding, ...]]


class Door(Protocol):
    """What measuring needs of the controller's API."""

    def lend_object(self, sha256: str, data: bytes) -> None: ...
    def measure(self, device: str, work: str) -> MeasureView: ...


@dataclasses.dataclass(frozen=True, slots=True)
class LiveDevice:
    """An enrolled device, with the memory that it offers to skills in MiB, if it told."""

    name: str
    door: Door
    memory_mb: float | None
    clock: Callable[[], float] = time.monotonic
    pause: Callable[[float], None] = time.sleep

    def figures(
        self,
        folder: Path,
        pieces: Pieces,
        samples: "Sequence[Arrays]",
        codings: Codings,
        rounds: int,
        progress: Callable[[str, int, int], None],
    ) -> Figures:
        """Have the device run every head and every coding, and return what it measured.

        `folder` holds the segments; `codings` are those of the cuts before segment 0, 1, ….

        Raises:
            Refused, TrustError, FormatError, StorageError: what the device or the controller said.
            Unreachable, DeadlineExceeded: no question was answered for a minute.
            DeadlineExceeded: there was no result within half an hour.
        """
        work, objects = packed(folder, pieces, samples, codings, rounds)
        data = encode_json(work)
        sha256 = sha256_hex(data)
        for at, (name, content) in enumerate({**objects, sha256: data}.items()):
            progress(f"sending to {self.name}", at, len(objects))
            self.door.lend_object(name, content)
        end = self.clock() + DEADLINE_S
        silent_since_s: float | None = None
        while self.clock() < end:
            try:
                seen = self.door.measure(self.name, sha256)  # waits at the device until it is done, for some seconds
            except (Unreachable, DeadlineExceeded):
                now = self.clock()
                silent_since_s = now if silent_since_s is None else silent_since_s
                if now - silent_since_s >= PATIENCE_S:
                    raise
                progress(f"{self.name} does not answer, asking again", 0, 1)
                self.pause(PAUSE_S)
                continue
            silent_since_s = None
            progress(f"{self.name} is {seen.state}", round(100 * seen.share), 100)
            if seen.figures is not None:
                figures = decode_json(Figures, encode_json(seen.figures), f"the figures of {self.name}")
                figures.check(sha256, work)
                return figures
        raise DeadlineExceeded(f"{self.name} had not measured the model after {DEADLINE_S / 60:.0f} minutes")


def packed(
    folder: Path, pieces: Pieces, samples: "Sequence[Arrays]", codings: Codings, rounds: int
) -> tuple[Work, dict[str, bytes]]:
    """Return what a device is to measure, and the wire form of each part by its SHA-256. The first samples go along."""
    files = [one.file for one in pieces.segments] + ([pieces.shared.file] if pieces.shared else [])
    contents = {file: read_bytes(folder / file, "the segment", MAX_PART_BYTES) for file in files}
    inputs = tuple(samples[0])
    contents[SAMPLES_FILE] = _archive(inputs, samples[:MOST_SAMPLES])
    parts, objects = [], {}
    for path, content in contents.items():
        wire = zstd.compress(content, WIRE_LEVEL)
        part = Part(path, sha256_hex(content), len(content), sha256_hex(wire), len(wire), chunk_hashes(wire))
        parts.append(part)
        objects[part.wire_sha256] = wire
    crossings = tuple(Crossing(after, pieces.live[after], row) for after, row in enumerate(codings))
    segments = tuple(one.file for one in pieces.segments)
    outputs = tuple(live.name for live in pieces.outputs)
    number = secrets.token_hex(8)
    return Work(number, tuple(parts), segments, inputs, outputs, SAMPLES_FILE, crossings, rounds), objects


def with_figures(
    costs: Mapping[int, Costs], codings: Codings, figures: Figures
) -> tuple[dict[int, Costs], list[tuple[Coding, ...]]]:
    """Return costs and codings with the device's own times in the place of this machine's."""
    there = {after: dataclasses.replace(cost, device=figures.heads[after]) for after, cost in costs.items()}
    written = [
        tuple(dataclasses.replace(coding, encode_ms=ms) for coding, ms in zip(row, times, strict=True))
        for row, times in zip(codings, figures.encode_ms, strict=True)
    ]
    return there, written


def measured_slowdown(costs: Mapping[int, Costs], figures: Figures) -> float:
    """Return how many times slower the device ran all segments in a row than this machine did; below 1 it was faster."""
    here, there = costs[0].tail.p50, figures.heads[-1].p50
    return max(float(f"{there / here:.4g}"), 0.01) if here > 0 else 1.0


def device_facts(name: str, figures: Figures) -> dict[str, Any]:
    """Return what the report says of the device and of how it measured."""
    names = ("machine", "cores", "arch", "runtime", "agent", "rounds", "busy")
    return {"name": name, **{key: getattr(figures, key) for key in names}}


def doubt(live: Mapping[str, Any] | None) -> str:
    """Return a sentence where other work on the device blurred what it measured, else ""."""
    if live is None or live["busy"] <= BUSY:
        return ""
    return f"{live['name']} was busy: other work had its processor for {live['busy']:.0%} of the measured time"


def _archive(inputs: Sequence[str], samples: "Sequence[Arrays]") -> bytes:
    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, *(np.concatenate([sample[name] for sample in samples]) for name in inputs))
    if buffer.tell() > MAX_PART_BYTES:
        raise FormatError(f"{len(samples)} inputs have {buffer.tell()} bytes, too many to send to a device")
    return buffer.getvalue()
