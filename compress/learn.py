"""Climb the ladder: shrink, choose widths, train, and hand on what came out, one rung after the other."""

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from compress import Goal, graph, ladder
from compress.beside import held_batches
from compress.channels import Shrink, survivors
from compress.compensate import MADE_UP_ON, Stay, compensated
from compress.data import Part, whole_runs
from compress.graph import Array
from compress.ladder import Rung
from compress.measure import Runner, answers, divergence
from compress.passes.place import find_layers
from compress.recipe import RecipeTraining
from compress.scheme import HEAVY, Layer
from compress.shrinking import SAMPLES, choose
from compress.shrinking import lift as put_back
from compress.stage import Stage, read, write
from compress.student import Student, spreads
from compress.to_torch import Twin
from compress.train import Checkpoint, Settings, Trained, fit, half_precision, training_device
from compress.views import Views, movable, moved
from compress.weights import encode
from skills.errors import DeadlineExceeded
from skills.wire import decode_json, encode_json

VIEWS = 4
ASKED = 64  # inputs that tell how long the teacher takes for all
UNTIMED_STEPS = 2
TIMED_STEPS = 4
LEAST_WEIGHTS = 256  # a layer with fewer stays in 8 bits: narrower ones would save nothing


Harm = Mapping[str, Mapping[float, float]]  # layer -> width -> how far it alone moves the answers


@dataclasses.dataclass(frozen=True, slots=True)
class Reached:
    """A rung that was climbed: the smaller network with its trained weights and codes, and all stages up to here.

    `harm` says of each layer what the widths that were tried alone cost before it was trained; empty where a recipe said
    them.
    """

    trained: Trained
    bits: Mapping[str, float]
    stages: tuple[Stage, ...]
    harm: Harm = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Lesson:
    """What training may use. `get` and `put` read and write the resume store; `teacher` answers as the output should."""

    calibrate: Part
    train: Part
    original: Runner
    teacher: Runner
    labels: Array | None
    goal: Goal
    widths: tuple[float, ...]
    seed: int
    threads: int
    left: Callable[[], float]
    get: Callable[[str], bytes | None]
    put: Callable[[str, bytes], None]
    say: Callable[[str, float], None]
    multiple: int = 0  # of channels, as `shrinking.choose` takes it; and `block`
    block: int = 1
    classes: bool = True  # the outputs are class scores
    onward: Callable[[], bool] = lambda: True  # whether to train a smaller one, asked once the last was judged

    def kept(self, key: str, make: Callable[[], bytes]) -> bytes:
        """Return what is kept under a key, or make and keep it."""
        found = self.get(key)
        if found is None:
            found = make()
            self.put(key, found)
        return found

    def plan(self, at: int) -> Stage | None:
        """Return what an interrupted run had planned for rung number `at`."""
        raw = self.get(f"plan-{at}")
        return None if raw is None else read(decode_json(RecipeTraining, raw, "the plan that was kept"))

    def harm(self, at: int) -> Harm:
        """Return what each layer's widths cost when that plan was made."""
        return {node: dict(row) for node, row in json.loads(self.get(f"harm-{at}") or b"{}").items()}


def climb(model: Any, lesson: Lesson, planned: Sequence[Stage] | None = None) -> Iterator[Reached]:
    """Yield what each stage comes to, until the time is spent or, with `planned`, those stages are done again.

    `model` is the canonicalised float graph. Each stage trains a smaller network, as long as `lesson.onward`
    says so, and starts from the weights of the one before.
    """
    model = graph.with_biases(model)
    full, done = model, Shrink()
    stages: tuple[Stage, ...] = ()
    x = lesson.calibrate.x  # moved: what the original answers to inputs that it was trained on says little
    x = moved(x, np.arange(len(x)), 1, lesson.seed) if movable(x) else x
    few = whole_runs(lesson.original.inputs[0], x, SAMPLES)
    wanted = answers(lesson.original, few)
    views = Views(lesson.train.x, lesson.teacher, planned[0].views if planned else VIEWS, lesson.seed, lesson.kept,
                  classes=lesson.classes)  # fmt: skip
    usual = ladder.rungs(lesson.goal, lesson.widths)
    for at in range(len(planned) if planned is not None else len(ladder.SHARES)):
        if at and planned is None and not lesson.onward():
            return
        known = planned[at] if planned is not None else lesson.plan(at)
        shrink = known.shrink if known is not None else _less(full, done, few, wanted, usual[at], lesson)
        if shrink is None:
            return
        small = shrink.apply(full)
        if shrink != done:
            lesson.say("making up for what was removed", 0.0)
            several = whole_runs(lesson.original.inputs[0], x, MADE_UP_ON)
            small = compensated(done.apply(full), small, _stay(model, done, shrink), several)
        weighed = _widths(small, lesson, usual[at], few, wanted) if known is None else (known.bits, lesson.harm(at))
        if weighed is None:
            return
        bits, harm = weighed
        student = _student(small, bits, x)
        if known is not None:
            settings = known.settings
        else:
            settings = _settings(student, views, lesson, at)
            if settings.steps == 0:
                return  # `ladder.batch` of inputs are too few for one step, or the time is too short
        plan = encode_json(write(at, Stage(shrink, bits, settings, views.count)))
        if known is None:
            lesson.put(f"harm-{at}", json.dumps({node: list(row.items()) for node, row in harm.items()}).encode())
            lesson.put(f"plan-{at}", plan)
        key = f"rung-{at}-{hashlib.sha256(plan).hexdigest()[:24]}"
        for view in range(min(views.count, 1 + settings.steps // max(1, len(views.x) // settings.batch))):
            views.answers(view, lambda share: lesson.say("asking the teacher", share))
        trained = fit(
            student, views, lesson.labels, settings, lambda share: lesson.say("training", share),
            Checkpoint(functools.partial(lesson.get, key), functools.partial(lesson.put, key)),
            lesson.left if planned is None else lambda: math.inf,
        )  # fmt: skip
        if trained.steps < settings.ends():
            settings = dataclasses.replace(settings, stop=trained.steps)
        full, done = put_back(full, shrink, trained.model), shrink
        stages = (*stages, Stage(shrink, bits, settings, views.count, trained.seconds))
        yield Reached(trained, bits, stages, harm)


def _less(full: Any, done: Shrink, x: Array, wanted: Array, rung: Rung, lesson: Lesson) -> Shrink | None:
    """Return what is removed on a rung, `done` and more; None where the time has ended."""
    if lesson.left() <= 0:
        return None
    lesson.say("choosing what to remove", 0.0)
    # Fewer bits save bytes at less harm than fewer channels do: these go for time, unless bytes are all that counts.
    return choose(
        full, done, x, wanted, rung.kept, "size" if lesson.goal == "size" else "latency",
        lambda share: lesson.say("choosing what to remove", share), lesson.multiple, lesson.block,
        left=lesson.left, classes=lesson.classes,
    )  # fmt: skip


def _student(small: Any, bits: Mapping[str, float], x: Array) -> Student:
    layers = [dataclasses.replace(layer, bits=bits[layer.node]) for layer in heavy(small) if layer.node in bits]
    return Student(small, layers, spreads(small, x))


def heavy(model: Any) -> list[Layer]:
    """Return the layers whose weights are trained to codes: not tables and recurrent ones."""
    return [layer for layer in find_layers(model) if layer.op in HEAVY]


def sensitivity(
    model: Any, layers: Sequence[Layer], widths: Sequence[float], x: Array, original: Array, lesson: Lesson
) -> dict[str, dict[float, float]]:
    """Return how far each layer alone, rounded to each width, moves the answers from the original's, on as many inputs as memory
    holds.

    Raises:
        DeadlineExceeded: the lesson's time ended before every layer was weighed.
    """
    twin = Twin(model).eval()
    values = graph.arrays(model)
    parts = [torch.from_numpy(np.ascontiguousarray(part)) for part in held_batches(model, x)]
    original = original[: sum(map(len, parts))]
    found: dict[str, dict[float, float]] = {}

    def apart() -> float:
        return divergence(original, np.concatenate([twin(part).numpy() for part in parts]), classes=lesson.classes)

    with torch.no_grad():
        plain = apart()
        for at, layer in enumerate(layers):
            if lesson.left() <= 0:
                raise DeadlineExceeded("the time ended before every layer was weighed")
            row = found[layer.node] = {}
            for width in widths:
                rounded = torch.from_numpy(encode(values[layer.weight], layer.axis, width).restore())
                twin.on_weight[layer.weight] = lambda _weight, rounded=rounded: rounded
                row[width] = max(apart() - plain, 0.0)
            del twin.on_weight[layer.weight]
            lesson.say("weighing the layers", (at + 1) / len(layers))
    return found


def _widths(small: Any, lesson: Lesson, rung: Rung, x: Array, wanted: Array) -> tuple[dict[str, float], Harm] | None:
    """Return the layers that are stored narrower than in 8 bits, how narrow, and what each width alone costs a layer; None where
    the time ended before that was known."""
    able = [layer for layer in heavy(small) if layer.count >= LEAST_WEIGHTS and not layer.depthwise]
    narrow = tuple(width for width in lesson.widths if 2 <= width < 8)
    if not able or not narrow or rung.bits >= 8:
        return {}, {}
    before = torch.get_num_threads()
    torch.set_num_threads(lesson.threads)
    try:
        harm = sensitivity(small, able, narrow, x, wanted, lesson)
    except DeadlineExceeded:
        return None
    finally:
        torch.set_num_threads(before)
    chosen = ladder.assign({layer.node: layer.count for layer in able}, harm, narrow, rung.bits)
    return {node: width for node, width in chosen.items() if width < 8}, harm


def _settings(student: Student, views: Views, lesson: Lesson, at: int) -> Settings:
    """Return the settings of training number `at`, its steps counted out from how long a few of them take."""
    batch = ladder.batch(len(views.x))
    settings = Settings(TIMED_STEPS, batch=batch, threads=lesson.threads, seed=lesson.seed)
    if len(views.x) < batch:
        return dataclasses.replace(settings, steps=0)
    rows = np.arange(min(batch, len(views.x)))
    step_s = time_a_step(student, views.inputs(0, rows), settings)
    asking = 0.0
    if at == 0:
        few = whole_runs(lesson.teacher.inputs[0], views.x, ASKED)
        began = time.monotonic()
        answers(lesson.teacher, few)
        asking = (time.monotonic() - began) / len(few) * len(views.x) * views.count
    count = ladder.steps(at, max(0.0, lesson.left() - asking), step_s, len(views.x))
    return dataclasses.replace(settings, steps=count)


def time_a_step(student: Student, x: Array, settings: Settings) -> float:
    """Return the seconds of one training step where `fit` trains, leaving the student as it was."""
    device = training_device()
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    modules = student.modules().to(device)
    state = {name: value.clone() for name, value in modules.state_dict().items()}
    modules.train()
    times = []
    try:
        for _ in range(UNTIMED_STEPS + TIMED_STEPS):
            began = time.monotonic()
            inputs = torch.from_numpy(np.ascontiguousarray(x)).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=half_precision(device.type)):
                answer = student.twin(inputs)
            answer.float().square().mean().backward()
            modules.zero_grad(set_to_none=True)
            if device.type == "cuda":  # it computes behind the caller's back: what was asked for is not yet done
                torch.cuda.synchronize(device)
            times.append(time.monotonic() - began)
        modules.load_state_dict(state)
    finally:
        modules.to("cpu")
        torch.set_num_threads(before)
    return min(times[UNTIMED_STEPS:])  # what else runs here now may not run later


def _stay(model: Any, done: Shrink, shrink: Shrink) -> Stay:
    """Return the channels that `shrink` keeps of each tensor that loses some, in the numbering of the network without `done`."""
    had, found = survivors(model, done.keep), {}
    for name, (axis, channels) in survivors(model, shrink.keep).items():
        found[name] = axis, np.searchsorted(had[name][1], channels) if name in had else channels
    return found
