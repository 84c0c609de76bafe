"""Find the interval of each activation: the clipping with the least squared rounding error over calibration data."""

import dataclasses
from typing import Any

import numpy as np

from compress import graph
from compress.pipeline import Bench, Pass, State
from compress.scheme import Range
from compress.statistics import BINS, Observed, observe

CLIPS = np.linspace(1.0, 0.3, 71)
LEVELS = 255


def best_range(seen: Observed) -> Range:
    """Return the range that loses least when `seen` is cut into 256 levels.

    Both ends shrink together over a grid; squared error is summed from the histogram, so outliers count as often as
    they came. The range always contains zero.
    """
    lo, hi = min(seen.least, 0.0), max(seen.most, 0.0)
    if hi - lo <= 0:
        return Range(0.0, 1.0)
    centres = seen.lo + (np.arange(BINS) + 0.5) * (seen.hi - seen.lo) / BINS
    used = seen.counts > 0
    x, weight = centres[used], seen.counts[used].astype(np.float64)
    best, answer = np.inf, Range(lo, hi)
    for clip in CLIPS:
        step = (hi - lo) * clip / LEVELS
        zero = np.rint(-lo * clip / step)
        error = float(weight @ ((np.clip(np.rint(x / step) + zero, 0, LEVELS) - zero) * step - x) ** 2)
        if error < best:
            best, answer = error, Range(float(lo * clip), float(hi * clip))
    return answer


def activations(model: Any) -> list[str]:
    """Return every float tensor that a node makes or the graph takes, where its type is known."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model)
    values = (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)
    floats = {item.name for item in values if item.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    shapes = graph.shapes(model)
    made = [item.name for item in model.graph.input] + list(graph.producers(model))
    return [name for name in made if name in floats and len(shapes.get(name, ())) >= 2]


def _run(state: State, bench: Bench) -> State:
    names = activations(state.model)
    seen = observe(state.model, names, bench.splits.calibrate.x, lambda share: bench.say(share, ""), bench.threads)
    return dataclasses.replace(state, statistics=seen)


RANGES = Pass("ranges", "watching activations on calibration data", _run)
