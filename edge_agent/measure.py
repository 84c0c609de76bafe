"""Measure the segments of a split model where they would run: in a worker, which has nothing else to do and may be killed.

Every head is run whole, interleaved and warm, as the planner runs them on its own machine; codings likewise. The worker
yields the processor to skills that serve (`nice`), and may not take more memory than it was given.
"""

import functools
import io
import itertools
import os
import platform
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skills import __version__, codec, ort
from skills.coding import Coding, Live
from skills.errors import FormatError, Refused
from skills.files import read_bytes
from skills.footprint import grown_mb, own_kb
from skills.measurement import PROFILE_INSTEAD, RUNTIME, Figures, Work
from skills.split_plan import Millis
from skills.timer import PAUSE_S, Timer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

NICE = 10
WARMUP = 2
LEAST_ROUNDS = 3
BUDGET_S = 60.0  # how long the rounds over all heads may take; a slow device makes fewer of them
CODING_ROUNDS = 12
CODING_BUDGET_S = 20.0
MAX_SAMPLES_BYTES = 256 << 20


def measure(folder: Path, sha256: str, work: Work, timer: Timer, memory_mb: int) -> Figures:
    """Run every head and every coding of `work`, whose parts lie in `folder`, within `memory_mb` MiB beyond what is taken now.

    Milliseconds are those of `timer`: on a device that stands for a slower one, the slower one's.

    Raises:
        Refused: the segments need more memory.
        FormatError: a segment cannot be loaded or run here, or the samples do not fit.
        MissingExtra: something that a coding needs is not installed.
    """
    _yield_to_others(memory_mb)
    try:
        return _measured(folder, sha256, work, timer)
    except (MemoryError, FormatError) as error:
        if isinstance(error, MemoryError) or "bad_alloc" in str(error) or "Failed to allocate" in str(error):
            raise Refused(
                f"the segments need more memory than the {memory_mb} MiB that the device has left for them "
                f"({str(error)[:120] or 'an allocation failed'}); {PROFILE_INSTEAD}"
            ) from None
        raise


def machine_name(root: Path = Path("/")) -> str:
    """Return what this machine calls itself: a board's model, else the processor's name, else the architecture."""
    try:
        return (root / "proc/device-tree/model").read_text().strip("\0 \n")[:200]
    except OSError:
        pass
    try:
        for line in (root / "proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() in ("model name", "hardware") and value.strip():
                return value.strip()[:200]
    except OSError:
        pass
    return platform.machine()


def _measured(folder: Path, sha256: str, work: Work, timer: Timer) -> Figures:
    samples, sessions = _samples(folder / work.samples, work), list[ort.Session]()

    def one_more(path: str) -> None:
        sessions.append(ort.session(folder / path))  # a device keeps them all
        ort.Chain.of(sessions, work.outputs).run(samples[0])

    memory_mb = grown_mb(functools.partial(one_more, path) for path in work.segments)
    chain = ort.Chain.of(sessions, work.outputs)
    heads, rounds, busy = _heads(chain, samples, work, timer)
    return Figures(
        work=sha256,
        heads=heads,
        encode_ms=_encodes(chain, samples, work, timer),
        memory_mb=memory_mb,
        rounds=rounds,
        busy=busy,
        cores=len(os.sched_getaffinity(0)),
        machine=machine_name(),
        arch=platform.machine(),
        runtime=f"{RUNTIME} {ort.version()}",
        agent=__version__,
    )


def _heads(
    chain: ort.Chain, samples: "list[Arrays]", work: Work, timer: Timer
) -> tuple[tuple[Millis, ...], int, float]:
    """Return what every head takes, after how many rounds, and the share of that time which other work had."""
    wall = cpu = 0.0

    def head(after: int) -> Callable[[], object]:
        turns = itertools.cycle(samples)  # each head sees the same samples in the same order

        def run() -> None:
            nonlocal wall, cpu
            wall, cpu = wall - time.perf_counter(), cpu - time.thread_time()
            chain.run(next(turns), 0, after)
            wall, cpu = wall + time.perf_counter(), cpu + time.thread_time()

        return run

    runs = {str(after): head(after) for after in range(len(work.segments) + 1)}
    rounds = _rounds(runs, work.rounds, BUDGET_S, PAUSE_S)
    timings = ort.interleaved(runs, rounds, WARMUP, _clock(timer), pause_s=PAUSE_S)
    heads = tuple(Millis(_short(timings[name].p50_ms), _short(timings[name].p90_ms)) for name in runs)
    return heads, rounds, round(min(max(1 - cpu / wall, 0.0), 1.0), 3)


def _encodes(chain: ort.Chain, samples: "list[Arrays]", work: Work, timer: Timer) -> tuple[tuple[float, ...], ...]:
    def writing(coding: Coding, tensors: tuple[Live, ...], values: "list[Arrays]") -> Callable[[], object]:
        turns = itertools.cycle(values)
        return lambda: codec.encode(coding, tensors, next(turns))

    found = list[tuple[float, ...]]()
    for crossing in work.crossings:
        values: list[Arrays] = [chain.run(sample, 0, crossing.after) for sample in samples]
        values = [one for one in values if not codec.obstacle(crossing.tensors, one)] or values
        runs = {str(at): writing(coding, crossing.tensors, values) for at, coding in enumerate(crossing.codings)}
        rounds = _rounds(runs, CODING_ROUNDS, CODING_BUDGET_S / len(work.crossings))
        timings = ort.interleaved(runs, rounds, WARMUP, _clock(timer))
        found.append(tuple(_short(timings[name].p50_ms) for name in runs))
    return tuple(found)


def _rounds(runs: Mapping[str, Callable[[], object]], wanted: int, budget_s: float, pause_s: float = 0.0) -> int:
    """Return how many rounds, with a pause before each run, fit into the budget, found by making one without."""
    start = time.perf_counter()
    for run in runs.values():
        run()
    once = time.perf_counter() - start + pause_s * len(runs)
    return max(LEAST_ROUNDS, min(wanted, int(budget_s / max(once, 1e-6)) - WARMUP))


def _clock(timer: Timer) -> Callable[[], float]:
    """Return the device's clock in seconds: what the timer makes of wall and processor time grows evenly with both."""
    return lambda: timer.device_ms(time.perf_counter(), time.thread_time())


def _samples(path: Path, work: Work) -> "list[Arrays]":
    import numpy as np

    try:
        with np.load(io.BytesIO(read_bytes(path, "the samples", MAX_SAMPLES_BYTES)), allow_pickle=False) as file:
            arrays = {name: file[f"arr_{at}"] for at, name in enumerate(work.inputs)}
    except (ValueError, KeyError, EOFError, OSError) as error:
        raise FormatError(f"the samples cannot be read: {error}") from None
    counts = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(counts) != 1 or counts == {0}:
        raise FormatError("the samples have different counts, or none")
    return [{name: array[at : at + 1] for name, array in arrays.items()} for at in range(*counts)]


def _yield_to_others(memory_mb: int) -> None:
    os.nice(NICE)
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = (own_kb("VmData") << 10) + (memory_mb << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))


def _short(value: float) -> float:
    return float(f"{value:.4g}")
