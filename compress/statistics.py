"""What calibration data makes of a float model: per tensor a histogram, and the mean of each channel.

Histograms are streamed: 2,048 bins that double their width when a value falls outside, so memory does not grow with
the data.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx

from compress import graph
from compress.graph import Array
from compress.measure import batches
from skills import ort

BINS = 2048


@dataclasses.dataclass(frozen=True, slots=True)
class Observed:
    """One tensor: counts of values in `BINS` equal bins over [lo, hi], the true extremes, the mean per channel."""

    counts: Array
    lo: float
    hi: float
    least: float
    most: float
    mean: Array


Statistics = Mapping[str, Observed]


class Histogram:
    """A histogram over an interval that doubles around what comes; the counts are of one stream of values."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.lo = self.hi = 0.0
        self.least, self.most = np.inf, -np.inf

    def add(self, values: Array) -> None:
        """Count the values of an array."""
        least, most = float(values.min()), float(values.max())
        self.least, self.most = min(self.least, least), max(self.most, most)
        if self.hi <= self.lo:
            span = max(most - least, 1e-6)
            self.lo, self.hi = least - span * 1e-3, most + span * 1e-3
        while least < self.lo or most > self.hi:
            self._double(down=least < self.lo)
        counts, _ = np.histogram(values, BINS, (self.lo, self.hi))
        self.counts += counts

    def _double(self, *, down: bool) -> None:
        """Merge pairs of bins; the freed half lies below or above what was counted so far."""
        merged = self.counts.reshape(-1, 2).sum(axis=1)
        empty = np.zeros(BINS // 2, np.int64)
        span = self.hi - self.lo
        if down:
            self.lo -= span
            self.counts = np.concatenate([empty, merged])
        else:
            self.hi += span
            self.counts = np.concatenate([merged, empty])


def observe(
    model: Any, names: list[str], x: Array, say: Callable[[float], None], threads: int = 1
) -> dict[str, Observed]:
    """Run the float `model` on `x` and return what the tensors in `names` held."""
    probe = graph.copy(model)
    have = graph.outputs(model)
    inputs = {item.name for item in model.graph.input}
    probe.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names if n not in have | inputs)
    session = ort.session(_typed(probe).SerializeToString(), threads)
    port = session.inputs[0]
    histograms = {name: Histogram() for name in names}
    sums: dict[str, Array] = {}
    runs = batches(port, x)
    inner = [name for name in names if name not in inputs]
    for at, batch in enumerate(runs):
        found = session.run({port.name: batch}, inner) | {name: batch for name in names if name in inputs}
        for name in names:
            value = found[name]
            histograms[name].add(value)
            over = tuple(axis for axis in range(value.ndim) if axis != 1)
            sums[name] = _added(sums.get(name), value.astype(np.float64).mean(axis=over) * len(batch))
        say((at + 1) / len(runs))
    return {
        name: Observed(h.counts, h.lo, h.hi, h.least, h.most, sums[name] / len(x)) for name, h in histograms.items()
    }


def _added(total: Array | None, more: Array) -> Array:
    """Add up channel means; a tensor whose second size is no channel but the batch (in LSTMs) ends without any."""
    if total is None:
        return more
    return total + more if total.shape == more.shape else np.empty(0)


def _typed(model: Any) -> Any:
    """Give the added outputs their types: onnxruntime does not infer them."""
    inferred = onnx.shape_inference.infer_shapes(model)
    types = {item.name: item for item in inferred.graph.value_info}
    ends = []
    for item in model.graph.output:
        known = item.type.WhichOneof("value") is not None
        ends.append(item if known else types.get(item.name) or onnx.helper.make_tensor_value_info(item.name, 1, None))
    graph.replace(model.graph.output, ends)
    return model
