"""Numbers that a verdict rests on: answers on the real runtime, the paired drop with its interval, time side by side."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import numpy as np

from compress.data import Part
from compress.graph import Array
from compress.metrics import METRICS, Marks, Metric
from skills import ort
from skills.errors import FormatError
from skills.ort import Port

Verdict = Literal["proven", "within_budget_unproven", "not_reached"]
BATCH_ELEMENTS = 1 << 20  # input numbers per run: keeps a batch's activations in tens of MiB
Z95 = 1.959964
RESAMPLES = 1000
OWN_RESAMPLES = 200  # of a user's own metric, which may take long
BOOTSTRAP_SEED = 0
BURST = 10  # answers in a row, in a race
RACE_S, LEAST_ROUNDS = 5.0, 4  # a race takes about so long, or so many rounds
WIDEST = 1e6  # per cent: what a relative change is cut at


class Runner(Protocol):
    """A loaded model of any runtime: onnxruntime's `Session`, or LiteRT's from `compress/interpreter.py`."""

    @property
    def inputs(self) -> tuple[Port, ...]: ...
    @property
    def outputs(self) -> tuple[Port, ...]: ...
    @property
    def load_ms(self) -> float: ...
    def run(self, feeds: Mapping[str, Array], names: list[str] | None = None) -> dict[str, Array]: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Drop:
    """How much worse (positive), with the paired 95 % interval over `n` samples: percentage points, or per cent of the
    original's value for an unbounded metric."""

    points: float
    lo: float
    hi: float
    n: int


def batches(port: Port, x: Array) -> list[Array]:
    """Cut `x` into batches that the model's input takes: its own batch size if fixed, else by memory.

    Raises:
        FormatError: the model wants batches of a size that the data cannot fill.
    """
    fixed = port.shape[0] if port.shape else -1
    if fixed > 1 and len(x) % fixed:
        raise FormatError(
            f"the model takes batches of exactly {fixed}, the data part has {len(x)}: export it with a free batch"
        )
    size = fixed if fixed > 0 else max(1, min(64, BATCH_ELEMENTS // max(1, x[0].size)))
    return [x[at : at + size] for at in range(0, len(x), size)]


def answers(runner: Runner, x: Array) -> Array:
    """Return the first output for every sample of `x`."""
    port, name = runner.inputs[0], runner.outputs[0].name
    return np.concatenate([runner.run({port.name: batch}, [name])[name] for batch in batches(port, x)])


def paired_drop(before: Array, after: Array) -> Drop:
    """Return the drop in points and its 95 % interval from the same samples' marks before and after.

    For right/wrong marks the interval is Bonett and Price's adjusted Wald interval for paired proportions (2012): it
    adds half a sample to each kind of change, so that no change at all in few samples still leaves doubt.
    """
    n = len(before)
    change = before - after
    if set(np.unique(change)) <= {-1.0, 0.0, 1.0}:
        worse, better = float((change > 0).sum()), float((change < 0).sum())
        p_worse, p_better = (worse + 1) / (n + 2), (better + 1) / (n + 2)
        middle = p_worse - p_better
        half = Z95 * math.sqrt(max(0.0, (p_worse + p_better - middle**2) / (n + 2)))
    else:
        middle = float(change.mean())
        half = Z95 * float(change.std(ddof=1)) / math.sqrt(n) if n > 1 else 1.0
    points = float(change.mean()) * 100
    return Drop(
        points, max(-100.0, min(points, (middle - half) * 100)), min(100.0, max(points, (middle + half) * 100)), n
    )


def drop(metric: Metric, part: Part, original: Array, output: Array) -> Drop:
    """Return how much worse than `original` the answers `output` to the same samples are, with a paired 95 % interval.

    Marks of single samples, bounded and without groups: `paired_drop`. All else, so whole-set metrics, unbounded ones, and
    samples in groups, by `resampled`; there a bounded metric's interval is never narrower than `paired_drop` makes it, of
    the same marks or, for a whole-set metric, of marks that did not change.
    """
    before, after = metric.marks(original, part, original), metric.marks(output, part, original)
    if not metric.bounded:
        return resampled(metric, before, after, part.groups)
    if len(before) == 1:
        sign = 1 if metric.higher_is_better else -1
        least = paired_drop(sign * before[0], sign * after[0])
        if part.groups is None:
            return least
    else:
        doubt = paired_drop(np.zeros(len(part)), np.zeros(len(part)))
        change = points(metric, part, original, output)
        least = Drop(change, change + doubt.lo, change + doubt.hi, len(part))
    found = resampled(metric, before, after, part.groups)
    lo, hi = min(found.lo, least.lo), max(found.hi, least.hi)
    return Drop(found.points, max(-100.0, lo), min(100.0, hi), found.n)


def points(metric: Metric, part: Part, original: Array, output: Array) -> float:
    """Return the drop alone, without the work of its interval: for a search that asks often."""
    before, after = metric.marks(original, part, original), metric.marks(output, part, original)
    return float(_points(metric, np.array(metric.value(before)), np.array(metric.value(after))))


def resampled(metric: Metric, before: Marks, after: Marks, groups: Array | None) -> Drop:
    """Return the drop with its bootstrap percentile interval: pairs are drawn again, whole groups where there are any.

    The draws are seeded. Fewer than two groups say nothing: the interval is as wide as can be. Sources: Efron and
    Tibshirani 1993, chapter 13; for groups Field and Welsh 2007.
    """
    n = len(before[0])
    found = float(_points(metric, np.array(metric.value(before)), np.array(metric.value(after))))
    member = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    units = int(member.max()) + 1
    if units < 2:
        return Drop(found, -WIDEST, WIDEST, n)
    order = np.random.default_rng(BOOTSTRAP_SEED)
    if len(before) == 1:
        sums = [np.bincount(member, weights=marks) for marks in (before[0], after[0], np.ones(n))]
        drawn = []
        for _ in range(RESAMPLES):
            rows = order.integers(0, units, units)
            drawn.append([column[rows].sum() for column in sums])
        was, now, count = np.array(drawn).T
        values = _points(metric, was / count, now / count)
    else:
        by_unit = np.split(np.argsort(member, kind="stable"), np.cumsum(np.bincount(member))[:-1])
        pairs = []
        for _ in range(RESAMPLES if metric.name in METRICS else OWN_RESAMPLES):
            rows = order.integers(0, units, units)
            if groups is not None:
                rows = np.concatenate([by_unit[unit] for unit in rows])
            pairs.append([metric.value(tuple(column[rows] for column in marks)) for marks in (before, after)])
        values = _points(metric, *np.array(pairs).T)
    lo, hi = (float(value) for value in np.percentile(values, (2.5, 97.5)))
    return Drop(found, min(found, lo), max(found, hi), n)


def _points(metric: Metric, before: Array, after: Array) -> Array:
    change = before - after if metric.higher_is_better else after - before
    if metric.bounded:
        return np.asarray(change * 100)
    return np.asarray(np.clip(change / np.maximum(np.abs(before), 1e-12) * 100, -WIDEST, WIDEST))


def samples_for_proof(drop: Drop, max_drop: float) -> int | None:
    """Return how many samples would prove the budget if the drop stayed as measured, None where no number would. Pure.

    The interval narrows with the square root of the samples, drawn in groups like those there are.
    """
    room = max_drop - drop.points
    if room <= 0:
        return None
    return math.ceil(drop.n * ((drop.hi - drop.points) / room) ** 2)


def verdict(drop: Drop, max_drop: float) -> Verdict:
    """Return `proven` when even the interval's worse end is inside the budget."""
    if drop.hi <= max_drop:
        return "proven"
    return "within_budget_unproven" if drop.points <= max_drop else "not_reached"


def foretold(original: Array, output: Array) -> Array:
    """Return for each sample the points that its answer costs, going by the original's own confidence.

    Where the top answer changed, the loss is the probability that the original gave to its own answer less what it
    gave to the new one. No labels are needed, and lucky changes do not hide unlucky ones, so a hundred samples say
    as much as a thousand labelled ones would.
    """
    odds, rows = np.exp(log_probabilities(original)), np.arange(len(original))
    return np.asarray(100 * (odds[rows, original.argmax(axis=1)] - odds[rows, output.argmax(axis=1)]))


def divergence(original: Array, output: Array, *, classes: bool) -> float:
    """Return how far two models' answers are apart without needing labels, 0 for equal.

    Kullback-Leibler divergence of the class probabilities where the outputs are `classes`' scores, else the squared error
    relative to the original's variance.
    """
    if classes:
        p, q = log_probabilities(original), log_probabilities(output)
        return float((np.exp(p) * (p - q)).sum(axis=1).mean())
    spread = float(original.astype(np.float64).var()) or 1.0
    return float(((original.astype(np.float64) - output) ** 2).mean()) / spread


def log_probabilities(scores: Array) -> Array:
    """Return class scores [n, classes], before or after a Softmax, as logarithms of probabilities."""
    scores = scores.astype(np.float64)
    if float(scores.min()) >= 0 and np.allclose(scores.sum(axis=1), 1, atol=0.02):
        return np.asarray(np.log(np.maximum(scores, 1e-9)))  # the graph ends in Softmax already
    scores = scores - scores.max(axis=1, keepdims=True)
    return np.asarray(scores - np.log(np.exp(scores).sum(axis=1, keepdims=True)))


def race(
    runners: Mapping[str, Runner], sample: Array, rounds: int, *, least: int = LEAST_ROUNDS, seconds: float = RACE_S
) -> dict[str, ort.Timing]:
    """Time one inference of each model, batch 1, side by side: `rounds` turns of each or, from `least` on, what the time allows.

    A turn is `BURST` answers in a row, as a device that serves a model gives them: behind ten others a small one would find
    nothing of its own in the caches.
    """

    def once(runner: Runner) -> Callable[[], object]:
        feeds, names = {runner.inputs[0].name: sample}, [runner.outputs[0].name]
        return lambda: runner.run(feeds, names)

    runs = {name: once(runner) for name, runner in runners.items()}
    round_s = BURST / 1e3 * sum(timing.p50_ms for timing in ort.interleaved(runs, 2, warmup=1).values())
    fitting = int(seconds / round_s) if round_s > 0 else rounds
    return ort.interleaved(runs, min(max(fitting, least), rounds), warmup=1, burst=BURST)
