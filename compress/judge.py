"""Write a state as a file, hold it against its scheme and the original, and say which of several files is the result."""

import dataclasses
import itertools
import platform
from collections.abc import Sequence

from compress import Goal, ladder, measure, model
from compress.data import Part, Splits
from compress.emit import emit, node_name
from compress.graph import Array
from compress.measure import Drop, Runner
from compress.metrics import Metric
from compress.pipeline import State
from compress.profiles import saturates_here
from compress.scheme import Scheme
from skills import ort
from skills.errors import SkerryError
from skills.profile import Profile

ROUNDING = 1e-9  # points: what sums of floats may be apart
NEAR = 1.5  # times the budget: what lost no more, and may have lost less than the budget by its interval, ends no walk


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
    teacher_sha256: str = ""  # of the model given for that

    @property
    def size(self) -> int:
        """Return the bytes that ratios are over: without what does not compute, or as given where that is less."""
        return min(len(self.stripped), self.source.bytes_input)


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
    """A file with its answers on the report part. `pooled` is the drop on the `inputs` of all parts of the data together."""

    emitted: Emitted
    answers: Array
    drop: Drop
    pooled: float
    inputs: int

    @property
    def worse(self) -> float:
        """Return the larger of its two drops, in points: on the report part, and on all parts of the data together."""
        return max(self.drop.points, self.pooled)


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
        from compress import interpreter, tflite

        file = tflite.lower(quantized, whole=profile.whole_numbers)
        runner = interpreter.session(file)
        interpreter.check_same(runner, ort.session(written, exact=saturates_here(profile)), splits.calibrate.x)
    else:
        file = written
        runner = ort.session(file, exact=saturates_here(profile))
        audit = ort.audit(file)
        if state.scheme is not None and profile.arch == platform.machine():
            check_audit(audit, state.scheme)
    answers = measure.answers(runner, splits.select.x)
    return Emitted(name, state, file, runner, audit, measure.points(metric, splits.select, original.select, answers))


def open_file(file: bytes, profile: Profile) -> Runner:
    """Load a result in its runtime, as it is run and timed."""
    if profile.runtime == "litert":
        from compress import interpreter

        return interpreter.session(file)
    return ort.session(file)


def rank(emitted: Emitted, max_drop: float, *, trained: bool) -> tuple[bool, float]:
    """Return how a candidate stands on select, the lower the better. Pure.

    Within the budget fewer bytes are better, over it less loss. A trained one seems there to lose up to `ladder.HOPEFUL` times
    what it does.
    """
    lost = emitted.drop_select / ladder.HOPEFUL if trained else emitted.drop_select
    return (False, float(len(emitted.file))) if lost <= max_drop else (True, lost)


def look(emitted: Emitted, report: Part, original: Original, more: Sequence[tuple[Part, Array]] = ()) -> Judged:
    """Let a file answer the report part; `more` are other parts that say the same thing, with the original's answers."""
    answers = measure.answers(emitted.runner, report.x)
    drop = measure.drop(original.metric, report, original.report, answers)
    inputs, lost = len(report), drop.points * len(report)
    for part, before in more:
        after = measure.answers(emitted.runner, part.x)
        inputs, lost = inputs + len(part), lost + len(part) * measure.points(original.metric, part, before, after)
    return Judged(emitted, answers, drop, lost / inputs, inputs)


def finalists(families: Sequence[Sequence[Judged]], max_drop: float) -> list[Judged]:
    """Return the last candidate of each family within the budget, before the first that went clearly over it. Pure.

    Each family is ordered from the safest to the boldest before the report part is looked at. One that is over by less than
    half of the budget, and may be within by its interval, ends nothing; but nothing behind it is `proven`. Within is what is
    so on the report part and on all parts of the data together: a small report part alone flatters the boldest.
    """

    def near(one: Judged) -> bool:
        return one.drop.points <= NEAR * max_drop and one.drop.lo <= max_drop

    found = []
    for family in families:
        asked = itertools.takewhile(near, family)
        found += [one for one in asked if one.drop.points <= max_drop and not doubted(one, max_drop)][-1:]
    return found


def doubted(one: Judged, max_drop: float) -> bool:
    """Return whether a file is within the budget on the report part and over it on all parts of the data together. Pure.

    Of few inputs a single one is more than the budget (of 80 it is 1.25 points), and says nothing.
    """
    return one.drop.points <= max_drop and max(max_drop, 100 / one.inputs) < one.pooled - ROUNDING


def doubts(judged: Sequence[Judged], chosen: Judged, max_drop: float, unit: str) -> tuple[str, ...]:
    """Return what to say of files that keep the budget on the report part but not on all parts of the data together. Pure."""
    if doubted(chosen, max_drop):
        said = (
            f"The verdict goes by the report part, where the result loses {chosen.drop.points:.2f} {unit}; on all parts of "
            f"the data together it loses {chosen.pooled:.2f}, over the budget of {max_drop:g}. No file found keeps it on both."
        )
        return (said,)
    passed = [one for one in judged if doubted(one, max_drop) and len(one.emitted.file) < len(chosen.emitted.file)]
    if not passed:
        return ()
    few = "1 smaller file is" if len(passed) == 1 else f"{len(passed)} smaller files are"
    return (
        f"{few} within the budget on the report part but not on all parts of the data together, and not taken for that.",
    )


def result(
    families: Sequence[Sequence[Judged]], max_drop: float, goal: Goal = "size", milliseconds: Sequence[float] = ()
) -> Judged:
    """Return the result: of the finalists the one that is best by the goal, a later one of equals. Pure.

    `milliseconds` are those of one inference of each finalist, empty where the target cannot be timed here: bytes alone count
    then. That reads nothing off the report part, so this choice costs nothing. Where there is no finalist, the one is returned
    that lost least by the worse of its two drops, of equals the smallest file.
    """
    last = finalists(families, max_drop)
    if not last:
        return min(itertools.chain(*families), key=lambda one: (one.worse, len(one.emitted.file)))
    sizes = [float(len(one.emitted.file)) for one in last]
    times = list(milliseconds) or sizes
    costs = {"size": sizes, "latency": times, "both": [size * time for size, time in zip(sizes, times, strict=True)]}[
        goal
    ]
    return min(enumerate(last), key=lambda pair: (costs[pair[0]], -pair[0]))[1]


def walked(families: Sequence[Sequence[Judged]], chosen: Judged) -> Sequence[Judged]:
    """Return the candidates of the chosen one's family that were looked at before it, and it. Pure."""
    for family in families:
        for at, one in enumerate(family):
            if one is chosen:
                return family[: at + 1]
    raise ValueError("the chosen candidate is in no family")


def verdict(before: Sequence[Judged], max_drop: float) -> measure.Verdict:
    """Return what is known of the last of `before`, the candidates of a family up to the chosen one. Pure.

    The hypotheses that a candidate loses more than the budget are tested in an order that is fixed beforehand, each at one-sided
    2.5 %, and all behind the first that is not rejected count as not rejected: that keeps the error of the family (Maurer,
    Hothorn and Lehmacher 1995). So `proven` needs the worse end of every interval up to the chosen one's inside the budget.
    """
    own = measure.verdict(before[-1].drop, max_drop)
    if own == "proven" and any(one.drop.hi > max_drop for one in before):
        return "within_budget_unproven"
    return own


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
