"""How passes run: one after the other, each with its promises checked, a failure naming the pass.

A pass is a pure function `(State, Bench) -> State`. What it promises is checked here and not in the pass: the graph
stays valid, its inputs and outputs stay as they were, and a pass that says it keeps the function is run against the
model that came in.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from compress import Goal
from compress.data import Splits
from compress.graph import Array
from compress.measure import answers
from compress.metrics import Metric
from compress.recipe import Recipe
from compress.scheme import Candidate, Scheme
from compress.statistics import Statistics
from skills import ort
from skills.errors import SkerryError
from skills.profile import Profile

SAME_FUNCTION = 1e-3  # largest difference that a rewriting may make, relative to the largest output
CHECK_SAMPLES = 16


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """What is known so far: the float model, what calibration saw, the scheme, and remarks for the report.

    `passes` are those that changed something; `choices` says for passes with several options which one they took. `safer`
    are larger schemes to fall back to and `bolder` smaller ones that may keep the budget too, the largest first.
    """

    model: Any
    statistics: Statistics | None = None
    scheme: Scheme | None = None
    notes: tuple[str, ...] = ()
    harm: Mapping[str, Mapping[float, float]] = dataclasses.field(
        default_factory=dict
    )  # layer -> width -> its cost alone
    tried: tuple[Candidate, ...] = ()
    passes: tuple[str, ...] = ()
    choices: Mapping[str, str] = dataclasses.field(default_factory=dict)
    safer: tuple[Scheme, ...] = ()
    bolder: tuple[Scheme, ...] = ()
    cut_short: bool = False  # the time ended before the search for stored bits did

    def seen(self) -> Statistics:
        """Return the statistics; a pass that needs them runs after `ranges`."""
        if self.statistics is None:
            raise SkerryError("this pass needs the statistics that 'ranges' collects: put it after that pass")
        return self.statistics

    def planned(self) -> Scheme:
        """Return the scheme; a pass that needs it runs after `place`."""
        if self.scheme is None:
            raise SkerryError("this pass needs the scheme that 'place' makes: put it after that pass")
        return self.scheme


@dataclasses.dataclass(frozen=True, slots=True)
class Bench:
    """What passes may use: the target, the budget, the data of each split, and a way to say how far they are."""

    profile: Profile
    splits: Splits
    metric: Metric
    original_calibrate: Array
    original_select: Array
    max_drop: float
    goal: Goal
    say: Callable[[float, str], None]  # share of this pass done, the best so far in words
    threads: int = 1
    timing_rounds: int = 40
    seed: int = 0
    left: Callable[[], float] = lambda: math.inf  # seconds until the time budget is spent
    planned: Recipe | None = None  # what it says is done instead of searching


@dataclasses.dataclass(frozen=True, slots=True)
class Pass:
    """A named step. `keeps_function` promises that the float model still computes the same."""

    name: str
    title: str
    run: Callable[[State, Bench], State]
    keeps_function: bool = True


@contextlib.contextmanager
def expected(step: str) -> Iterator[None]:
    """Let an error that `step` should not raise become a SkerryError that names it: what other steps made is still there."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise SkerryError(f"{step} failed: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def named(step: str) -> Iterator[None]:
    """Let every error of a pass begin with its name."""
    with expected(f"pass '{step}'"):
        try:
            yield
        except SkerryError as error:
            raise type(error)(f"pass '{step}': {error}") from error


def apply(
    passes: Sequence[Pass], state: State, bench: Callable[[Pass], Bench], reference: Array | None = None
) -> State:
    """Run `passes` in order. `reference` is what the original answered on the first calibration inputs.

    Raises:
        SkerryError: a pass failed or broke a promise; the message begins with its name.
    """
    for step in passes:
        tools = bench(step)
        tools.say(0.0, "")
        with named(step.name):
            new = step.run(state, tools)
        check(step, state, new, tools, reference)
        if new.model is not state.model or new.statistics is not state.statistics or new.scheme is not state.scheme:
            new = dataclasses.replace(new, passes=(*new.passes, step.name))
        state = new
    return state


def check(step: Pass, before: State, after: State, bench: Bench, reference: Array | None) -> None:
    """Hold a pass to its promises.

    Raises:
        SkerryError: which promise was broken, by how much.
    """
    if after.model is not before.model:
        try:
            onnx.checker.check_model(after.model)
        except onnx.checker.ValidationError as error:
            raise SkerryError(f"pass '{step.name}' made an invalid graph: {str(error).splitlines()[0]}") from error
        for kind in ("input", "output"):
            was = [item.name for item in getattr(before.model.graph, kind) if item.name not in _inits(before.model)]
            now = [item.name for item in getattr(after.model.graph, kind)]
            if was != now:
                raise SkerryError(f"pass '{step.name}' changed the graph's {kind}s from {was} to {now}")
        if step.keeps_function and reference is not None:
            _same_answers(step, after, bench, reference)
    if after.scheme is not None:
        nodes = {node.name for node in after.model.graph.node}
        lost = [layer.node for layer in after.scheme.layers if layer.node not in nodes]
        if lost:
            raise SkerryError(f"pass '{step.name}' planned layers that the graph does not have: {', '.join(lost[:3])}")


def _same_answers(step: Pass, after: State, bench: Bench, reference: Array) -> None:
    samples = bench.splits.calibrate.x[: len(reference)]
    got = answers(ort.session(after.model.SerializeToString(), bench.threads), samples)
    scale = float(np.abs(reference).max()) or 1.0
    worst = float(np.abs(got - reference).max()) / scale if got.shape == reference.shape else float("inf")
    if not worst <= SAME_FUNCTION:  # written so that NaN fails too
        raise SkerryError(
            f"pass '{step.name}' changed what the model answers by {worst:.2g} of its range, at most {SAME_FUNCTION:g} is allowed"
        )


def _inits(model: Any) -> set[str]:
    return {item.name for item in model.graph.initializer}
