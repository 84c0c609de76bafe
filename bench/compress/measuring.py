"""What a file is worth: its bytes, what it answers on samples that no tool has seen, how long it takes beside the others."""

import dataclasses
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rows import Array, Prepared, digest

from compress import measure
from compress.measure import Drop
from compress.metrics import Metric
from skills import ort, zstd

PACKAGE_LEVEL = 19
LOADS = 5
RACE_S = 40.0  # a race takes about so long, within these numbers of rounds
ROUNDS = (40, 400)
TOP1 = Metric("top1", lambda choices, part, _: ((choices == part.y).astype(np.float64),))


@dataclasses.dataclass(frozen=True, slots=True)
class Quality:
    """A file's size, its first choice for each sample of x, and how often that is right: on the report part, on all of x."""

    file: int
    package: int
    choices: Array
    accuracy: float
    whole: float


@dataclasses.dataclass(frozen=True, slots=True)
class Speed:
    """Middle and 90 % of one answer's time in a race, and the middle of a few loads, in milliseconds."""

    p50_ms: float
    p90_ms: float
    load_ms: float


def quality(path: Path, prepared: Prepared, work: Path) -> Quality:
    """Return what a file is worth, from an earlier measurement of the same bytes on the same data and runtime if any."""
    content = path.read_bytes()
    cell = work / "quality" / f"{digest({'model': path, **ort.versions()})}-{prepared.key}.npz"
    if not cell.is_file():
        cell.parent.mkdir(parents=True, exist_ok=True)
        choices = measure.answers(ort.session(content), prepared.x).argmax(axis=1)
        with cell.with_suffix(".part").open("wb") as file:
            np.savez(file, choices=choices, package=len(zstd.compress(content, PACKAGE_LEVEL)))
        cell.with_suffix(".part").rename(cell)
    with np.load(cell) as found:
        choices, package = found["choices"], int(found["package"])
    right = choices == prepared.y
    return Quality(
        len(content), package, choices, float(right[prepared.splits.report.rows].mean()), float(right.mean())
    )


def drop(before: Quality, after: Quality, prepared: Prepared) -> Drop:
    """Return how much worse `after` is on the report part, positive is worse; groups of samples are drawn whole."""
    part = prepared.splits.report
    return measure.drop(TOP1, part, before.choices[part.rows], after.choices[part.rows])


def race(row: str, paths: Mapping[str, Path], sample: Array, work: Path, *, anew: bool) -> tuple[dict[str, Speed], str]:
    """Time one answer of each file, all in one interleaved run at one thread; also return when and on what.

    An earlier race counts if exactly these files ran in it, on the same runtime and machine, and not `anew`.
    """
    key = digest({**paths, **ort.versions()})
    cell = work / "speed" / f"{row}-{key}.json"
    if anew or not cell.is_file():
        sessions = {name: ort.session(path) for name, path in paths.items()}
        least, most = ROUNDS
        times = measure.race(sessions, sample, most, least=least, seconds=RACE_S)
        loads = {
            name: statistics.median(ort.session(path).load_ms for _ in range(LOADS)) for name, path in paths.items()
        }
        found = {name: (timing.p50_ms, timing.p90_ms, loads[name]) for name, timing in times.items()}
        rounds = min(timing.runs for timing in times.values()) // measure.BURST
        about = {"date": time.strftime("%Y-%m-%d"), "rounds": f"{rounds} of {measure.BURST}", **ort.versions()}
        cell.parent.mkdir(parents=True, exist_ok=True)
        cell.with_suffix(".part").write_text(json.dumps({"speeds": found, "about": about}))
        cell.with_suffix(".part").rename(cell)
    kept = json.loads(cell.read_text())
    said = ", ".join(f"{name} {value}" for name, value in kept["about"].items())
    return {name: Speed(*values) for name, values in kept["speeds"].items()}, said
