"""Model, data and teacher held against each other, before anything is searched."""

from typing import Any

import numpy as np

from compress import data, graph, measure, metrics, model, words
from compress.data import Data, Splits
from compress.judge import Original
from compress.measure import Runner
from compress.passes.canonicalise import CANONICALISE
from compress.passes.strip import strip
from compress.pipeline import State
from compress.recipe import Recipe
from compress.splits import split
from skills import ort
from skills.errors import FormatError, SkerryError

CHANCE_ERRORS = 3  # a metric within so many standard errors of guessing is called chance
LEAST_CLASSES = 0.5  # of the report part's; with fewer on select, what is lost there says little
_NO_BENCH: Any = None  # the pass CANONICALISE never looks at its bench


def meet(
    source: model.Source, given: Data | None, teacher: object | None, seed: int
) -> tuple[Original, Splits, Data, tuple[str, ...]]:
    """Hold model and data against each other and let the original answer every part."""
    stripped_model = strip(source.model)
    stripped = stripped_model.SerializeToString()
    runnable = stripped
    if graph.opset(stripped_model) > ort.MAX_OPSET or stripped_model.ir_version > ort.MAX_IR:
        runnable = CANONICALISE.run(State(stripped_model), _NO_BENCH).model.SerializeToString()
    session = ort.session(runnable)
    samples = data.synthetic(session.inputs[0], seed) if given is None else given
    data.check_fit(samples, session.inputs[0])
    splits = split(samples, seed)
    few = data.whole_runs(session.inputs[0], splits.calibrate.x)
    first = measure.answers(session, few)
    metric = metrics.choose(samples, first, few)
    calibrate, select, end = (
        measure.answers(session, part.x) for part in (splits.calibrate, splits.select, splits.report)
    )
    if not all(np.isfinite(part).all() for part in (calibrate, select, end)):
        raise SkerryError(f"{source.name} answers NaN or infinity on this data: is it preprocessed as in training?")
    original = Original(
        source, runnable, session, metric, calibrate, select, end, *_teacher(teacher, session, few, first)
    )
    return original, splits, samples, _warnings(original, splits, samples)


def untaught(original: Original, splits: Splits, again: Recipe | None) -> tuple[str, ...]:
    """Return why what was given to train with is not used, where that is known from the start."""
    teacher = bool(original.teacher_sha256)
    if again is not None and not again.training:
        return ("The teacher was not used: the recipe trains nothing.",) if teacher else ()
    if splits.train is None:
        return ("The teacher was not used: without training inputs (x_train) nothing is trained.",) if teacher else ()
    if again is None and whole_numbers(original):
        said = "Nothing was trained: the model answers in whole numbers, from which training cannot learn."
        return (f"{said} The teacher was not used." if teacher else said,)
    return ()


def few_classes(metric: str, splits: Splits) -> tuple[str, ...]:
    """Return a sentence where the select part has too few classes to tell what a candidate loses on the report part. Pure."""
    select, end = splits.select, splits.report
    if metric not in ("top1", "macro_f1") or select.y is None or end.y is None:
        return ()
    wanted = np.unique(end.y)
    held = np.intersect1d(wanted, select.y)
    if len(held) >= LEAST_CLASSES * len(wanted):
        return ()
    advice = (
        "shuffle the file before x_train is cut out of it, or give an x_train of all classes"
        if select.source == "x_train"
        else "give more samples of each class"
    )
    held_of = f"holds {len(held)} of the {len(wanted)} classes that the report part holds"
    return (f"The select part, which says when to stop, {held_of}: {advice}.",)


def whole_numbers(original: Original) -> bool:
    """Return whether the model cannot be trained by what it answers: its first output is no float."""
    return original.calibrate.dtype.kind != "f"


def _teacher(teacher: object | None, session: ort.Session, few: np.ndarray[Any, Any], first: Any) -> tuple[Runner, str]:
    """Return who is learned from: the original, or the model given for that with the hash of what was given.

    Raises:
        FormatError: the teacher's input or output is not the model's.
    """
    if teacher is None:
        return session, ""
    read = model.load(teacher, None, few)
    other = ort.session(strip(read.model).SerializeToString())
    takes, wants = other.inputs[0], session.inputs[0]
    if takes.dtype != wants.dtype or takes.shape[1:] != wants.shape[1:]:
        raise FormatError(
            f"the teacher {read.name} takes {takes.dtype} {list(takes.shape[1:])}, "
            f"the model {wants.dtype} {list(wants.shape[1:])}"
        )
    answer = measure.answers(other, few)
    if answer.shape != first.shape:
        raise FormatError(
            f"the teacher {read.name} answers {list(answer.shape[1:])}, the model {list(first.shape[1:])}"
        )
    return other, read.sha256


def _warnings(original: Original, splits: Splits, samples: Data) -> tuple[str, ...]:
    if samples.synthetic:
        return ()  # the verdict itself says it
    found = []
    # A user's own metric that fails does so here, before anything is searched.
    right = original.metric.of(original.report, splits.report, original.report)
    guess = metrics.guessing(original.metric.name, original.report, splits.report)
    if guess is not None and right <= guess[0] + CHANCE_ERRORS * guess[1]:
        found.append(
            f"The {words.METRICS[original.metric.name]} of the model that came in: {right:.1%} in {len(splits.report)} cases, "
            f"guessing gives {guess[0]:.1%}: is the data preprocessed as in training, and are the labels in the model's order?"
        )
    elif original.metric.name in ("agreement", "cosine"):
        what = "The metric" if splits.report.y is not None else "The data has no labels: the metric"
        found.append(f"{what} is {original.metric.name} with the original, not accuracy.")
    return (*found, *few_classes(original.metric.name, splits))
