"""What a run leaves behind: the report with its figures, and the files of the result folder."""

import collections
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from compress import Goal, channels, judge, measure
from compress.converters.environment import Environment
from compress.converters.vela import VELA, Compiled
from compress.data import Data, Splits, whole_runs
from compress.emit import least_runtime, node_name
from compress.html import page
from compress.judge import Emitted, Judged, Original
from compress.lineage import lineage, parents
from compress.measure import Runner
from compress.passes.canonicalise import canonicalise
from compress.pieces import pieces
from compress.recipe import Recipe, recipe_layers
from compress.report import Baseline, DataLevel, Details, LayerRow, Moment, Point, Report, Result
from compress.scheme import Scheme
from compress.stage import Stage, write
from compress.train import training_machine
from skills import ort, zstd
from skills.errors import FormatError
from skills.files import sha256_hex
from skills.profile import Profile
from skills.wire import encode_json

PACKAGE_LEVEL = 19
LOADS = 5
VELA_FILE = "model_vela.tflite"
TIMING_ROUNDS = 60
SLOWER = 0.98  # below this speed-up the result is called slower; above it is noise


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """What was asked and what was found on the way."""

    original: Original
    samples: Data
    splits: Splits
    profile: Profile
    max_drop: float
    goal: Goal
    seed: int
    time_budget: float
    warnings: tuple[str, ...]
    stages: Mapping[str, tuple[Stage, ...]]  # name of a trained candidate -> how it was trained
    trail: tuple[Moment, ...]
    inputs: Mapping[str, str]  # hashes of teacher, recipe, …
    began: float
    compiled: Compiled | None = None  # for an accelerator, beside the file that runs anywhere


def report(run: Run, walked: Sequence[Judged], all_judged: Sequence[Judged], plain: Emitted | None) -> Report:
    """Time the result against the original and put everything into the report.

    `walked` are the result and, before it, those of its family that the report part was asked of first.
    """
    chosen = walked[-1]
    original, emitted, drop = run.original, chosen.emitted, chosen.drop
    sample = whole_runs(original.session.inputs[0], run.splits.report.x)
    shown = front(all_judged, chosen)
    times = measure.race(
        {"before": original.session, "after": judge.open_file(emitted.file, run.profile)}
        | {one.emitted.name: judge.open_file(one.emitted.file, run.profile) for one in shown if one is not chosen},
        sample, TIMING_ROUNDS,
    )  # fmt: skip
    speedup = times["before"].p50_ms / times["after"].p50_ms
    warnings = run.warnings
    if speedup < SLOWER:
        warnings = (*warnings, f"The result is slower than what came in: {speedup:.2f} times its speed.")
    if run.profile.arch != platform.machine():
        warnings = (
            *warnings,
            f"Timed on this machine ({platform.machine()}), not on a device of the profile {run.profile.name}.",
        )
    before, after = (
        original.metric.of(answers, run.splits.report, original.report) for answers in (original.report, chosen.answers)
    )
    size, package = original.size, len(zstd.compress(original.stripped, PACKAGE_LEVEL))
    small, small_package = len(emitted.file), len(zstd.compress(emitted.file, PACKAGE_LEVEL))
    baseline = Baseline(
        round(before, 6), original.source.bytes_input, size, package,
        round(times["before"].p50_ms, 4), round(times["before"].p90_ms, 4), _load_ms(lambda: ort.session(original.stripped)),
    )  # fmt: skip
    result = Result(
        round(after, 6), small, small_package, round(times["after"].p50_ms, 4),
        round(times["after"].p90_ms, 4), _load_ms(lambda: judge.open_file(emitted.file, run.profile)),
    )  # fmt: skip
    scheme = emitted.state.scheme
    details = Details(
        original.source.name, _model_file(run.profile), run.max_drop, run.goal, run.seed,
        _rows(emitted), emitted.audit.counts if emitted.audit else {}, (*emitted.state.notes, *_stored(scheme)), warnings,
        {name: len(part) for name, part in run.splits.parts().items()},
        data_level=_level(run), unit=original.metric.unit,
        pareto=tuple(_point(one, chosen, times, at, run.max_drop) for at, one in enumerate(shown)),
        trail=run.trail, time_budget=run.time_budget,
        pieces_before=pieces(original.stripped),
        pieces_after=pieces(emitted.file) if run.profile.runtime == "onnxruntime" else {},
        bytes_plain=len(plain.file) if plain is not None else None,
        weights=counted(channels.params, original.stripped, emitted.state.model),
        macs=counted(channels.macs, original.stripped, emitted.state.model),
        samples_for_proof=_samples_for_proof(walked, run.max_drop),
        least_runtime=_needs(emitted),
        npu=run.compiled.estimate if run.compiled is not None else None,
        timed_on=platform.machine() if run.profile.arch != platform.machine() else "",
    )  # fmt: skip
    return Report(
        original.metric.name, judge.verdict(walked, run.max_drop), round(drop.points, 4),
        (round(drop.lo, 4), round(drop.hi, 4)), drop.n, baseline, result, round(size / small, 3),
        round(size / small_package, 3), round(speedup, 3), run.profile.name, threads=1, batch=len(sample),
        seconds=round(time.monotonic() - run.began, 2), details=details,
    )  # fmt: skip


def front(judged: Sequence[Judged], chosen: Judged) -> list[Judged]:
    """Return the chosen file and those that no other beats in both size and drop, the largest first. Pure.

    Of files of the same size and drop there is one: the chosen one or the first.
    """
    places: dict[tuple[int, float], Judged] = {}
    for one in (chosen, *judged):
        places.setdefault((len(one.emitted.file), one.drop.points), one)
    kept = [
        one
        for (size, points), one in places.items()
        if one is chosen
        or not any(other != (size, points) and other[0] <= size and other[1] <= points for other in places)
    ]
    return sorted(kept, key=lambda one: -len(one.emitted.file))


def files(run: Run, done: Report, chosen: Judged, all_judged: Sequence[Judged]) -> Mapping[str, bytes]:
    """Return every file of the result folder by name."""
    emitted, details = chosen.emitted, done.details
    scheme = emitted.state.scheme
    inputs = parents(run.samples, model=run.original.source.sha256, **dict(run.inputs))
    recipe = Recipe(
        run.profile, run.max_drop, run.goal, run.seed, emitted.state.passes,
        () if scheme is None else recipe_layers(scheme),
        choices=emitted.state.choices,
        training=tuple(write(at, stage) for at, stage in enumerate(run.stages.get(emitted.name, ()))),
        metric=done.metric_name, preprocessing=run.samples.preprocessing, least_runtime=details.least_runtime,
        inputs=inputs,
    )  # fmt: skip
    trace = lineage(
        sha256_hex(emitted.file), inputs, None if run.samples.synthetic else run.splits, run.seed, run.profile.name,
        pinned(VELA) if run.compiled is not None else {},
        training_machine() if run.stages.get(emitted.name) else "",
    )  # fmt: skip
    beside = {VELA_FILE: run.compiled.file} if run.compiled is not None else {}
    named = {one.emitted.name: one.emitted.file for one in all_judged}
    return (
        {
            details.model_file: emitted.file,
            "report.html": page(done, recipe, trace).encode(),
            "recipe.yaml": recipe.encode(),
            "lineage.json": encode_json(trace),
            "report.json": (json.dumps(done.to_json(), indent=1, allow_nan=False) + "\n").encode(),
            "search.json": _search(run, done),
        }
        | beside
        | {point.file: named[point.name] for point in details.pareto if point.file and not point.chosen}
    )


def pinned(environment: Environment) -> dict[str, str]:
    """Return the versions of the packages that an environment of its own holds."""
    rows = (line.partition("==") for line in environment.requirements().splitlines())
    return {name: version for name, _, version in rows if version}


def _search(run: Run, done: Report) -> bytes:
    """Return what the search came by: the trade-offs kept, and what the time bought."""
    rows = {
        "pareto": [dataclasses.asdict(point) for point in done.details.pareto],
        "trail": [dataclasses.asdict(moment) for moment in run.trail],
    }
    return (json.dumps(rows, indent=1, allow_nan=False) + "\n").encode()


def _point(one: Judged, chosen: Judged, times: Mapping[str, ort.Timing], at: int, max_drop: float) -> Point:
    emitted = one.emitted
    name = "after" if one is chosen else emitted.name
    kind = "tflite" if emitted.audit is None else "onnx"
    return Point(
        emitted.name, len(emitted.file), len(zstd.compress(emitted.file, PACKAGE_LEVEL)), round(one.drop.points, 4),
        (round(one.drop.lo, 4), round(one.drop.hi, 4)), round(emitted.drop_select, 4), round(times[name].p50_ms, 4),
        one is chosen, f"model.{kind}" if one is chosen else f"pareto/{at}.{kind}",
        _needs(emitted), round(one.pooled, 4) if one is not chosen and judge.doubted(one, max_drop) else None,
    )  # fmt: skip


def _level(run: Run) -> DataLevel:
    if run.samples.synthetic:
        return "none"
    if run.splits.train is not None:
        return "training"
    return "calibration" if run.splits.report.y is not None else "unlabelled"


def _model_file(profile: Profile) -> Literal["model.onnx", "model.tflite"]:
    return "model.tflite" if profile.runtime == "litert" else "model.onnx"


def counted(count: Callable[[Any], Mapping[str, int]], original: bytes, after: object) -> tuple[int, int] | None:
    """Return a count of the original and of what came out, None where the original's cannot be made.

    It is counted in its canonical form: in the file, weights may stand behind nodes that only pass them on.
    """
    import onnx

    try:
        canonical = canonicalise(onnx.load_model_from_string(original))
    except FormatError:
        return None
    before = sum(count(canonical).values())
    return (before, sum(count(after).values())) if before and channels.countable(canonical) else None


def _samples_for_proof(walked: Sequence[Judged], max_drop: float) -> int | None:
    needed = [measure.samples_for_proof(one.drop, max_drop) for one in walked]
    return None if None in needed else max(count for count in needed if count is not None)


def _needs(emitted: Emitted) -> str:
    """Return the least version of its runtime that an ONNX file needs; a .tflite says so itself."""
    scheme = emitted.state.scheme
    if scheme is None or scheme.profile.runtime != "onnxruntime":
        return ""
    return f"onnxruntime {_version(least_runtime(scheme))}"


def _stored(scheme: Scheme | None) -> tuple[str, ...]:
    """Return in words how wide the layers are stored."""
    if scheme is None or not scheme.layers:
        return ()
    counts = collections.Counter(layer.bits for layer in scheme.layers)
    rows = ", ".join(f"{counts[bits]} in {bits:g} bits" for bits in sorted(counts, reverse=True))
    needs = f" Such weights need onnxruntime {_version(least_runtime(scheme))} or newer." if min(counts) < 8 else ""
    return (f"Layers are stored as follows: {rows}.{needs}",)


def _version(numbers: Sequence[int]) -> str:
    return ".".join(map(str, numbers))


def _load_ms(load: Callable[[], Runner]) -> float:
    return round(statistics.median(load().load_ms for _ in range(LOADS)), 3)


def _rows(emitted: Emitted) -> tuple[LayerRow, ...]:
    scheme = emitted.state.scheme
    if scheme is None:
        return ()
    audited = {row.node: row for row in emitted.audit.rows} if emitted.audit else {}
    rows = []
    for at, layer in enumerate(scheme.layers):
        row = audited.get(node_name(at))
        kernel = row.kernel if row else "MatMulNBits" if layer.node in scheme.blocks else ""
        rows.append(
            LayerRow(
                layer.node, layer.op, layer.compute, layer.bits, layer.count, 4 * layer.count, layer.stored_bytes,
                kernel, row.reason if row else "", dict(emitted.state.harm.get(layer.node, {})),
            )
        )  # fmt: skip
    return tuple(rows)
