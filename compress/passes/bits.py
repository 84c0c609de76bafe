"""Choose for each layer how narrow it is stored, under the accuracy budget.

Each layer alone is fitted to each width and the distance to the original's answers measured on calibration data (no labels
needed, and far less noisy than accuracy). A knapsack then knows, for every size, the widths that should harm least. How
far down its front the budget allows to go is found by bisection: each model tried is rebuilt as a whole, emitted and run,
and judged on the select part. The search looks at nothing else, so the report part stays unseen.
"""

import contextlib
import dataclasses
import math

import numpy as np

from compress.emit import MIN_PACKED, emit, least_runtime, widths
from compress.graph import Array
from compress.knapsack import Choice, Option, front
from compress.measure import answers, divergence, log_probabilities, points, soft_drop
from compress.passes.reconstruct import Fit, Problem, rebuild, walk
from compress.pipeline import Bench, Pass, State
from compress.scheme import Candidate, Layer, Scheme
from skills import ort
from skills.errors import FormatError

BUDGET_SHARE = 0.6  # of the budget may be spent on the select part: what is chosen on it looks better there than it is
FORETOLD_ERROR = 0.3  # how far off, relatively, the foretold drop may be however many samples there are
PROBE = 3  # bits at which a layer's harm is measured; at other widths it follows the error of the layer's own answers
CLOSE = 0.01  # bisection ends when the sizes in question are this near, relatively
TEMPERATURES = np.geomspace(0.25, 4.0, 41)


def temperature(scores: Array, labels: Array | None) -> float:
    """Return what the original's scores must be divided by for its confidence to be as right as its answers (Guo et al. 2017)."""
    if labels is None or scores.ndim != 2 or labels.dtype.kind not in "iu":
        return 1.0
    log_odds = log_probabilities(scores)
    rows = np.arange(len(scores))
    losses = [-log_probabilities(log_odds / t)[rows, labels].mean() for t in TEMPERATURES]
    return float(TEMPERATURES[int(np.argmin(losses))])


def expected_drop(bench: Bench, got: Array) -> float:
    """Return the drop in points to expect of a model that answers `got` on the select part.

    The measured drop and the one that the original's confidence foretells, each counted by how sure it is: with few
    samples the measured one is mostly chance.
    """
    part, original = bench.splits.select, bench.original_select
    measured = points(bench.metric, part, original, got)
    if bench.metric.name != "top1" or original.ndim != 2:
        return measured
    log_odds = log_probabilities(original) / temperature(original, part.y)
    changed = original.argmax(axis=1) != got.argmax(axis=1)
    foretold = soft_drop(log_odds, got)
    noise = 100 * math.sqrt((changed.mean() + 1 / len(got)) / len(got))
    doubt = FORETOLD_ERROR * abs(foretold) + noise / 2  # a changed answer rarely costs all that it could
    expected = (measured / noise**2 + foretold / doubt**2) / (1 / noise**2 + 1 / doubt**2)
    # What the model was trained on it knows too well to show what it lost: there only the scores say it.
    return expected if bench.splits.train is None else max(expected, 100 * score_noise(original, got))


def score_noise(original: Array, output: Array) -> float:
    """Return the squared change of the class scores as a share of their variance: on four reference nets, as measured on
    other data, the drop in points was 60 to 160 times that."""
    before, after = (
        scores - scores.mean(axis=1, keepdims=True) for scores in map(log_probabilities, (original, output))
    )
    return float(((after - before) ** 2).sum() / max(((before - before.mean(axis=0)) ** 2).sum(), 1e-12))


class Search:
    """One search: what was measured of the layers, and every whole model that was tried."""

    def __init__(self, state: State, bench: Bench, allowed: tuple[float, ...]) -> None:
        self.state, self.bench, self.allowed = state, bench, allowed
        self.start = state.planned()
        self.tried: list[Candidate] = []
        self.fits: dict[str, dict[float, Fit]] = {}
        self.harm: dict[str, dict[float, float]] = {}

    def able(self) -> list[Layer]:
        """Return the layers that may be stored narrower."""
        return [layer for layer in self.start.layers if layer.bits == 8 and layer.count >= MIN_PACKED]

    def judge(self, scheme: Scheme, *, select: bool = True) -> Candidate:
        """Emit a scheme and run it."""
        file = emit(self.state.model, scheme, self.state.seen()).SerializeToString()
        session = ort.session(file, self.bench.threads)
        distance = divergence(self.bench.original_calibrate, answers(session, self.bench.splits.calibrate.x))
        drop = expected_drop(self.bench, answers(session, self.bench.splits.select.x)) if select else 0.0
        return Candidate(len(file), distance, drop, scheme)

    def measure(self) -> None:
        """Fit each layer alone to each width, and see what the narrow ones do to the answers."""
        able = {layer.node for layer in self.able()}

        def choose(problem: Problem) -> Fit | None:
            node = problem.layer.node
            if node in able:
                self.fits[node] = {bits: problem.fit(bits) for bits in self.allowed}
                return self.fits[node][8]
            return problem.fit(problem.layer.bits)

        with contextlib.suppress(FormatError):  # an operator without torch counterpart: layers are rounded to nearest
            walk(
                self.state.model, self.start, self.bench.splits.calibrate.x, choose, lambda done: self._say(0.2 * done)
            )
        plain = self.judge(self.start, select=False).distance
        probe = min((bits for bits in self.allowed if bits < 8), key=lambda bits: abs(bits - PROBE))
        for at, layer in enumerate(self.able()):
            self.harm[layer.node] = self._harm(layer, plain, probe)
            self._say(0.2 + 0.2 * (at + 1) / len(able))

    def _harm(self, layer: Layer, plain: float, probe: float) -> dict[float, float]:
        fits = self.fits.get(layer.node)
        narrow = [bits for bits in self.allowed if bits < 8]
        if fits is None:
            return {bits: max(self._alone(layer, bits) - plain, 0.0) for bits in narrow}
        own = {bits: max(fits[bits].error - fits[8].error, 0.0) for bits in narrow}
        measured = max(self._alone(layer, probe) - plain, 0.0)
        return {bits: measured * own[bits] / max(own[probe], 1e-30) for bits in narrow}

    def _alone(self, layer: Layer, bits: float) -> float:
        scheme = self.start.with_bits({layer.node: bits})
        fit = self.fits.get(layer.node, {}).get(bits)
        if fit is not None:
            scheme = scheme.with_codes({layer.node: fit.codes})
            scheme = scheme if fit.bias is None else scheme.with_biases({layer.node: fit.bias})
        return self.judge(scheme, select=False).distance

    def options(self) -> list[list[Option]]:
        """Return each layer's widths with what they weigh in the file and what they harm."""
        able = self.able()
        overhead = {}
        for bits in self.allowed:
            scheme = self.start.with_bits({layer.node: bits for layer in able})
            size = len(emit(self.state.model, scheme, self.state.seen()).SerializeToString())
            overhead[bits] = (size - sum(math.ceil(layer.count * bits / 8) for layer in able)) / len(able)
        return [
            [
                Option(round(layer.count * bits / 8 + overhead[bits]), self.harm[layer.node].get(bits, 0.0))
                for bits in self.allowed
            ]
            for layer in able
        ]

    def rebuilt(self, choice: Choice, at: float) -> Candidate:
        """Return the model of a choice, rebuilt as a whole, and remember it."""
        able = self.able()
        scheme = self.start.with_bits(
            {layer.node: self.allowed[pick] for layer, pick in zip(able, choice.picks, strict=True)}
        )
        if self.fits:
            scheme = rebuild(self.state.model, scheme, self.bench.splits.calibrate.x)
        found = self.judge(scheme)
        self.tried.append(found)
        self._say(at, f"{found.bytes} bytes: {found.drop:+.2f} points")
        return found

    def fits_budget(self, found: Candidate) -> bool:
        """Return whether a model may be expected to keep the budget."""
        return found.drop <= BUDGET_SHARE * self.bench.max_drop

    def run(self) -> Scheme:
        """Return the smallest scheme found that may be expected to keep the budget."""
        best = self.judge(self.start)
        self.tried.append(best)
        self.measure()
        choices = front(self.options())
        low, high = 0, len(choices)  # choices[low] fits (or is all there is), choices[high] does not
        while high - low > 1 and self.bench.left() > 0:
            near = choices[low].size - choices[high - 1].size < CLOSE * choices[high - 1].size
            if near and high < len(choices):
                break
            middle = (low + high) // 2 if self.tried[1:] else high - 1
            found = self.rebuilt(choices[middle], 0.4 + 0.55 * min(1.0, len(self.tried) / 10))
            if self.fits_budget(found):
                low = middle
                best = min(best, found, key=lambda one: one.bytes)
            else:
                high = middle
        return best.scheme

    def _say(self, share: float, best: str = "") -> None:
        self.bench.say(share, best)


def _run(state: State, bench: Bench) -> State:
    allowed = widths(state.model, bench.profile)
    search = Search(state, bench, allowed)
    if len(allowed) < 2 or bench.goal == "latency" or not search.able():
        return state
    scheme = search.run()
    counts = {bits: sum(layer.bits == bits for layer in scheme.layers) for bits in allowed}
    stored = ", ".join(f"{count} in {bits:g} bits" for bits, count in counts.items() if count)
    note = f"Layers are stored as follows: {stored}; {len(search.tried)} whole models were tried."
    if any(count for bits, count in counts.items() if bits < 8):
        note += f" Such weights need onnxruntime {'.'.join(map(str, least_runtime(scheme)))} or newer."
    return dataclasses.replace(
        state, scheme=scheme, notes=(*state.notes, note), harm=search.harm, tried=(*state.tried, *search.tried)
    )


BITS = Pass("bits", "choosing bits for each layer", _run)
