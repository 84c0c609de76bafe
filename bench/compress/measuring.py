"""What a file is worth: its bytes, what it answers on samples that no tool has seen, how long it takes beside the others."""

import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rows import Array, Prepared, digest

from compress import measure
from compress.measure import Drop
from skills import ort, zstd

PACKAGE_LEVEL = 19
LOADS = 5
RACE_S = 40.0  # a race takes about so long, within these numbers of rounds
ROUNDS = (60, 2000)


@dataclasses.dataclass(frozen=True, slots=True)
class Quality:
    """A file's size and its right (1) and wrong (0) answers: on the report part, and on all of x."""

    sha256: str
    file: int
    package: int
    marks: Array
    whole: float


@dataclasses.dataclass(frozen=True, slots=True)
class Speed:
    """Middle and 90 % of one answer's time in a race, and the middle of a few loads, in milliseconds."""

    p50_ms: float
    p90_ms: float
    load_ms: float


def quality(path: Path, prepared: Prepared, work: Path) -> Quality:
    """Return what a file is worth on the report part, from an earlier measurement of the same bytes if there is one."""
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    cell = work / "quality" / f"{sha256[:16]}-{prepared.key}.npz"
    if not cell.is_file():
        right = measure.answers(ort.session(content), prepared.x).argmax(axis=1) == prepared.y
        cell.parent.mkdir(parents=True, exist_ok=True)
        with cell.with_suffix(".part").open("wb") as file:
            np.savez(file, right=right, package=len(zstd.compress(content, PACKAGE_LEVEL)))
        cell.with_suffix(".part").rename(cell)
    with np.load(cell) as found:
        right, package = found["right"], int(found["package"])
    marks = right[prepared.splits.report.rows].astype(np.float64)
    return Quality(sha256, len(content), package, marks, float(right.mean()))


def drop(before: Quality, after: Quality, prepared: Prepared) -> Drop:
    """Return how much worse `after` is, on the same samples; positive is worse."""
    return measure.paired_drop(before.marks, after.marks)


def race(row: str, paths: Mapping[str, Path], sample: Array, work: Path, *, anew: bool) -> tuple[dict[str, Speed], str]:
    """Time one answer of each file, all in one interleaved run at one thread; also return when and on what.

    An earlier race counts if exactly these files ran in it and not `anew`.
    """
    key = digest({name: path for name, path in paths.items()})
    cell = work / "speed" / f"{row}-{key}.json"
    if anew or not cell.is_file():
        sessions = {name: ort.session(path) for name, path in paths.items()}

        def once(session: ort.Session) -> Any:
            feeds, names = {session.inputs[0].name: sample}, [session.outputs[0].name]
            return lambda: session.run(feeds, names)

        runs = {name: once(session) for name, session in sessions.items()}
        trial = sum(timing.p50_ms for timing in ort.interleaved(runs, 10).values())
        rounds = int(min(max(RACE_S * 1e3 / trial, ROUNDS[0]), ROUNDS[1]))
        times = ort.interleaved(runs, rounds)
        loads = {name: statistics.median(ort.session(path).load_ms for _ in range(LOADS)) for name, path in paths.items()}
        found = {name: (timing.p50_ms, timing.p90_ms, loads[name]) for name, timing in times.items()}
        about = {"date": time.strftime("%Y-%m-%d"), "rounds": rounds, **ort.versions()}
        cell.parent.mkdir(parents=True, exist_ok=True)
        cell.with_suffix(".part").write_text(json.dumps({"speeds": found, "about": about}))
        cell.with_suffix(".part").rename(cell)
    kept = json.loads(cell.read_text())
    about = ", ".join(f"{name} {value}" for name, value in kept["about"].items())
    return {name: Speed(*values) for name, values in kept["speeds"].items()}, about
