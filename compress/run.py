"""The whole of one compression, from what the user gave to the folder that is written."""

import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compress import (
    TIME_BUDGET_S,
    Goal,
    Progress,
    data,
    folder,
    judge,
    ladder,
    measure,
    metrics,
    model,
    profiles,
    replay,
)
from compress.candidates import replayed, searched
from compress.conclude import TIMING_ROUNDS, Run, files, report
from compress.converters import vela
from compress.converters.environment import ready
from compress.data import Splits
from compress.graph import Array
from compress.judge import Emitted, Original, look, result
from compress.lineage import ground, parents
from compress.meeting import meet, untaught, whole_numbers
from compress.passes.bias import BIAS
from compress.passes.bits import BITS, MOST_BOLDER, MOST_SAFER
from compress.passes.canonicalise import CANONICALISE
from compress.passes.crop import CROP
from compress.passes.equalize import EQUALIZE
from compress.passes.guard import GUARD
from compress.passes.place import PLACE, PLACE_FLOAT
from compress.passes.ranges import RANGES
from compress.passes.shortcut import SHORTCUT
from compress.passes.turn import TURN
from compress.passes.weight_only import WEIGHT_ONLY
from compress.pipeline import Bench, Pass
from compress.recipe import read_recipe
from compress.report import Report
from compress.stage import Stage
from compress.train import training_machine
from compress.work import TRAINED_UP_TO, Work, ending
from compress.writers import Store, Writer, announced
from skills.errors import UsageError
from skills.files import sha256_file, sha256_hex
from skills.profile import Profile
from skills.wire import encode_json

PASSES: tuple[Pass, ...] = (
    CANONICALISE,
    CROP,
    TURN,
    SHORTCUT,
    RANGES,
    EQUALIZE,
    PLACE,
    GUARD,
    BIAS,
    BITS,
    WEIGHT_ONLY,
)
WEIGHTS_ONLY: tuple[Pass, ...] = (
    CANONICALISE,
    CROP,
    RANGES,
    PLACE_FLOAT,
)  # without data no range of an activation is known
CALIBRATED_SHARE = 0.35  # of the time that what needs no training may take where training follows, or
CALIBRATED_S = 60.0  # so long, if that is more: without it there is no result to fall back to


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
    work = Work(out, began, budget, progress or (lambda _stage, _share, _best: None))
    again = None if recipe is None else read_recipe(recipe)
    if again is not None:
        max_drop, goal, seed = again.max_drop, again.goal, again.seed
    profile = again.profile if again is not None and device == "auto" else profiles.find(device)
    if profile.accelerator is not None:  # what is needed at the end and cannot be had is said at once
        ready(vela.VELA, lambda what: work.say(what, 0.0))
    work.say(f"reading the model and the data{announced(profile)}", 0.0)
    samples = None if given is None else data.load(given, metric)
    read = model.load(source, weights, None if samples is None else samples.x)
    original, splits, samples, warnings = meet(read, samples, teacher, seed)
    shown = original.metric
    if shown.needs_labels and splits.select.y is None:
        shown = metrics.unlabelled(original.select, splits.select.x)
    bench = Bench(
        profile, splits, shown, original.calibrate, original.select, max_drop, goal, lambda _share, _best: None, seed=seed,
        planned=again,
    )  # fmt: skip
    learns = splits.train is not None and not samples.synthetic and not whole_numbers(original)
    warnings = (*warnings, *untaught(original, splits, again))
    work.calibrated = min(1.0, max(CALIBRATED_SHARE, CALIBRATED_S / budget)) if learns else 1.0
    most = 2 + MOST_SAFER + MOST_BOLDER + len(ladder.SHARES) * learns
    work.ending = ending(most, len(splits.report), _seconds_an_input(original, splits.select.x))
    if samples.synthetic:
        passes = WEIGHTS_ONLY
    inputs = _inputs(original, profile, recipe)
    all_inputs = parents(samples, model=read.sha256, **inputs)
    taught = "" if teacher is None else sha256_hex(measure.answers(original.teacher, splits.calibrate.x).tobytes())
    judged_by = metrics.identity(original.metric, samples.metric)
    trained_on = training_machine() if learns or (again is not None and again.training) else ""
    steps = [step.name for step in passes]
    about = (all_inputs, taught, profile, max_drop, goal, seed, steps, ground(), judged_by, trained_on)
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
        written, plain = ((replayed(again, known, bench, original, work, stages, writer),),), None
    else:
        written, plain = searched(passes, learns, bench, original, work, stages, writer)
    warnings = (*warnings, *work.left_out)
    work.say("looking at the report part", TRAINED_UP_TO + 0.02)
    # The other parts say what report does where nothing was trained on any of them and all have labels.
    honest = splits.train is None and shown is original.metric and not samples.synthetic
    more = ((splits.calibrate, original.calibrate), (splits.select, original.select)) if honest else ()
    families = [[look(one, splits.report, original, more) for one in family] for family in written]
    judged = [one for family in families for one in family]
    chosen = result(families, max_drop, goal, _milliseconds(judge.finalists(families, max_drop), goal, profile, splits))
    warnings = (*warnings, *judge.doubts(judged, chosen, max_drop, original.metric.unit))
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


def _seconds_an_input(original: Original, x: Array) -> float:
    """Return how long the model that came in takes for one input of a batch."""
    batch = measure.batches(original.session.inputs[0], x)[0]
    began = time.monotonic()
    measure.answers(original.session, batch)
    return (time.monotonic() - began) / len(batch)


def _milliseconds(finalists: Sequence[judge.Judged], goal: Goal, profile: Profile, splits: Splits) -> list[float]:
    """Return how long each finalist takes, where that counts and this machine can tell; else nothing."""
    if goal == "size" or len(finalists) < 2 or profile.arch != platform.machine():
        return []
    runners = {str(at): judge.open_file(one.emitted.file, profile) for at, one in enumerate(finalists)}
    sample = data.whole_runs(runners["0"].inputs[0], splits.report.x)
    return [timing.p50_ms for timing in measure.race(runners, sample, TIMING_ROUNDS).values()]


def _check_arguments(max_drop: float, goal: str, seed: int, budget: float) -> None:
    if not 0 <= max_drop <= 100:
        raise UsageError(f"the budget is {max_drop:g} points, expected 0 to 100")
    if goal not in ("size", "latency", "both"):
        raise UsageError(f"the goal is '{goal}', expected size, latency or both")
    if seed < 0:
        raise UsageError(f"the seed is {seed}, expected 0 or more")
    if not budget > 0:
        raise UsageError(f"the time budget is {budget:g} seconds, expected more than 0")


def _inputs(original: Original, profile: Profile, recipe: Path | None) -> dict[str, str]:
    """Return the hashes of what else went in."""
    given = {"profile": sha256_hex(encode_json(profile))}
    if original.teacher_sha256:
        given["teacher"] = original.teacher_sha256
    if recipe is not None:
        given["recipe"] = sha256_file(Path(recipe))
    return given
