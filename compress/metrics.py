"""What "as good as before" means: the shipped metrics, a user's own, and which one fits a model and its data.

A metric turns outputs into marks, arrays with one row a sample, and marks into one number. One array of marks is
averaged, so that samples can be paired; two or more are handed to `total`, as macro-F1 and AUC need. Outputs are always
the model's first output.
"""

import dataclasses
import difflib
import functools
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from compress import references
from compress.data import AskedMetric, Data, Part, shape
from compress.graph import Array
from skills.errors import FormatError, UsageError
from skills.files import sha256_hex

METRICS = ("top1", "macro_f1", "mse", "psnr", "roc_auc", "cosine", "agreement")
LEAST_ERROR = 1e-10  # of the squared peak: a perfect reconstruction counts as 100 dB

Marks = tuple[Array, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Metric:
    """One way to judge outputs. A bounded one lies in 0..1, and its drop is in percentage points; the drop of any other is
    the relative change in per cent."""

    name: str
    marks: Callable[[Array, Part, Array], Marks]  # (outputs, the samples, what the original answered)
    total: Callable[..., float] | None = None  # marks -> the metric, where they are more than one array
    higher_is_better: bool = True
    bounded: bool = True
    needs_labels: bool = True
    classes: bool = True  # the outputs are rows of class scores, so that answers lie apart as distributions do

    @property
    def unit(self) -> str:
        """Return what a drop is counted in."""
        return "percentage points" if self.bounded else "per cent"

    def of(self, outputs: Array, part: Part, original: Array) -> float:
        """Return the metric of `outputs`, a fraction if bounded."""
        return self.value(self.marks(outputs, part, original))

    def value(self, marks: Marks) -> float:
        """Return the metric that these marks make."""
        if len(marks) == 1:
            return float(marks[0].mean())
        if self.total is None:
            raise TypeError(f"the metric {self.name} has {len(marks)} arrays of marks and nothing that sums them up")
        return float(self.total(*marks))


def choose(data: Data, output: Array, few: Array) -> Metric:
    """Return the metric that the user asked for, or the one that fits: `output` is what the model gives for the inputs `few`.

    Not asked: top-1 for whole-number labels and rows of class scores, ROC-AUC for labels 0 and 1 and one score a sample (or a
    reconstruction of the input, whose error is the score), the squared error for numbers of the output's shape; without
    labels agreement of the top answer, or for outputs that are no class scores their cosine with the original's.

    Raises:
        UsageError: there is no metric of that name.
        FormatError: labels out of range, or labels, outputs and metric do not fit; says what there is.
    """
    asked = data.metric
    if callable(asked):
        metric = _own(asked)
    elif asked is not None and asked not in METRICS:
        near = difflib.get_close_matches(asked, METRICS, 1, 0.6)
        advice = (
            f", did you mean {near[0]}?" if near else f": use one of {', '.join(METRICS)} or a function of your own"
        )
        raise UsageError(f"there is no metric {asked}{advice}")
    else:
        metric = _shipped(asked or _fitting(data, output, few))
    if metric.needs_labels and data.y is None:
        raise FormatError(f"the metric {metric.name} needs y, the data has only x: add y, or leave the metric out")
    _check(metric.name, data, output, few)
    metric = dataclasses.replace(metric, classes=_classes(metric.name, data, output, few))
    if metric.name in ("mse", "psnr"):  # without y of that size the target is the input, which every part has
        against_y = data.y is not None and data.y[0].size == output[0].size
        metric = dataclasses.replace(metric, needs_labels=against_y)
    return metric


def unlabelled(output: Array, few: Array) -> Metric:
    """Return what can be measured without labels: agreement of the top answer, else the cosine with the original's output.

    An output shaped like the input is taken for a reconstruction, not for class scores.
    """
    return _shipped("agreement" if _scores(output) and output.shape != few.shape else "cosine")


def identity(metric: Metric, asked: AskedMetric | None) -> tuple[object, ...]:
    """Return what tells this metric from any other: its name, its sense and, for a user's own, what it computes."""
    own = _code(asked) if callable(asked) else ()
    return metric.name, metric.higher_is_better, metric.bounded, own


def _code(function: Callable[..., Any]) -> tuple[object, ...]:
    """Return what a function computes as plain values.

    That is where it stands, the hash of the whole file, since it may call others there, its bytecode for one that is in no
    file, and the plain values that it was made with.
    """
    held: list[object] = []
    while isinstance(function, functools.partial):
        held += [*function.args, *function.keywords.values()]
        function = function.func
    held += [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    held += [*(getattr(function, "__defaults__", None) or ()), *getattr(function, "__dict__", {}).values()]
    made = function if hasattr(function, "__qualname__") else type(function)
    code = getattr(function, "__code__", None)
    if code is not None:
        held += [code.co_code.hex(), *code.co_names, *code.co_consts]
    plain = tuple(value for value in held if value is None or isinstance(value, (bool, int, float, str)))
    return getattr(made, "__module__", ""), getattr(made, "__qualname__", ""), _source(made), plain


def _source(made: Any) -> str:
    """Return the hash of the file that a function or class is written in, empty where there is none."""
    try:
        path = inspect.getsourcefile(made)
        return sha256_hex(Path(path).read_bytes()) if path else ""
    except (TypeError, OSError):
        return ""


def _fitting(data: Data, output: Array, few: Array) -> str:
    y = data.y
    if y is None:
        return unlabelled(output, few).name
    if y.dtype.kind == "i" and y.ndim == 1:
        binary = 0 <= int(y.min()) <= int(y.max()) <= 1
        if binary and (output[0].size == 1 or (output.shape == few.shape and output[0].size > 2)):
            return "roc_auc"
        if _scores(output):
            return "top1"
    elif y[0].size == output[0].size:
        return "mse"
    raise FormatError(
        f"y is {y.dtype} {shape(('N', *y.shape[1:]))} and the model's first output {shape(('N', *output.shape[1:]))}: expected "
        "whole-number labels for rows of class scores, numbers of the output's shape, or a metric of your own"
    )


def _check(name: str, data: Data, output: Array, few: Array) -> None:
    if name in ("top1", "macro_f1", "agreement") and not _scores(output):
        raise FormatError(f"{name} needs an output [N, classes], the model's first output is {list(output.shape)}")
    for key, y in (("y", data.y), ("y_train", data.y_train)):
        if y is None:
            continue
        if name in ("top1", "macro_f1", "roc_auc"):
            classes = 2 if name == "roc_auc" else output.shape[1]
            what = "roc_auc takes" if name == "roc_auc" else f"the model's output has {classes} classes"
            if y.dtype.kind != "i" or y.ndim != 1:
                raise FormatError(
                    f"{key} is {y.dtype} {shape(('N', *y.shape[1:]))}, {name} expected {len(y)} whole-number labels"
                )
            if not 0 <= int(y.min()) <= int(y.max()) < classes:
                raise FormatError(f"labels in {key} run from {y.min()} to {y.max()}, {what} (0 to {classes - 1})")
            if name == "roc_auc" and key == "y" and y.min() == y.max():
                raise FormatError(f"all labels in y are {y.min()}, roc_auc needs both 0 and 1")
    reconstructs = output.shape == few.shape
    if name in ("mse", "psnr") and not reconstructs and (data.y is None or data.y[0].size != output[0].size):
        raise FormatError(
            f"{name} needs y or the input in the shape of the model's first output, which is {list(output.shape)}"
        )
    if name == "roc_auc" and not reconstructs and output[0].size > 2:
        raise FormatError(
            f"roc_auc needs one or two scores a sample or a reconstruction of the input, the output is {list(output.shape)}"
        )


def _classes(name: str, data: Data, output: Array, few: Array) -> bool:
    """Return whether rows of the output are class scores and not boxes, embeddings or a reconstruction."""
    if name in ("top1", "macro_f1", "agreement"):
        return True
    labels = data.y is None or (data.y.dtype.kind in "iu" and data.y.ndim == 1)
    return labels and _scores(output) and output.shape != few.shape and name not in ("mse", "psnr", "cosine")


def _scores(output: Array) -> bool:
    return output.ndim == 2 and output.shape[1] > 1


def _shipped(name: str) -> Metric:
    match name:
        case "top1":
            return Metric(name, lambda out, part, _: ((out.argmax(axis=1) == _y(part)).astype(np.float64),))
        case "agreement":
            return Metric(
                name,
                lambda out, _, original: ((out.argmax(axis=1) == original.argmax(axis=1)).astype(np.float64),),
                needs_labels=False,
            )
        case "cosine":
            return Metric(name, lambda out, _, original: (_cosine(out, original),), needs_labels=False)
        case "macro_f1":
            return Metric(name, lambda out, part, _: (_y(part), out.argmax(axis=1)), macro_f1)
        case "roc_auc":
            return Metric(name, lambda out, part, _: (_y(part), _rank(out, part)), roc_auc)
        case "mse":
            return Metric(
                name,
                lambda out, part, _: (_errors(out, part)[0],),
                higher_is_better=False,
                bounded=False,
                needs_labels=False,
            )
        case _:
            return Metric("psnr", lambda out, part, _: (_psnr(out, part),), bounded=False, needs_labels=False)


def _own(function: Callable[[Array, Array], Any]) -> Metric:
    """Wrap `(outputs, y) -> one mark a sample, or one number`.

    Attributes of the function say what it means: `higher_is_better` (default True) and `bounded` (default True: in 0..1).
    """
    name = str(getattr(function, "__name__", type(function).__name__))
    bounded = bool(getattr(function, "bounded", True))

    def call(outputs: Array, y: Array) -> Array:
        with references.named(f"the metric {name}"):
            value = np.asarray(function(outputs, y), np.float64)
        if value.shape not in ((), (len(outputs),)):
            raise FormatError(
                f"the metric {name} gave {list(value.shape)} numbers for {len(outputs)} samples, expected one, or one for each"
            )
        if not np.isfinite(value).all() or (bounded and not 0 <= value.min() <= value.max() <= 1):
            raise FormatError(
                f"the metric {name} gave {value.min():g} to {value.max():g}, expected 0 to 1 (set {name}.bounded = False)"
            )
        return value

    def marks(outputs: Array, part: Part, _original: Array) -> Marks:
        value = call(outputs, _y(part))
        return (value,) if value.ndim else (outputs, _y(part))

    return Metric(
        name,
        marks,
        lambda outputs, y: float(call(outputs, y)),
        bool(getattr(function, "higher_is_better", True)),
        bounded,
    )


def macro_f1(y: Array, answer: Array) -> float:
    """Return the mean over classes of 2 TP / (2 TP + FP + FN); a class that neither `y` nor `answer` has is left out."""
    size = int(max(y.max(), answer.max())) + 1
    right = np.bincount(y[y == answer], minlength=size)
    both = np.bincount(y, minlength=size) + np.bincount(answer, minlength=size)
    return float((2 * right[both > 0] / both[both > 0]).mean())


def roc_auc(y: Array, rank: Array) -> float:
    """Return the share of pairs (a 1, a 0) in which the 1 ranks higher, ties counted half; 0.5 without both kinds.

    `rank` holds whole numbers from 0 in the order of the scores, equal for equal scores. Source: Hanley and McNeil 1982.
    """
    size = int(rank.max()) + 1
    ones, zeros = np.bincount(rank[y == 1], minlength=size), np.bincount(rank[y == 0], minlength=size)
    pairs = float(ones.sum()) * float(zeros.sum())
    below = np.cumsum(zeros) - zeros / 2
    return float((ones * below).sum() / pairs) if pairs else 0.5


def guessing(name: str, outputs: Array, part: Part) -> tuple[float, float] | None:
    """Return what guessing gives by this metric and its standard error, None where there is no such thing.

    ROC AUC: Hanley and McNeil 1982; macro F1 as if it were the share of right answers, which it is near for classes of one size.
    """
    if name == "roc_auc":
        ones = int((_y(part) == 1).sum())
        zeros = len(part) - ones
        return 0.5, ((ones + zeros + 1) / (12 * ones * zeros)) ** 0.5 if ones and zeros else math.inf
    if name in ("top1", "macro_f1"):
        chance = 1 / outputs.shape[1]
        return chance, (chance * (1 - chance) / len(part)) ** 0.5
    return None


def _rank(outputs: Array, part: Part) -> Array:
    """Rank samples by the output itself, the second of two against the first, or the error of a reconstruction."""
    flat = outputs.reshape(len(outputs), -1).astype(np.float64)
    if flat.shape[1] == 1:
        score = flat[:, 0]
    elif flat.shape[1] == 2:
        score = flat[:, 1] - flat[:, 0]
    else:
        score = ((flat - part.x.reshape(flat.shape)) ** 2).mean(axis=1)
    return np.asarray(np.unique(score, return_inverse=True)[1])


def _errors(outputs: Array, part: Part) -> tuple[Array, Array]:
    """Return each sample's mean squared error and the target: `y` where it has the output's size, else the input."""
    target = part.x if part.y is None or part.y[0].size != outputs[0].size else part.y
    flat = target.reshape(len(outputs), -1).astype(np.float64)
    return np.asarray(((outputs.reshape(flat.shape) - flat) ** 2).mean(axis=1)), flat


def _psnr(outputs: Array, part: Part) -> Array:
    """Return each sample's peak signal-to-noise ratio in dB; the peak is the span of all targets of the part."""
    errors, target = _errors(outputs, part)
    peak = float(np.ptp(target)) ** 2 or 1.0
    return np.asarray(-10 * np.log10(np.maximum(errors / peak, LEAST_ERROR)))


def _cosine(outputs: Array, original: Array) -> Array:
    a, b = (side.reshape(len(side), -1).astype(np.float64) for side in (outputs, original))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray(np.clip((a * b).sum(axis=1) / np.maximum(norms, 1e-30), 0, 1))


def _y(part: Part) -> Array:
    if part.y is None:
        raise FormatError(f"the metric needs labels for the samples of {part.source}, the data has none")
    return part.y
