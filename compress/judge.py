"""Write a state as a file, hold it against its scheme and the original, and say which of several files is the result."""

import dataclasses
import platform
from collections.abc import Sequence

from compress import measure, model
from compress.data import Part, Splits
from compress.emit import emit, node_name
from compress.graph import Array
from compress.measure import Drop, Runner
from compress.metrics import Metric
from compress.pipeline import State
from compress.scheme import Scheme
from skills import ort
from skills.errors import SkerryError
from skills.profile import Profile


@dataclasses.dataclass(frozen=True, slots=True)
class Original:
    """The model that came in, as every later answer is held against it. `teacher` is what training learns from."""

    source: model.Source
    stripped: bytes
    session: ort.Session
    metric: Metric
    calibrate: Array
    select: Array
    report: Array
    teacher: Runner


@dataclasses.dataclass(frozen=True, slots=True)
class Emitted:
    """A file that could be written: its bytes, loaded in its runtime, and how it does on the select part."""

    name: str
    state: State
    file: bytes
    runner: Runner
    audit: ort.Audit | None
    drop_select: float


@dataclasses.dataclass(frozen=True, slots=True)
class Judged:
    """A file with its answers on the report part."""

    emitted: Emitted
    answers: Array
    drop: Drop


def write(name: str, state: State, profile: Profile, splits: Splits, original: Original, metric: Metric) -> Emitted:
    """Return the file of a state, loaded and answering on select; `metric` is the one that select has labels for.

    Raises:
        SkerryError: the runtime did not make of it what the scheme says.
    """
    quantized = state.model if state.scheme is None else emit(state.model, state.scheme, state.seen())
    written = quantized.SerializeToString()
    audit: ort.Audit | None = None
    runner: Runner
    if profile.runtime == "litert":
        from compress import tflite

        file = tflite.lower(quantized, whole=profile.whole_numbers)
        runner = tflite.session(file)
        tflite.check_same(runner, ort.session(written), splits.calibrate.x)
    else:
        file = written
        runner = ort.session(file)
        audit = ort.audit(file)
        if state.scheme is not None and profile.arch == platform.machine():
            check_audit(audit, state.scheme)
    answers = measure.answers(runner, splits.select.x)
    return Emitted(name, state, file, runner, audit, measure.points(metric, splits.select, original.select, answers))


def look(emitted: Emitted, report: Part, original: Original) -> Judged:
    """Let a file answer the report part."""
    answers = measure.answers(emitted.runner, report.x)
    return Judged(emitted, answers, measure.drop(original.metric, report, original.report, answers))


def result(families: Sequence[Sequence[Judged]], max_drop: float) -> Judged:
    """Return the result among candidates. Pure.

    Each family is ordered from the safest to the boldest before the report part is looked at; it is walked until a drop
    is over the budget, and the last one within it counts; a later family goes before an earlier one. Testing in a fixed
    sequence keeps the error of the interval what it says (Maurer, Hothorn and Lehmacher 1995). Where nothing is within the
    budget, the least drop is returned.
    """
    best: Judged | None = None
    for family in families:
        for candidate in family:
            if candidate.drop.points > max_drop:
                break
            best = candidate
    if best is not None:
        return best
    return min((candidate for family in families for candidate in family), key=lambda one: one.drop.points)


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
    packed = audit.counts.get("MatMulNBits", 0)
    if packed < len(scheme.blocks):
        raise SkerryError(
            f"{len(scheme.blocks)} layers should read 4-bit weights as they lie, in the runtime {packed} do"
        )
    planned = sum(layer.compute == "int8" for layer in scheme.layers)
    found = sum(row.int8 for row in audit.rows)
    if found < planned:
        raise SkerryError(f"{planned} layers should compute in int8, the runtime made {found} int8 kernels")
