"""Remove channels that a network can spare and make up for them by least squares, without training.

It does what a recipe says and nothing else: what goes is chosen once the widths of the layers are known (`compress.candidates`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from compress.channels import Shrink, survivors
from compress.compensate import MADE_UP_ON, compensated
from compress.data import whole_runs
from compress.graph import Array, with_biases
from compress.passes.canonicalise import canonicalise
from compress.pipeline import Bench, Pass, State
from compress.shrinking import SAMPLES, choose
from compress.stage import shrink_of
from skills import ort

KEPT = (0.95, 0.9, 0.85, 0.8)  # of the work, by one candidate after the other


def spare(
    model: Any, now: Shrink, kept: float, bench: Bench, runner: ort.Session, say: Callable[[float], None]
) -> Shrink:
    """Return `now` and more to remove, until `kept` of the work of `model` is left, nothing more can go, or the time ends.

    Raises:
        FormatError: an operator of the graph has no torch counterpart.
    """
    few = whole_runs(runner.inputs[0], bench.splits.calibrate.x, SAMPLES)
    return choose(
        with_biases(model), now, few, bench.original_calibrate[: len(few)], kept, "latency", say,
        bench.profile.channel_multiple, bench.profile.channel_block, rounds=1, left=bench.left, classes=bench.metric.classes,
    )  # fmt: skip


def smaller(model: Any, shrink: Shrink, x: Array) -> Any:
    """Return the model without what `shrink` removes, what stays fitted to answer on `x` as before."""
    full = with_biases(model)
    # Where a branch was removed, two activations follow each other.
    return canonicalise(compensated(full, shrink.apply(full), survivors(full, shrink.keep), x))


def _run(state: State, bench: Bench) -> State:
    if bench.planned is None or bench.planned.removed is None:
        return state
    shrink = shrink_of(bench.planned.removed)
    note = (
        f"Without training, {len(shrink.without)} residual branches and channels of {len(shrink.keep)} groups were removed, and "
        "the weights that stay were fitted to make up for them."
    )
    model = smaller(state.model, shrink, bench.splits.calibrate.x[:MADE_UP_ON])
    return dataclasses.replace(state, model=model, removed=shrink, notes=(*state.notes, note))


PRUNE = Pass("prune", "removing channels", _run, keeps_function=False)
