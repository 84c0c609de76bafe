"""The whole of one compression, from what the user gave to the folder that is written."""

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress import Goal, Progress, data, folder, graph, measure, metrics, model, profiles
from compress.data import Splits
from compress.emit import emit, node_name
from compress.graph import Array
from compress.html import page
from compress.lineage import lineage, parents
from compress.measure import Drop, Runner
from compress.metrics import Metric
from compress.passes.bias import BIAS
from compress.passes.bits import BITS, order
from compress.passes.canonicalise import CANONICALISE
from compress.passes.guard import GUARD
from compress.passes.place import PLACE
from compress.passes.ranges import RANGES
from compress.passes.strip import strip
from compress.pieces import pieces
from compress.pipeline import CHECK_SAMPLES, Bench, Pass, State, apply
from compress.recipe import Recipe, RecipeLayer
from compress.report import Baseline, Details, LayerRow, Report, Result
from compress.scheme import Scheme
from compress.splits import split
from skills import ort, zstd
from skills.errors import SkerryError, UsageError
from skills.files import sha256_hex
from skills.profile import Profile
from skills.wire import encode_json

PASSES: tuple[Pass, ...] = (CANONICALISE, RANGES, PLACE, GUARD, BIAS, BITS)
PACKAGE_LEVEL = 19
LOADS = 5
TIMING_ROUNDS = 60
CHANCE_ERRORS = 3  # a metric within so many standard errors of guessing is called chance
SLOWER = 0.98  # below this speed-up the result is called slower; above it is noise


@dataclasses.dataclass(frozen=True, slots=True)
class Original:
    """The model that came in, as every later answer is held against it."""

    source: model.Source
    stripped: bytes
    session: ort.Session
    metric: Metric
    calibrate: Array
    select: Array
    report: Array


@dataclasses.dataclass(frozen=True, slots=True)
class Emitted:
    """A file that could be written: its bytes, loaded in its runtime, and how it does on the report part."""

    state: State
    file: bytes
    runner: Runner
    audit: ort.Audit | None
    answers: Array
    drop: Drop


def run(
    source: object,
    given: object,
    out: Path,
    device: str = "auto",
    max_drop: float = 1.0,
    goal: Goal = "both",
    seed: int = 0,
    progress: Progress | None = None,
    weights: Path | None = None,
    passes: Sequence[Pass] = PASSES,
) -> Report:
    """Compress; see `compress.compress` for the contract. `passes` is there to put further ones in."""
    start = time.monotonic()
    say: Progress = progress or (lambda _stage, _share, _best: None)
    out = Path(out)
    _check_arguments(max_drop, goal, seed)
    folder.check_out(out)
    profile = profiles.find(device)
    say("reading the model and the data", 0.0, "")
    samples = data.load(given)
    original, splits, warnings = _meet(model.load(source, weights, samples.x), samples, seed)
    state = State(_parse(original.stripped))
    state = apply(
        passes,
        state,
        _benches(profile, splits, original, max_drop, goal, say, passes),
        original.calibrate[:CHECK_SAMPLES],
    )
    say("writing the model and measuring it", 0.9, "")
    emitted = _emit(state, profile, splits, original, max_drop)
    say("timing it against the original", 0.95, _best(original, emitted))
    report = _report(original, emitted, profile, splits, max_drop, goal, seed, warnings, time.monotonic() - start)
    say("done", 1.0, _best(original, emitted))
    folder.write_folder(out, _files(report, emitted, original, profile, samples, splits, passes))
    return report


def _check_arguments(max_drop: float, goal: str, seed: int) -> None:
    if not 0 <= max_drop <= 100:
        raise UsageError(f"the budget is {max_drop:g} points, expected 0 to 100")
    if goal not in ("size", "latency", "both"):
        raise UsageError(f"the goal is '{goal}', expected size, latency or both")
    if seed < 0:
        raise UsageError(f"the seed is {seed}, expected 0 or more")


def _parse(stripped: bytes) -> Any:
    import onnx

    return onnx.load_model_from_string(stripped)


def _meet(source: model.Source, samples: data.Data, seed: int) -> tuple[Original, Splits, tuple[str, ...]]:
    """Hold model and data against each other and let the original answer every part."""
    stripped_model = strip(source.model)
    stripped = stripped_model.SerializeToString()
    runnable = stripped
    if graph.opset(stripped_model) > ort.MAX_OPSET or stripped_model.ir_version > ort.MAX_IR:
        runnable = CANONICALISE.run(State(stripped_model), _NO_BENCH).model.SerializeToString()
    session = ort.session(runnable)
    data.check_fit(samples, session.inputs[0])
    splits = split(samples, seed)
    few = splits.calibrate.x[: max(1, session.inputs[0].shape[0])]
    first = measure.answers(session, few)
    metric = metrics.choose(samples, first, few)
    answers = [measure.answers(session, part.x) for part in (splits.calibrate, splits.select, splits.report)]
    if not all(np.isfinite(part).all() for part in answers):
        raise SkerryError(f"{source.name} answers NaN or infinity on this data: is it preprocessed as in training?")
    original = Original(source, runnable, session, metric, *answers)
    return original, splits, _warnings(original, splits)


# The pass CANONICALISE never looks at its bench.
_NO_BENCH: Any = None


def _warnings(original: Original, splits: Splits) -> tuple[str, ...]:
    found = []
    # A user's own metric that fails does so here, before anything is searched.
    right = original.metric.of(original.report, splits.report, original.report)
    if original.metric.name == "top1":
        chance = 1 / original.report.shape[1]
        noise = CHANCE_ERRORS * (chance * (1 - chance) / len(splits.report)) ** 0.5
        if right <= chance + noise:
            found.append(
                f"The model that came in is right in {right:.1%} of {len(splits.report)} cases, guessing gives {chance:.1%}: "
                "is the data preprocessed as in training, and are the labels in the model's order?"
            )
    elif original.metric.name in ("agreement", "cosine"):
        found.append(f"The data has no labels: the metric is {original.metric.name} with the original, not accuracy.")
    return tuple(found)


def _benches(
    profile: Profile,
    splits: Splits,
    original: Original,
    max_drop: float,
    goal: str,
    say: Progress,
    passes: Sequence[Pass],
) -> Callable[[Pass], Bench]:
    """Return what makes a pass's bench: its share of the progress bar starts where the one before ended."""
    metric = original.metric
    if metric.needs_labels and splits.select.y is None:
        metric = metrics.unlabelled(original.select, splits.select.x)

    def bench(step: Pass) -> Bench:
        at = list(passes).index(step)

        def tell(share: float, best: str) -> None:
            say(step.title, 0.05 + 0.85 * (at + share) / len(passes), best)

        return Bench(profile, splits, metric, original.calibrate, original.select, max_drop, goal, tell)

    return bench


def _emit(state: State, profile: Profile, splits: Splits, original: Original, max_drop: float) -> Emitted:
    """Emit the scheme; where the report part contradicts the search, step back to fewer 4-bit layers, at most twice.

    That is the only use of the report part for a choice, it goes one way only, and the notes say that it happened.
    """
    best = _judge(state, profile, splits, original)
    scheme = state.scheme
    if best.drop.points <= max_drop or scheme is None:
        return best
    narrow = [layer for layer in scheme.layers if layer.bits == 4]
    ranked = order(narrow, {layer.node: state.harm.get(layer.node, 0.0) for layer in narrow})
    for keep in sorted({len(ranked) // 2, 0} - {len(ranked)}, reverse=True):
        note = (
            f"With {len(narrow)} layers in 4 bits the report part lost {best.drop.points:.2f} points, more than the "
            f"search foresaw: stepped back to {keep}."
        )
        stepped = scheme.with_bits(dict.fromkeys(ranked[keep:], 8))
        again = _judge(
            dataclasses.replace(state, scheme=stepped, notes=(*state.notes, note)), profile, splits, original
        )
        if again.drop.points < best.drop.points:
            best = again
        if best.drop.points <= max_drop:
            break
    return best


def _judge(state: State, profile: Profile, splits: Splits, original: Original) -> Emitted:
    quantized = state.model if state.scheme is None else emit(state.model, state.scheme, state.seen())
    written = quantized.SerializeToString()
    audit: ort.Audit | None = None
    runner: Runner
    if profile.runtime == "litert":
        from compress import tflite

        file = tflite.lower(quantized)
        runner = tflite.session(file)
        tflite.check_same(runner, ort.session(written), splits.calibrate.x)
    else:
        file = written
        runner = ort.session(file)
        audit = ort.audit(file)
        if state.scheme is not None and profile.arch == platform.machine():
            check_audit(audit, state.scheme)
    answers = measure.answers(runner, splits.report.x)
    drop = measure.drop(original.metric, splits.report, original.report, answers)
    return Emitted(state, file, runner, audit, answers, drop)


def check_audit(audit: ort.Audit, scheme: Scheme) -> None:
    """Hold the optimised graph against the scheme.

    Raises:
        SkerryError: a layer that should compute in int8 stayed float; names the layer and the cause.
    """
    names = {node_name(at): layer for at, layer in enumerate(scheme.layers)}
    for row in audit.stayed_float:
        layer = names.get(row.node)
        if layer is not None and layer.compute == "int8":
            raise SkerryError(f"the runtime left {layer.op} '{layer.node}' in float: {row.reason}")
    planned = sum(layer.compute == "int8" for layer in scheme.layers)
    found = sum(row.int8 for row in audit.rows)
    if found < planned:
        raise SkerryError(f"{planned} layers should compute in int8, the runtime made {found} int8 kernels")


def _best(original: Original, emitted: Emitted) -> str:
    return f"{len(original.stripped) / len(emitted.file):.1f}x smaller, {emitted.drop.points:+.2f} points"


def _report(
    original: Original, emitted: Emitted, profile: Profile, splits: Splits, max_drop: float, goal: Goal, seed: int,
    warnings: tuple[str, ...], seconds: float,
) -> Report:  # fmt: skip
    began = time.monotonic()
    sample = splits.report.x[: max(1, original.session.inputs[0].shape[0])]
    times = measure.race({"before": original.session, "after": emitted.runner}, sample, TIMING_ROUNDS)
    speedup = times["before"].p50_ms / times["after"].p50_ms
    if speedup < SLOWER:
        warnings = (*warnings, f"The result is slower than what came in: {speedup:.2f} times its speed.")
    if profile.arch != platform.machine():
        warnings = (*warnings, f"Timed on this machine ({platform.machine()}), not on a {profile.name} device.")
    before, after = (
        original.metric.of(answers, splits.report, original.report) for answers in (original.report, emitted.answers)
    )
    size, package = len(original.stripped), len(zstd.compress(original.stripped, PACKAGE_LEVEL))
    small, small_package = len(emitted.file), len(zstd.compress(emitted.file, PACKAGE_LEVEL))
    baseline = Baseline(
        round(before, 6), original.source.bytes_input, size, package,
        round(times["before"].p50_ms, 4), round(times["before"].p90_ms, 4), _load_ms(lambda: ort.session(original.stripped)),
    )  # fmt: skip
    result = Result(
        round(after, 6), small, small_package, round(times["after"].p50_ms, 4),
        round(times["after"].p90_ms, 4), _load_ms(lambda: _open(emitted.file, profile)),
    )  # fmt: skip
    drop = emitted.drop
    details = Details(
        original.source.name, "model.tflite" if profile.runtime == "litert" else "model.onnx", max_drop, goal, seed,
        _rows(emitted), emitted.audit.counts if emitted.audit else {}, emitted.state.notes, warnings,
        {name: len(part) for name, part in splits.parts().items()},
        data_level="training" if splits.train is not None else "calibration" if splits.report.y is not None else "unlabelled",
        unit=original.metric.unit,
        pieces_before=pieces(original.stripped),
        pieces_after=pieces(emitted.file) if profile.runtime == "onnxruntime" else {},
        samples_for_proof=measure.samples_for_proof(drop, max_drop),
    )  # fmt: skip
    return Report(
        original.metric.name, measure.verdict(drop, max_drop), round(drop.points, 4), (round(drop.lo, 4), round(drop.hi, 4)),
        drop.n, baseline, result, round(size / small, 3), round(size / small_package, 3), round(speedup, 3), profile.name,
        threads=1, batch=len(sample), seconds=round(seconds + time.monotonic() - began, 2), details=details,
    )  # fmt: skip


def _open(file: bytes, profile: Profile) -> Runner:
    if profile.runtime == "litert":
        from compress import tflite

        return tflite.session(file)
    return ort.session(file)


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
        rows.append(
            LayerRow(
                layer.node, layer.op, layer.compute, layer.bits, layer.count, 4 * layer.count, layer.stored_bytes,
                row.kernel if row else "", row.reason if row else "",
                {4: emitted.state.harm[layer.node]} if layer.node in emitted.state.harm else {},
            )
        )  # fmt: skip
    return tuple(rows)


def _files(
    report: Report,
    emitted: Emitted,
    original: Original,
    profile: Profile,
    samples: data.Data,
    splits: Splits,
    passes: Sequence[Pass],
) -> Mapping[str, bytes]:
    import json

    details = report.details
    scheme = emitted.state.scheme
    layers = scheme.layers if scheme is not None else ()
    inputs = parents(samples, model=original.source.sha256)
    recipe = Recipe(
        profile, details.max_drop, details.goal, details.seed, tuple(step.name for step in passes),
        tuple(RecipeLayer(item.node, item.compute, item.bits) for item in layers),
        metric=report.metric_name, preprocessing=samples.preprocessing, least_runtime=details.least_runtime, inputs=inputs,
    )  # fmt: skip
    trace = lineage(sha256_hex(emitted.file), inputs, splits, details.seed, profile.name)
    return {
        details.model_file: emitted.file,
        "report.html": page(report, recipe, trace).encode(),
        "recipe.yaml": recipe.encode(),
        "lineage.json": encode_json(trace),
        "report.json": (json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n").encode(),
    }
