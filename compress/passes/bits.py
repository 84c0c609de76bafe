"""Choose for each layer how narrow it is stored, under the accuracy budget.

Each layer alone is fitted to each width and the distance to the original's answers measured on calibration data (no labels
needed, and far less noisy than accuracy). A knapsack then knows, for every size, the widths that should harm least. How
far down its front the budget allows to go is found by bisection: each model tried is rebuilt as a whole, emitted and run,
and judged on the select part. The search looks at nothing else, so the report part stays unseen.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from compress.emit import MIN_PACKED, emit, widths
from compress.graph import Array
from compress.knapsack import Choice, Option, front
from compress.measure import answers, divergence, foretold, log_probabilities, points
from compress.passes.reconstruct import Fit, Problem, rebuild, walk
from compress.pipeline import Bench, Pass, State
from compress.profiles import saturates_here
from compress.recipe import Recipe
from compress.scheme import Candidate, Layer, Scheme
from skills import ort
from skills.errors import FormatError

SAFE = 0.5  # of the budget may be foreseen: what is chosen looks better than it is, and the report part has its luck
BOLD = 1.5  # of the budget may be foreseen of what is only offered: on the reference models 1.0 came out as 0.4 to 0.8
MOST_SAFER, MOST_BOLDER = 2, 6
INSIDE = 0.25  # of the way from the best to all in 8 bits: nearer to either end is no step between them
FORETOLD_ERROR = 0.3  # how far off, relatively, the drop foretold by confidence is, however many samples there are
POINTS_A_NAT = 30.0  # of drop for one of distance: 25 to 35 on the reference nets
DISTANCE_ERROR, DISTANCE_DOUBT = 0.4, 0.15  # relatively, and in points
PROBE = 3  # bits at which a layer's harm is measured, where noise hides it at the fewest; else it follows its answers' error
CLOSE = 0.02  # the search ends when the sizes in question are this near, relatively
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

    For class scores three estimates are weighed by how sure each is: the measured drop, which with few samples is mostly
    chance; what the original's confidence, set right by the labels, says that the changed answers cost; and what the
    distance of all answers says, changed or not. Scores so far from log-odds that no temperature fits have no such distance.
    """
    part, original = bench.splits.select, bench.original_select
    measured = points(bench.metric, part, original, got)
    if bench.metric.name != "top1" or original.ndim != 2:
        return measured
    n, changed = len(got), (original.argmax(axis=1) != got.argmax(axis=1)).mean()
    heat = temperature(original, part.y)
    lost = foretold(log_probabilities(original) / heat, got)
    by_answers, by_distance = float(lost.mean()), POINTS_A_NAT * divergence(original, got, classes=True)
    estimates = [
        (measured, 1e4 * (changed + 1 / n) / n),
        (by_answers, (FORETOLD_ERROR * by_answers) ** 2 + (float(lost.var()) + 625 / n) / n),
        (by_distance, (DISTANCE_ERROR * by_distance) ** 2 + DISTANCE_DOUBT**2),
    ]
    if not TEMPERATURES[0] < heat < TEMPERATURES[-1]:
        del estimates[2]
    sure = sum(1 / variance for _, variance in estimates)
    expected = float(sum(value / variance for value, variance in estimates) / sure)
    # What the model was trained on it knows too well to show what it lost: there only the scores say it.
    return expected if bench.splits.train is None else max(expected, 100 * score_noise(original, got))


def score_noise(original: Array, output: Array) -> float:
    """Return the squared change of the class scores as a share of their variance: on four reference nets, as measured on
    other data, the drop in points was 60 to 160 times that."""
    before, after = (
        scores - scores.mean(axis=1, keepdims=True) for scores in map(log_probabilities, (original, output))
    )
    return float(((after - before) ** 2).sum() / max(((before - before.mean(axis=0)) ** 2).sum(), 1e-12))


def fitted(scheme: Scheme, node: str, fit: Fit) -> Scheme:
    """Return the scheme with what was fitted for a layer."""
    scheme = scheme.with_codes({node: fit.codes})
    return scheme if fit.bias is None else scheme.with_biases({node: fit.bias})


def harms(
    own: Mapping[float, float], probes: Sequence[float], measured: Callable[[float], float]
) -> dict[float, float] | None:
    """Return what each width of a layer harms, None where that is lost in noise at every one of `probes`. Pure.

    `own` is by how much each width spoils the layer's own answers, in any unit: harm follows it. `measured` says what a width
    does to the model's answers; with few samples some small harms come out as none, so the next width is asked then.
    """
    for probe in probes:
        harm = measured(probe)
        if harm > 0 and own[probe] > 0:
            return {bits: harm * spoilt / own[probe] for bits, spoilt in own.items()}
    return None if max(own.values()) > 0 else dict.fromkeys(own, 0.0)


def supposed(own: Mapping[float, float], others: Sequence[Mapping[float, float]]) -> dict[float, float]:
    """Return harms for a layer whose own are lost in noise: at its worst width the least of the others at theirs. Pure."""
    least, worst = min((max(row.values()) for row in others if any(row.values())), default=0.0), max(own.values())
    return {bits: least * spoilt / worst for bits, spoilt in own.items()}


class Search:
    """One search: what was measured of the layers, and every whole model that was tried."""

    def __init__(self, state: State, bench: Bench, allowed: tuple[float, ...]) -> None:
        self.state, self.bench, self.allowed = state, bench, allowed
        self.start = self.base = state.planned()
        self.held = 0  # calibration samples that judge single layers
        self.tried: list[Candidate] = []
        self.fits: dict[str, dict[float, Fit]] = {}
        self.harm: dict[str, dict[float, float]] = {}
        self.cut_short = False  # the time ended first
        self.took = 0.0  # seconds for a whole model: one that cannot be finished in time is not begun

    def able(self) -> list[Layer]:
        """Return the layers that may be stored narrower."""
        return [layer for layer in self.start.layers if layer.bits == 8 and layer.count >= MIN_PACKED]

    def judge(self, scheme: Scheme) -> Candidate:
        """Emit a scheme and run it."""
        file = emit(self.state.model, scheme, self.state.seen()).SerializeToString()
        session = self._open(file)
        distance = self._apart(session, slice(None))
        drop = expected_drop(self.bench, answers(session, self.bench.splits.select.x))
        return Candidate(len(file), distance, drop, scheme)

    def measure(self) -> bool:
        """Fit each layer alone to each width, and see what the narrow ones do to the answers; say whether time was enough.

        One half of the calibration data fits, the other judges: on what fitted it, a layer does better than it is.
        """
        able = {layer.node for layer in self.able()}
        x = self.bench.splits.calibrate.x
        batch = self.state.model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1
        self.held = len(x) // 2 // batch * batch

        def choose(problem: Problem) -> Fit | None:
            node = problem.layer.node
            if node in able:
                self.fits[node] = {bits: problem.fit(bits) for bits in self.allowed}
                return self.fits[node][8]
            return problem.fit(problem.layer.bits)

        with contextlib.suppress(FormatError):  # an operator without torch counterpart: layers are rounded to nearest
            shown, begun = x[self.held :], self.bench.left()
            if not walk(self.state.model, self.start, shown, choose, lambda at: self._say(0.2 * at), self.bench.left):
                self.cut_short = True
                return False
            if begun < math.inf:
                self.took = (begun - self.bench.left()) / len(self.allowed)
        for node, fits in self.fits.items():
            self.base = fitted(self.base, node, fits[8])
        plain = self._distance(self.base)
        narrow = [bits for bits in self.allowed if bits < 8]
        probes = list(dict.fromkeys((min(narrow, key=lambda bits: abs(bits - PROBE)), min(narrow))))
        hidden: dict[str, dict[float, float]] = {}
        for at, layer in enumerate(self.able()):
            if self.bench.left() <= 0:
                self.cut_short = True
                return False
            harm = functools.partial(self._harm, layer, plain)
            fitted_to = self.fits.get(layer.node)
            if fitted_to is None:
                self.harm[layer.node] = {bits: max(harm(bits), 0.0) for bits in narrow}
            else:
                own = {bits: max(fitted_to[bits].error - fitted_to[8].error, 0.0) for bits in narrow}
                found = harms(own, probes, harm)
                if found is None:
                    hidden[layer.node] = own
                else:
                    self.harm[layer.node] = found
            self._say(0.2 + 0.2 * (at + 1) / len(able))
        known = list(self.harm.values())
        self.harm |= {node: supposed(own, known) for node, own in hidden.items()}
        return True

    def _harm(self, layer: Layer, plain: float, bits: float) -> float:
        """Return how much farther than `plain` the answers go with one layer in so many bits: by chance it may be nearer."""
        scheme = self.base.with_bits({layer.node: bits})
        fit = self.fits.get(layer.node, {}).get(bits)
        return self._distance(scheme if fit is None else fitted(scheme, layer.node, fit)) - plain

    def _distance(self, scheme: Scheme) -> float:
        session = self._open(emit(self.state.model, scheme, self.state.seen()).SerializeToString())
        part = slice(0, self.held) if self.held else slice(None)
        return self._apart(session, part)

    def _open(self, file: bytes) -> ort.Session:
        return ort.session(file, self.bench.threads, exact=saturates_here(self.bench.profile))

    def _apart(self, session: ort.Session, part: slice) -> float:
        """Return how far a file's answers to a part of the calibration data are from the original's."""
        got = answers(session, self.bench.splits.calibrate.x[part])
        return divergence(self.bench.original_calibrate[part], got, classes=self.bench.metric.classes)

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

    def run(self) -> tuple[Scheme, tuple[Scheme, ...], tuple[Scheme, ...]]:
        """Return the smallest scheme that is foreseen to take half of the budget, safer ones and bolder ones.

        Safer are larger, bolder are smaller, and each have the largest first.
        """
        plain = self.judge(self.start)
        self.tried.append(plain)
        if not self.measure():
            return plain.scheme, (), ()
        choices, budget = front(self.options()), self.bench.max_drop
        found: dict[int, Candidate] = {0: plain}  # of the choices, the largest first
        for share in (SAFE, 1.0, BOLD):
            self.bisect(choices, found, share * budget)
        within = [at for at, one in found.items() if one.drop <= SAFE * budget]
        at = min(within, key=lambda at: found[at].bytes, default=0)
        best = found[at]
        if not any(INSIDE <= on_the_way(found[other], best, plain) <= 1 - INSIDE for other in within):
            self.halve(choices, found, at)
        safer = steps_back([one for one in found.values() if one.drop <= SAFE * budget], best, plain)
        bolder = [one for one in found.values() if one.bytes < best.bytes and one.drop <= BOLD * budget]
        return best.scheme, safer, _spread(bolder, MOST_BOLDER)

    def halve(self, choices: Sequence[Choice], found: dict[int, Candidate], best: int) -> None:
        """Try one choice in the middle between all in 8 bits and the best, if there is time."""
        middle = math.sqrt(choices[0].size * choices[best].size)
        untried = [at for at in range(1, best) if at not in found]
        if untried and self.bench.left() > self.took:
            at = min(untried, key=lambda at: abs(choices[at].size - middle))
            found[at] = self.rebuilt(choices[at], 0.95)

    def bisect(self, choices: Sequence[Choice], found: dict[int, Candidate], limit: float) -> None:
        """Try choices until the smallest that keeps a foreseen drop within `limit` is known, or the time is spent."""
        fails = min((at for at, one in found.items() if at and one.drop > limit), default=len(choices))
        fits = max(at for at in found if at < fails)
        harm = limit / POINTS_A_NAT
        while fails - fits > 1:
            began = time.monotonic()
            if fits == 0 or fails == len(choices):  # no bracket yet: look where the sum of harms says, then further out
                at = int(np.searchsorted([choice.harm for choice in choices], harm))
                at = min(max(at, fits + 1), fails - 1)
            elif choices[fits].size - choices[fails].size < CLOSE * choices[fails].size:
                break
            else:
                middle = (choices[fits].size + choices[fails].size) / 2
                at = next(k for k in range(fits + 1, fails) if choices[k].size <= middle or k == fails - 1)
            if self.bench.left() <= self.took:
                self.cut_short = True
                break
            found[at] = self.rebuilt(choices[at], 0.4 + 0.55 * min(1.0, len(self.tried) / 14))
            self.took = time.monotonic() - began
            fits, fails, harm = (at, fails, 3 * harm) if found[at].drop <= limit else (fits, at, harm / 3)

    def _say(self, share: float, best: str = "") -> None:
        self.bench.say(share, best)


def on_the_way(one: Candidate, best: Candidate, plain: Candidate) -> float:
    """Return how far a size is from the best (0) to all in 8 bits (1), by logarithms; 0 where those are of one size. Pure."""
    whole = math.log(plain.bytes / best.bytes)
    return math.log(one.bytes / best.bytes) / whole if whole > 0 else 0.0


def steps_back(within: Sequence[Candidate], best: Candidate, plain: Candidate) -> tuple[Scheme, ...]:
    """Return what to fall back to where the best is too bold: of what lies between it and all in 8 bits the one in the
    middle and the one next to it, the larger first. Pure."""
    between = [one for one in within if best.bytes < one.bytes < plain.bytes]
    if not between:
        return ()
    middle = min(between, key=lambda one: abs(on_the_way(one, best, plain) - 0.5))
    nearest = min(between, key=lambda one: one.bytes)
    return (middle.scheme,) if middle is nearest else (middle.scheme, nearest.scheme)


def _spread(ones: Sequence[Candidate], most: int) -> tuple[Scheme, ...]:
    """Return up to `most` schemes from the largest to the smallest, evenly picked."""
    ordered = sorted(ones, key=lambda one: -one.bytes)
    picked = sorted({round(at) for at in np.linspace(0, len(ordered) - 1, min(len(ordered), most))})
    return tuple(ordered[at].scheme for at in picked)


def _again(state: State, recipe: Recipe, x: Array) -> State:
    """Return the state with the widths of a recipe, rebuilt as a search would have; what goes into blocks does so later."""
    scheme = state.planned().with_bits({layer.name: layer.bits_before or layer.bits for layer in recipe.layers})
    with contextlib.suppress(FormatError):  # an operator without torch counterpart: layers are rounded to nearest
        scheme = rebuild(state.model, scheme, x)
    return dataclasses.replace(state, scheme=scheme, notes=(*state.notes, "Layers are stored as the recipe says."))


def _run(state: State, bench: Bench) -> State:
    if bench.planned is not None:
        return _again(state, bench.planned, bench.splits.calibrate.x)
    allowed = widths(state.model, bench.profile)
    search = Search(state, bench, allowed)
    if len(allowed) < 2 or bench.goal == "latency" or not search.able():
        return state
    scheme, safer, bolder = search.run()
    note = f"To choose the stored bits, {len(search.tried)} whole models were tried."
    return dataclasses.replace(
        state, scheme=scheme, safer=safer, bolder=bolder, notes=(*state.notes, note), harm=search.harm,
        tried=(*state.tried, *search.tried), cut_short=search.cut_short,
    )  # fmt: skip


BITS = Pass("bits", "choosing bits for each layer", _run)
