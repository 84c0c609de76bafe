"""Every file that a run offers: searched for, with training where there are inputs to train on, or made again by a recipe."""

import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from compress import ladder, learn, replay
from compress.data import whole_runs
from compress.emit import widths
from compress.graph import Array
from compress.judge import Emitted, Original
from compress.passes.bias import BIAS
from compress.passes.bits import BITS
from compress.passes.canonicalise import canonicalise
from compress.passes.guard import GUARD
from compress.passes.place import PLACE
from compress.passes.ranges import RANGES
from compress.passes.weight_only import WEIGHT_ONLY
from compress.pipeline import CHECK_SAMPLES, Bench, Pass, State, apply, expected
from compress.recipe import Recipe
from compress.stage import Stage
from compress.work import TRAINED_UP_TO, Work
from compress.writers import Writer
from skills.errors import FormatError, SkerryError, StorageError
from skills.units import duration

ROUNDING = (BIAS.name, BITS.name, WEIGHT_ONLY.name)  # from the first of these on, the plain 8-bit form is there
PLACING: tuple[Pass, ...] = (RANGES, PLACE, GUARD)  # again for each network that training made


def searched(
    passes: Sequence[Pass],
    learns: bool,
    bench: Bench,
    original: Original,
    work: Work,
    stages: dict[str, tuple[Stage, ...]],
    writer: Writer,
) -> tuple[tuple[Sequence[Emitted], ...], Emitted | None]:
    """Return two families of candidates, and the plain int8 form if known.

    The first needs no training, the second was trained. How each trained one came about is put into `stages`.
    """
    state, plain = _calibrated(passes, State(_parse(original.stripped)), bench, original, work, learns)
    candidates = writer.family("calibrated", state)
    if writer.second:  # it rounds by itself: what the other schemes plan would be the same file
        plain, state = None, dataclasses.replace(state, safer=(), bolder=())
    ahead = [("plain int8", plain)] if plain is not None else []
    ahead += [(f"safer {at + 1}", dataclasses.replace(state, scheme=one)) for at, one in enumerate(state.safer)]
    candidates[:0] = [writer.write(name, one) for name, one in ahead]
    for one in candidates[:-1]:
        work.offer(one, original, bench.max_drop)
    work.found(candidates[-1], original, bench.max_drop)
    if state.cut_short:
        work.left_out.append(
            "The time ended before the search for stored bits did: with more, the file may become smaller."
        )
    for at, scheme in enumerate(state.bolder):
        candidates.append(writer.write(f"bolder {at + 1}", dataclasses.replace(state, scheme=scheme)))
        work.offer(candidates[-1], original, bench.max_drop)
    trained = _learned(state, bench, original, work, stages, writer) if learns else []
    return (candidates, trained), candidates[0] if plain is not None else None


def _learned(
    state: State, bench: Bench, original: Original, work: Work, stages: dict[str, tuple[Stage, ...]], writer: Writer
) -> list[Emitted]:
    """Return the file of each rung that was climbed."""
    trained: list[Emitted] = []
    begun = False

    def onward() -> bool:
        return ladder.worthwhile(trained[-1].drop_select if trained else None, max(bench.max_drop, 1.0))

    try:
        for reached in _climb(state, bench, original, work, onward=onward):
            begun = True
            name = f"trained {len(reached.stages)}"
            try:
                emitted = _trained(name, reached, state, bench, work, writer)
            except StorageError:
                raise
            except SkerryError as error:  # not to be had on this runtime; the others are
                work.left_out.append(f"'{name}' was left out: {error}.")
                continue
            stages[emitted.name] = reached.stages
            work.found(emitted, original, bench.max_drop, trained=True)
            trained.append(emitted)
    except StorageError:
        raise
    except SkerryError as error:  # such as an operator without torch counterpart: what needs no training is there
        said = f"{'Training ended' if begun else 'Nothing was trained'}: {error}."
        work.left_out.append(said if begun or not original.teacher_sha256 else f"{said} The teacher was not used.")
    else:
        if not begun:
            work.left_out.append(_not_begun(len(bench.splits.train or ()), work, original))
    return trained


def replayed(
    recipe: Recipe,
    known: Sequence[Pass],
    bench: Bench,
    original: Original,
    work: Work,
    stages: dict[str, tuple[Stage, ...]],
    writer: Writer,
) -> Emitted:
    """Return what a recipe says, made again without a search.

    Raises:
        FormatError: the recipe is for another model, or trains and there is no training data.
    """
    if recipe.training and bench.splits.train is None:
        raise FormatError("the recipe trains the model, and the data has no x_train to train it on")
    bench = dataclasses.replace(bench, say=lambda share, _best: work.say("following the recipe", 0.3 * share))
    steps = replay.before_training(recipe, known)
    first = [step for step in steps if step in _rewriting(known)]
    state = apply(first, State(_parse(original.stripped)), lambda _step: bench, _checked(original))
    replay.check(recipe, state.model)
    state = apply([step for step in steps if step not in first], state, lambda _step: bench, _checked(original))
    work.before_placing = state.notes
    if not recipe.training:
        return writer.write("calibrated", state)
    *_, last = _climb(state, bench, original, work, replay.stages(recipe))
    emitted = _trained(f"trained {len(last.stages)}", last, state, bench, work, writer)
    stages[emitted.name] = last.stages
    return emitted


def _rewriting(passes: Sequence[Pass]) -> list[Pass]:
    """Return the passes that make the graph whose layers and channels are numbered and named."""
    return list(itertools.takewhile(lambda step: step.name != RANGES.name, passes))


def _checked(original: Original) -> Array:
    """Return what the original answered to the first calibration inputs, which a rewritten graph must answer too."""
    return whole_runs(original.session.inputs[0], original.calibrate, CHECK_SAMPLES)


def _calibrated(
    passes: Sequence[Pass], state: State, bench: Bench, original: Original, work: Work, learns: bool
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

    rounding = next((at for at, step in enumerate(passes) if step.name in ROUNDING), len(passes))
    first, rest = passes[:rounding], passes[rounding:]
    reference = _checked(original)

    def after(steps: Sequence[Pass], state: State) -> State:
        for step in steps:
            make = functools.partial(apply, [step], state, at, reference)
            if step.name == PLACE.name:
                work.before_placing = state.notes
            state = work.passed(step.name, bench.profile, make)
        return state

    plain = after(first, state)
    if not rest or plain.scheme is None or not plain.scheme.layers:
        return plain, None
    return after(rest, plain), plain


def _climb(
    state: State,
    bench: Bench,
    original: Original,
    work: Work,
    planned: Sequence[Stage] | None = None,
    onward: Callable[[], bool] = lambda: True,
) -> Iterator[learn.Reached]:
    """Train one network after the other."""
    train = bench.splits.train
    if train is None:
        return
    labels = train.y if original.metric.name in ("top1", "macro_f1") and train.y is not None else None

    def say(stage: str, _share: float) -> None:
        left = "" if planned else f", {duration(work.left())} left"  # a recipe says the steps, whatever they take
        work.say(f"training{left}: {stage}", min(TRAINED_UP_TO, 0.3 + 0.6 * work.spent()))

    lesson = learn.Lesson(
        bench.splits.calibrate, train, original.session, original.teacher, labels, bench.goal,
        widths(state.model, bench.profile), bench.seed, len(os.sched_getaffinity(0)), work.left, work.get, work.put, say,
        bench.profile.channel_multiple, bench.profile.channel_block, original.metric.classes, onward,
    )  # fmt: skip
    with expected("training"):
        yield from learn.climb(state.model, lesson, planned)


def _trained(name: str, reached: learn.Reached, before: State, bench: Bench, work: Work, writer: Writer) -> Emitted:
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


def _not_begun(inputs: int, work: Work, original: Original) -> str:
    """Return why not even one rung was climbed."""
    if inputs < ladder.batch(inputs):
        return f"Nothing was trained: {inputs} inputs are left for training, one step takes {ladder.batch(inputs)}."
    gone = duration(time.monotonic() - work.began)
    teacher = ", and the teacher was not used" if original.teacher_sha256 else ""
    return (
        f"The time ended before training began: {gone} of {duration(work.budget)} had gone by, "
        f"{duration(work.ending)} are kept for judging and timing, and the rest was too short. Nothing was trained{teacher}."
    )


def _parse(stripped: bytes) -> Any:
    import onnx

    return onnx.load_model_from_string(stripped)
