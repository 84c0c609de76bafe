"""Numbers that a verdict rests on: answers on the real runtime, the paired drop with its interval, time side by side."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, Protocol

import numpy as np

from compress.data import Part
from compress.graph import Array
from skills import ort
from skills.errors import FormatError, SkerryError
from skills.ort import Port

Metric = Literal["top1", "agreement", "cosine"]
Verdict = Literal["proven", "within_budget_unproven", "not_reached"]
BATCH_ELEMENTS = 1 << 20  # input numbers per run: keeps a batch's activations in tens of MiB
Z95 = 1.959964


class Runner(Protocol):
    """A loaded model of any runtime: onnxruntime's `Session`, or LiteRT's from `compress/tflite.py`."""

    @property
    def inputs(self) -> tuple[Port, ...]: ...
    @property
    def outputs(self) -> tuple[Port, ...]: ...
    @property
    def load_ms(self) -> float: ...
    def run(self, feeds: Mapping[str, Array], names: list[str] | None = None) -> dict[str, Array]: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Drop:
    """How much worse in percentage points (positive = worse), with the paired 95 % interval over `n` samples."""

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


def metric_for(output: Array, labelled: bool, x: Array) -> Metric:
    """Return what can be measured: top-1 with labels, else agreement of the top answer, else cosine of the outputs.

    An output shaped like the input `x` is taken for a reconstruction, not for class scores.

    Raises:
        FormatError: labels were given and the output is not one row of class scores a sample.
    """
    scores = output.ndim == 2 and output.shape[1] > 1 and (labelled or output.shape != x.shape)
    if labelled and not scores:
        raise FormatError(f"labels need an output [N, classes], the model's first output is {list(output.shape)}")
    if labelled:
        return "top1"
    return "agreement" if scores else "cosine"


def marks(metric: Metric, output: Array, part: Part, original: Array) -> Array:
    """Return each sample's mark between 0 and 1: right or wrong, same or other answer, or cosine."""
    match metric:
        case "top1":
            return np.asarray(output.argmax(axis=1) == part.y, np.float64)
        case "agreement":
            return np.asarray(output.argmax(axis=1) == original.argmax(axis=1), np.float64)
        case "cosine":
            a, b = (
                output.reshape(len(output), -1).astype(np.float64),
                original.reshape(len(output), -1).astype(np.float64),
            )
            norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
            return np.asarray(np.clip((a * b).sum(axis=1) / np.maximum(norms, 1e-30), 0, 1))
    raise SkerryError(f"there is no metric {metric}")


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


def verdict(drop: Drop, max_drop: float) -> Verdict:
    """Return `proven` when even the interval's worse end is inside the budget."""
    if drop.hi <= max_drop:
        return "proven"
    return "within_budget_unproven" if drop.points <= max_drop else "not_reached"


def soft_drop(original: Array, output: Array) -> float:
    """Return the drop in points that the original's own confidence predicts, 0 for outputs that are no class scores.

    Where the top answer changed, the loss is the probability that the original gave to its own answer less what it
    gave to the new one. No labels are needed, and lucky changes do not hide unlucky ones, so a hundred samples say
    as much as a thousand labelled ones would.
    """
    if output.ndim != 2 or output.shape[1] < 2:
        return 0.0
    odds, rows = np.exp(_log_probabilities(original)), np.arange(len(original))
    lost = odds[rows, original.argmax(axis=1)] - odds[rows, output.argmax(axis=1)]
    return float(lost.mean()) * 100


def divergence(original: Array, output: Array) -> float:
    """Return how far two models' answers are apart without needing labels, 0 for equal.

    Kullback-Leibler divergence of the class probabilities where the output is class scores, else the squared error
    relative to the original's variance.
    """
    if output.ndim == 2 and output.shape[1] > 1:
        p, q = _log_probabilities(original), _log_probabilities(output)
        return float((np.exp(p) * (p - q)).sum(axis=1).mean())
    spread = float(original.astype(np.float64).var()) or 1.0
    return float(((original.astype(np.float64) - output) ** 2).mean()) / spread


def _log_probabilities(scores: Array) -> Array:
    scores = scores.astype(np.float64)
    if float(scores.min()) >= 0 and np.allclose(scores.sum(axis=1), 1, atol=0.02):
        return np.asarray(np.log(np.maximum(scores, 1e-9)))  # the graph ends in Softmax already
    scores = scores - scores.max(axis=1, keepdims=True)
    return np.asarray(scores - np.log(np.exp(scores).sum(axis=1, keepdims=True)))


def race(runners: Mapping[str, Runner], sample: Array, rounds: int) -> dict[str, ort.Timing]:
    """Time one inference of each model, batch 1, side by side."""

    def once(runner: Runner) -> object:
        feeds = {runner.inputs[0].name: sample}
        names = [runner.outputs[0].name]
        return lambda: runner.run(feeds, names)

    return ort.interleaved({name: once(runner) for name, runner in runners.items()}, rounds)  # type: ignore[misc]
