"""The whole of one compression, from what the user gave to the folder that is written."""

import dataclasses
import functools
import itertools
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress import (
    TIME_BUDGET_S,
    Goal,
    Progress,
    data,
    folder,
    graph,
    judge,
    kept,
    ladder,
    learn,
    measure,
    metrics,
    model,
    profiles,
    replay,
    words,
)
from compress.conclude import TIMING_ROUNDS, Run, files, report
from compress.converters import vela
from compress.converters.environment import ready
from compress.data import Data, Splits
from compress.emit import widths
from compress.judge import Emitted, Original, look, result
from compress.lineage import ground, parents
from compress.measure import Runner
from compress.passes.bias import BIAS
from compress.passes.bits import BITS
from compress.passes.canonicalise import CANONICALISE, canonicalise
from compress.passes.equalize import EQUALIZE
from compress.passes.guard import GUARD
from compress.passes.place import PLACE, PLACE_FLOAT
from compress.passes.ranges import RANGES
from compress.passes.strip import strip
from compress.passes.weight_only import WEIGHT_ONLY
from compress.pipeline import CHECK_SAMPLES, Bench, Pass, State, apply
from compress.recipe import Recipe, read_recipe
from compress.report import Moment, Report
from compress.splits import split
from compress.stage import Stage
from compress.writers import Store, Writer
from skills import ort
from skills.errors import FormatError, SkerryError, UsageError
from skills.files import sha256_file, sha256_hex
from skills.profile import Profile
from skills.units import duration
from skills.wire import encode_json

PASSES: tuple[Pass, ...] = (CANONICALISE, RANGES, EQUALIZE, PLACE, GUARD, BIAS, BITS, WEIGHT_ONLY)
WEIGHTS_ONLY: tuple[Pass, ...] = (CANONICALISE, RANGES, PLACE_FLOAT)  # without data no range of an activation is known
PLACING: tuple[Pass, ...] = (RANGES, PLACE, GUARD)  # again for each network that training made
CALIBRATED_SHARE = 0.35  # of the time that what needs no training may take where training follows, or
CALIBRATED_S = 60.0  # so long, if that is more: without it there is no result to fall back to
ENDING_S = 15.0  # kept for the last measurements
NOTED_EVERY_S = 10.0  # how often the time spent is written down, for a run that is resumed
CHANCE_ERRORS = 3  # a metric within so many standard errors of guessing is called chance
TRAINED_UP_TO = 0.9  # of the progress bar


def run(
    source: object,
    given: object,
    out: Path,
    device: str = "auto",
    max_drop: float = 1.0,
    goal: Goal = "both",
    seed: int = 0,
    progress: Progress | None = None,
    weights: Path | None = None,
    *,
    time_budget: float | None = None,
    teacher: object | None = None,
    recipe: Path | None = None,
    resume: bool = False,
    metric: str | Callable[..., Any] | None = None,
    passes: Sequence[Pass] = PASSES,
) -> Report:
    """Compress; see `compress.compress` for the contract. `passes` is there to put further ones in."""
    began = time.monotonic()
    budget = TIME_BUDGET_S if time_budget is None else time_budget
    out = Path(out)
    _check_arguments(max_drop, goal, seed, budget)
    folder.check_out(out)
    work = _Work(out, began, budget, progress or (lambda _stage, _share, _best: None))
    again = None if recipe is None else read_recipe(recipe)
    if again is not None:
        max_drop, goal, seed = again.max_drop, again.goal, again.seed
    profile = again.profile if again is not None and device == "auto" else profiles.find(device)
    if profile.accelerator is not None:  # what is needed at the end and cannot be had is said at once
        ready(vela.VELA, lambda what: work.say(what, 0.0))
    work.say("reading the model and the data", 0.0)
    samples = None if given is None else data.load(given, metric)
    read = model.load(source, weights, None if samples is None else samples.x)
    original, splits, samples, warnings = _meet(read, samples, teacher, seed)
    shown = original.metric
    if shown.needs_labels and splits.select.y is None:
        shown = metrics.unlabelled(original.select, splits.select.x)
    bench = Bench(
        profile, splits, shown, original.calibrate, original.select, max_drop, goal, lambda _share, _best: None, seed=seed,
        planned=again,
    )  # fmt: skip
    learns = splits.train is not None and not samples.synthetic and not _whole_numbers(original)
    warnings = (*warnings, *_untaught(original, splits, again))
    work.calibrated = min(1.0, max(CALIBRATED_SHARE, CALIBRATED_S / budget)) if learns else 1.0
    if samples.synthetic:
        passes = WEIGHTS_ONLY
    inputs = _inputs(original, profile, recipe)
    all_inputs = parents(samples, model=read.sha256, **inputs)
    taught = "" if teacher is None else sha256_hex(measure.answers(original.teacher, splits.calibrate.x).tobytes())
    judged_by = metrics.identity(original.metric, samples.metric)
    about = (all_inputs, taught, profile, max_drop, goal, seed, [step.name for step in passes], ground(), judged_by)
    work.open(sha256_hex(repr(about).encode()), resume)

    writer = Writer(
        bench,
        original,
        lambda what: work.say(what, work.shown),
        Store(work.get, work.put),
        ranged=not samples.synthetic,
    )
    stages: dict[str, tuple[Stage, ...]] = {}
    written: tuple[Sequence[Emitted], ...]
    if again is not None:
        warnings = (*warnings, *replay.differences(again, all_inputs))
        known = (*passes, *PASSES, *WEIGHTS_ONLY)
        written, plain = ((_replayed(again, known, bench, original, work, stages, writer),),), None
    else:
        written, plain = _searched(passes, learns, bench, original, work, stages, writer)
    warnings = (*warnings, *work.left_out)
    work.say("looking at the report part", TRAINED_UP_TO + 0.02)
    families = [[look(one, splits.report, original) for one in family] for family in written]
    judged = [one for family in families for one in family]
    chosen = result(families, max_drop, goal, _milliseconds(judge.finalists(families, max_drop), goal, profile, splits))
    compiled = None
    if profile.accelerator is not None:
        compiled = vela.compile_for(profile, chosen.emitted.file, lambda what: work.say(what, TRAINED_UP_TO + 0.03))
        warnings = (*warnings, *vela.over_budget(compiled.estimate, profile))
    else:
        warnings = (*warnings, *profiles.too_large(len(chosen.emitted.file), profile))
    work.say("timing it against the original", TRAINED_UP_TO + 0.05)
    found = Run(
        original, samples, splits, profile, max_drop, goal, seed, budget, warnings,
        stages, tuple(work.trail), inputs, work.began, compiled,
    )  # fmt: skip
    done = report(found, judge.walked(families, chosen), judged, plain)
    folder.write_folder(out, files(found, done, chosen, judged))
    work.close()
    work.say("done", 1.0)
    return done


def _milliseconds(finalists: Sequence[judge.Judged], goal: Goal, profile: Profile, splits: Splits) -> list[float]:
    """Return how long each finalist takes, where that counts and this machine can tell; else nothing."""
    if goal == "size" or len(finalists) < 2 or profile.arch != platform.machine():
        return []
    runners = {str(at): one.emitted.runner for at, one in enumerate(finalists)}
    sample = splits.report.x[: max(1, finalists[0].emitted.runner.inputs[0].shape[0])]
    return [timing.p50_ms for timing in measure.race(runners, sample, TIMING_ROUNDS).values()]


def _searched(
    passes: Sequence[Pass],
    learns: bool,
    bench: Bench,
    original: Original,
    work: "_Work",
    stages: dict[str, tuple[Stage, ...]],
    writer: Writer,
) -> tuple[tuple[Sequence[Emitted], ...], Emitted | None]:
    """Return two families of candidates, what needs no training and what was trained, and the plain int8 form if known.

    How each trained one came about is put into `stages`.
    """
    state, plain = _calibrated(passes, State(_parse(original.stripped)), bench, original, work, learns)
    candidates = writer.family("calibrated", state)
    if writer.second:  # it rounds by itself: what the other schemes plan would be the same file
        plain, state = None, dataclasses.replace(state, bolder=())
    if plain is not None:
        candidates.insert(0, writer.write("plain int8", plain))
    work.found(candidates[-1], original)
    if state.cut_short:
        work.left_out.append(
            "The time ended before the search for stored bits did: with more, the file may become smaller."
        )
    for at, scheme in enumerate(state.bolder):
        candidates.append(writer.write(f"bolder {at + 1}", dataclasses.replace(state, scheme=scheme)))
    trained: list[Emitted] = []
    if learns:
        begun = False
        lost: list[float] = []  # on select, by each training of the present rung

        def onward() -> ladder.Onward:
            step = ladder.onward(lost, max(bench.max_drop, 1.0))
            if step == "smaller":
                lost.clear()
            return step

        for reached in _climb(state, bench, original, work, onward=onward):
            begun = True
            name = f"trained {len(reached.stages)}"
            try:
                emitted = _trained(name, reached, state, bench, work, writer)
            except SkerryError as error:  # not to be had on this runtime; the others are
                work.left_out.append(f"'{name}' was left out: {error}.")
                continue
            stages[emitted.name] = reached.stages
            work.found(emitted, original)
            if lost and trained:  # the same rung trained again: the better of the two is enough
                emitted = min(emitted, trained.pop(), key=lambda one: one.drop_select)
            trained.append(emitted)
            lost.append(emitted.drop_select)
        if not begun:
            work.left_out.append(_not_begun(len(bench.splits.train or ()), work, original))
    return (candidates, trained), candidates[0] if plain is not None else None


def _replayed(
    recipe: Recipe,
    known: Sequence[Pass],
    bench: Bench,
    original: Original,
    work: "_Work",
    stages: dict[str, tuple[Stage, ...]],
    writer: Writer,
) -> Emitted:
    """Return what a recipe says, made again without a search.

    Raises:
        FormatError: the recipe is for another model, or trains and there is no training data.
    """
    model = _parse(original.stripped)
    replay.check(recipe, canonicalise(model), [step.name for step in known])
    if recipe.training and bench.splits.train is None:
        raise FormatError("the recipe trains the model, and the data has no x_train to train it on")
    bench = dataclasses.replace(bench, say=lambda share, _best: work.say("following the recipe", 0.3 * share))
    steps = replay.before_training(recipe, known)
    state = apply(steps, State(model), lambda _step: bench, original.calibrate[:CHECK_SAMPLES])
    work.before_placing = state.notes
    if not recipe.training:
        return writer.write("calibrated", state)
    *_, last = _climb(state, bench, original, work, replay.stages(recipe))
    emitted = _trained(f"trained {len(last.stages)}", last, state, bench, work, writer)
    stages[emitted.name] = last.stages
    return emitted


class _Work:
    """Where a run stands: its time, its progress bar, what it keeps beside OUT, and the best so far."""

    def __init__(self, out: Path, began: float, budget: float, progress: Progress) -> None:
        self.out, self.began, self.budget, self.progress = out, began, budget, progress
        self.cache: folder.Cache | None = None
        self.about = ""
        self.noted = began
        self.calibrated = 1.0
        self.trail: list[Moment] = []
        self.left_out: list[str] = []
        # Notes of the passes before `place`: they hold for what is trained too, later ones are of another network.
        self.before_placing: tuple[str, ...] = ()
        self.best = ""
        self.shown = 0.0

    def open(self, about: str, resume: bool) -> None:
        """Begin to keep things beside OUT, or go on with what an interrupted run kept there under the same `about`.

        That is a hash of all that the result depends on. The time that the interrupted run took counts too.
        """
        if not resume:
            folder.forget(self.out)
        self.cache, self.about = folder.Cache(folder.workdir(self.out) / "cache"), about
        self.began -= float(self.get("seconds") or 0)

    def close(self) -> None:
        """Forget everything: the result is there."""
        self.cache = None
        folder.forget(self.out)

    def get(self, key: str) -> bytes | None:
        return self.cache.get(self.about + key) if self.cache is not None else None

    def put(self, key: str, value: bytes) -> None:
        if self.cache is not None:
            self.cache.put(self.about + key, value)
            self.note()

    def note(self) -> None:
        """Write down how much time is spent."""
        self.noted = time.monotonic()
        if self.cache is not None:
            self.cache.put(self.about + "seconds", str(self.noted - self.began).encode())

    def passed(self, at: int, profile: Profile, make: Callable[[], State]) -> State:
        """Return what pass number `at` made of the model: as kept, or made now and kept."""
        raw = self.get(f"pass-{at}")
        if raw is not None:
            return kept.unpack(raw, profile)
        state = make()
        self.put(f"pass-{at}", kept.pack(state))
        return state

    def say(self, stage: str, share: float) -> None:
        self.shown = max(self.shown, share)
        if time.monotonic() - self.noted > NOTED_EVERY_S:
            self.note()
        self.progress(stage, self.shown, self.best)

    def left(self, share: float = 1.0) -> float:
        return max(0.0, share * (self.budget - ENDING_S) - (time.monotonic() - self.began))

    def spent(self) -> float:
        """Return how far the run is by the clock, 0..1."""
        return min(1.0, (time.monotonic() - self.began) / self.budget)

    def found(self, emitted: Emitted, original: Original) -> None:
        """Keep a candidate on the disk as the best so far and say so."""
        ratio = original.size / len(emitted.file)
        minutes = (time.monotonic() - self.began) / 60
        self.trail.append(Moment(round(minutes, 2), round(ratio, 3), round(emitted.drop_select, 4), emitted.name))
        self.best = f"{ratio:.1f}x smaller, {emitted.drop_select:+.2f} points on select"
        kind = "tflite" if emitted.audit is None else "onnx"
        folder.write_folder(
            folder.best_folder(self.out), {f"model.{kind}": emitted.file, "best.txt": self.best.encode()}
        )


def _check_arguments(max_drop: float, goal: str, seed: int, budget: float) -> None:
    if not 0 <= max_drop <= 100:
        raise UsageError(f"the budget is {max_drop:g} points, expected 0 to 100")
    if goal not in ("size", "latency", "both"):
        raise UsageError(f"the goal is '{goal}', expected size, latency or both")
    if seed < 0:
        raise UsageError(f"the seed is {seed}, expected 0 or more")
    if not budget > 0:
        raise UsageError(f"the time budget is {budget:g} seconds, expected more than 0")


def _parse(stripped: bytes) -> Any:
    import onnx

    return onnx.load_model_from_string(stripped)


def _calibrated(
    passes: Sequence[Pass], state: State, bench: Bench, original: Original, work: _Work, learns: bool
) -> tuple[State, State | None]:
    """Do all that needs no training; return where it ended, and the plain 8-bit form if it went on from one."""
    upto = 0.3 if learns else TRAINED_UP_TO

    def at(step: Pass) -> Bench:
        place = list(passes).index(step)
        return dataclasses.replace(
            bench,
            say=lambda share, best: work.say(
                f"{step.title}{': ' + best if best else ''}", upto * (place + share) / len(passes)
            ),
            left=lambda: work.left(work.calibrated),
        )

    first = [step for step in passes if step.name not in ("bias", "bits", "weight-only")]
    rest = [step for step in passes if step not in first]
    reference = original.calibrate[:CHECK_SAMPLES]

    def after(steps: Sequence[Pass], state: State) -> State:
        for step in steps:
            make = functools.partial(apply, [step], state, at, reference)
            if step.name == PLACE.name:
                work.before_placing = state.notes
            state = work.passed(list(passes).index(step), bench.profile, make)
        return state

    plain = after(first, state)
    if not rest or plain.scheme is None or not plain.scheme.layers:
        return plain, None
    return after(rest, plain), plain


def _climb(
    state: State,
    bench: Bench,
    original: Original,
    work: _Work,
    planned: Sequence[Stage] | None = None,
    onward: Callable[[], ladder.Onward] = lambda: "smaller",
) -> Iterable[learn.Reached]:
    """Train one network after the other."""
    train = bench.splits.train
    if train is None:
        return ()
    labels = train.y if original.metric.name in ("top1", "macro_f1") and train.y is not None else None

    def say(stage: str, _share: float) -> None:
        work.say(f"training: {stage}", min(TRAINED_UP_TO, 0.3 + 0.6 * work.spent()))

    lesson = learn.Lesson(
        bench.splits.calibrate, train, original.session, original.teacher, labels, bench.goal,  # type: ignore[arg-type]
        widths(state.model, bench.profile), bench.seed, len(os.sched_getaffinity(0)), work.left, work.get, work.put, say,
        bench.profile.channel_multiple, bench.profile.channel_block, onward,
    )  # fmt: skip
    return learn.climb(state.model, lesson, planned)


def _trained(name: str, reached: learn.Reached, before: State, bench: Bench, work: _Work, writer: Writer) -> Emitted:
    """Place a trained network on its runtime and write it with the codes that it was trained to."""
    passes = (*itertools.takewhile(lambda name: name != PLACE.name, before.passes), replay.TRAIN)
    model = canonicalise(reached.trained.model)  # where a branch was removed, two activations follow each other
    state = apply(
        PLACING, State(model, notes=work.before_placing, harm=reached.harm, passes=passes), lambda _step: bench
    )
    scheme = state.planned()
    known = {layer.node for layer in scheme.layers}
    scheme = scheme.with_bits({node: width for node, width in reached.bits.items() if node in known})
    scheme = scheme.with_codes({node: codes for node, codes in reached.trained.codes.items() if node in known})
    work.say("measuring what was trained", work.shown)
    stage = reached.stages[-1]
    note = (
        f"Trained {len(reached.stages)} times, the last for {stage.settings.steps} steps of {stage.settings.batch} inputs; "
        f"{len(stage.shrink.without)} residual branches and channels of {len(stage.shrink.keep)} groups were removed."
    )
    if reached.bits:
        how = (
            "is that of the smaller network before it was trained"
            if reached.harm
            else "was not measured: a recipe says the widths"
        )
        note += f" The sensitivity of its layers {how}."
    state = dataclasses.replace(state, scheme=scheme, notes=(*state.notes, note))
    return writer.write(name, state)


def _meet(
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
    few = splits.calibrate.x[: max(1, session.inputs[0].shape[0])]
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


# The pass CANONICALISE never looks at its bench.
_NO_BENCH: Any = None


def _whole_numbers(original: Original) -> bool:
    """Return whether the model cannot be trained by what it answers: its first output is no float."""
    return original.calibrate.dtype.kind != "f"


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
    return tuple(found)


def _untaught(original: Original, splits: Splits, again: Recipe | None) -> tuple[str, ...]:
    """Return why what was given to train with is not used, where that is known from the start."""
    teacher = bool(original.teacher_sha256)
    if again is not None and not again.training:
        return ("The teacher was not used: the recipe trains nothing.",) if teacher else ()
    if splits.train is None:
        return ("The teacher was not used: without training inputs (x_train) nothing is trained.",) if teacher else ()
    if again is None and _whole_numbers(original):
        said = "Nothing was trained: the model answers in whole numbers, from which training cannot learn."
        return (f"{said} The teacher was not used." if teacher else said,)
    return ()


def _not_begun(inputs: int, work: _Work, original: Original) -> str:
    """Return why not even one rung was climbed."""
    if inputs < ladder.batch(inputs):
        return f"Nothing was trained: {inputs} inputs are left for training, one step takes {ladder.batch(inputs)}."
    gone = duration(time.monotonic() - work.began)
    teacher = ", and the teacher was not used" if original.teacher_sha256 else ""
    return (
        f"The time ended before training began: {gone} of {duration(work.budget)} had gone by, "
        f"{duration(ENDING_S)} are kept for judging and timing, and the rest was too short. Nothing was trained{teacher}."
    )


def _inputs(original: Original, profile: Profile, recipe: Path | None) -> dict[str, str]:
    """Return the hashes of what else went in."""
    given = {"profile": sha256_hex(encode_json(profile))}
    if original.teacher_sha256:
        given["teacher"] = original.teacher_sha256
    if recipe is not None:
        given["recipe"] = sha256_file(Path(recipe))
    return given
