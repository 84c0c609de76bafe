"""Measure what a plan is made of: whole heads and tails side by side, and every coding on real data."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from skills import codec, oip
from skills.coding import Coding, Kind, Live
from skills.errors import FormatError
from skills.split import fits_message, reply_ms
from skills.split_plan import Millis
from skills.timer import PAUSE_S, Local, Timer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]


S = TypeVar("S")
T = TypeVar("T", int, float)

WARMUP = 5
CODEC_ROUNDS = 12
JPEG_QUALITIES = (75, 90, 95)
SIGNAL_KINDS: tuple[Kind, ...] = ("rice", "u16", "u8", "u4")
REPLY_KINDS: tuple[Kind, ...] = (
    "u8",
    "u16",
    "native",
)  # 4 bits of a score or a box are no answer, whatever the metric says


class Steps(Protocol):
    """Segments of a model, or stages of a skill: any run of them, in order."""

    def run(self, values: "Arrays", start: int = 0, stop: int | None = None) -> "Arrays":
        """Run steps start..stop-1 on `values` and return what lives on after them."""


class Whole(Protocol):
    """The same in one piece."""

    def run(self, values: "Arrays", /) -> "Arrays":
        """Return the outputs."""


@dataclasses.dataclass(frozen=True, slots=True)
class Costs:
    """Milliseconds of one cut: its head on the device, its tail on this machine."""

    device: Millis
    tail: Millis


@dataclasses.dataclass(frozen=True, slots=True)
class Scorer:
    """How one answer is marked, from 0 to 1, and what that is called; `mark` takes the answer, the whole's, the label."""

    metric: str
    mark: Callable[["Arrays", "Arrays", int | None], float]


def measure(
    chain: Steps,
    whole: Whole,
    afters: Sequence[int],
    samples: Sequence["Arrays"],
    device: Timer,
    rounds: int,
    tick: Callable[[], None] = lambda: None,
    *,
    pause_s: float = PAUSE_S,
) -> tuple[dict[int, Costs], Millis]:
    """Time the head and the tail of every cut and the whole model, interleaved and warm; never a sum over nodes.

    Every head and tail that counts follows a pause of `pause_s`, as where one is asked now and then.
    Returns the costs by number of segments on the device, and the whole model's on this machine.
    """
    walls: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for at in range(WARMUP + rounds):
        feeds = samples[at % len(samples)]
        live = {after: chain.run(feeds, 0, after) for after in afters}
        runs: list[tuple[tuple[str, int], Callable[[], object]]] = [(("whole", 0), lambda: whole.run(feeds))]  # noqa: B023
        for after in afters:
            runs.append((("head", after), lambda after=after: chain.run(feeds, 0, after)))  # type: ignore[misc]  # noqa: B023
            runs.append((("tail", after), lambda after=after, live=live: chain.run(live[after], after)))  # type: ignore[misc]
        turn = at % len(runs)
        for key, run in runs[turn:] + runs[:turn]:
            if pause_s and key[0] != "whole" and at >= WARMUP:
                time.sleep(pause_s)
            start, cpu = time.perf_counter(), time.thread_time()
            run()
            taken = (time.perf_counter() - start) * 1e3, (time.thread_time() - cpu) * 1e3
            if at >= WARMUP:
                walls.setdefault(key, []).append(taken)
        tick()
    costs = {
        after: Costs(
            _millis([device.device_ms(*taken) for taken in walls["head", after]]),
            _millis([taken[0] for taken in walls["tail", after]]),
        )
        for after in afters
    }
    return costs, _millis([taken[0] for taken in walls["whole", 0]])


def possible_codings(tensors: Sequence[Live], is_input: bool, values: Sequence["Arrays"]) -> Iterator[Coding]:
    """Yield the codings worth measuring for a cut, calibrated on the live tensors of the samples that can travel.

    What a quantized model computes in whole numbers travels as it is (`native`). Where most samples cannot travel (empty, not
    finite, too large for a frame) there are none.
    """
    usable = travelling(tensors, values)
    if 2 * len(usable) <= len(values):
        return
    if is_input and all(tensor.image for tensor in tensors):
        yield from (Coding("jpeg", quality) for quality in JPEG_QUALITIES)
        yield Coding("png")
        yield Coding("pixels")
        return
    floats = [tensor.dtype.startswith("FP") for tensor in tensors]
    if is_input or not any(floats):
        yield Coding("native")
    if any(floats):
        # 16 bits are for signals that come in as samples; behind a layer they gain no accuracy over 8 and cost twice the bytes.
        for kind in SIGNAL_KINDS if is_input else ("u8", "u4"):
            yield _affine(kind, tensors, usable)


def travelling(tensors: Sequence[Live], values: Sequence["Arrays"]) -> list["Arrays"]:
    """Return the samples whose tensors can go over the wire; with the others the device goes on by itself."""
    return [one for one in values if not codec.obstacle(tensors, one)]


def arrived(coding: Coding, tensors: Sequence[Live], one: "Arrays") -> "Arrays":
    """Return a sample's tensors as what computes on them reads them: the tail, or the device where they cannot travel."""
    return one if codec.obstacle(tensors, one) else codec.decode(coding, tensors, codec.encode(coding, tensors, one))


def _affine(kind: Kind, tensors: Sequence[Live], values: Sequence["Arrays"]) -> Coding:
    """Return an affine coding calibrated on all of `values`; what holds whole numbers stays exact in it."""
    import numpy as np

    codes = [
        codec.calibrated(kind, np.concatenate([np.asarray(one[tensor.name], np.float32).ravel() for one in values]))
        if tensor.dtype.startswith("FP")
        else (1.0, 0)
        for tensor in tensors
    ]
    return Coding(kind, scales=tuple(scale for scale, _ in codes), zeros=tuple(zero for _, zero in codes))


def measured_replies(outputs: Sequence[Live], answers: Sequence["Arrays"], device: Timer) -> tuple[Coding, ...]:
    """Return the codings of an answer, calibrated and measured on `answers`, the smallest first: encoded here, decoded there.

    One in which most answers would go back raw all the same (empty, not finite, no smaller) is left out.
    """
    import numpy as np

    solid = [one for one in answers if all(_solid(np.asarray(one[live.name])) for live in outputs)]
    floats, found = any(live.dtype.startswith("FP") for live in outputs), []
    for kind in REPLY_KINDS if 2 * len(solid) > len(answers) else ():
        if kind != "native" and not floats:
            continue
        coding = Coding(kind) if kind == "native" else _affine(kind, outputs, solid)
        coded = [one for one in solid if codec.encode_reply((coding,), outputs, coding.name, one) is not None]
        if 2 * len(coded) > len(answers):
            found.append(measure_coding(coding, outputs, coded, lambda back: back, Local(), device, PAUSE_S)[0])
    return tuple(sorted(found, key=lambda one: one.bytes_p50))


def paying_replies(replies: Sequence[Coding], raw_bytes: int, slowest_mbit: float) -> tuple[Coding, ...]:
    """Return the replies that come sooner than a raw one at the rate where bytes cost most: all, where raw none can come."""
    raw_ms = reply_ms(raw_bytes, None, slowest_mbit) if fits_message(raw_bytes) else math.inf
    return tuple(one for one in replies if reply_ms(raw_bytes, one, slowest_mbit) < raw_ms)


def returned(reply: Coding, outputs: Sequence[Live], answer: "Arrays") -> "Arrays":
    """Return an answer as the device reads it after its way back, raw where the tail would send it raw."""
    frame = codec.encode_reply((reply,), outputs, reply.name, answer)
    return answer if frame is None else codec.decode(reply, outputs, frame)


def _solid(array: "NDArray[Any]") -> bool:
    import numpy as np

    return array.size > 0 and (array.dtype.kind != "f" or bool(np.isfinite(array).all()))


def measure_coding(
    coding: Coding,
    tensors: Sequence[Live],
    values: Sequence["Arrays"],
    finish: Callable[["Arrays"], "Arrays"],
    writes: Timer,
    reads: Timer = Local(),  # noqa: B008  frozen
    pause_s: float = 0.0,
) -> tuple[Coding, list["Arrays"]]:
    """Return the coding with its bytes and times, and the answers that came of it, measured on every sample.

    With `pause_s`, for where no model runs in between, the times are those of the first samples alone, each after a pause.
    A sample that cannot travel is finished by the device: it has an answer, and neither bytes nor times.
    """
    sizes, answers = list[int](), list["Arrays"]()
    encodes, decodes = list[float](), list[float]()
    for one in values:
        if codec.obstacle(tensors, one):
            answers.append(finish(one))
            continue
        warming = len(encodes) < CODEC_ROUNDS
        if warming:
            codec.decode(coding, tensors, codec.encode(coding, tensors, one))
        rest_s = pause_s if warming else 0.0
        frame, encode_ms = _timed(lambda: codec.encode(coding, tensors, one), writes, rest_s)  # noqa: B023  called at once
        decoded, decode_ms = _timed(lambda: codec.decode(coding, tensors, frame), reads, rest_s)  # noqa: B023
        if coding.kind == "native":
            _check_exact(tensors, one, decoded)
        sizes.append(len(frame))
        if warming or not pause_s:
            encodes.append(encode_ms)
            decodes.append(decode_ms)
        answers.append(finish(decoded))
    measured = dataclasses.replace(
        coding,
        bytes_p50=_at(sizes, 0.5), bytes_p95=_at(sizes, 0.95), encode_ms=_rounded(_at(encodes, 0.5)),
        decode_ms=_rounded(_at(decodes, 0.5)),
    )  # fmt: skip
    return measured, answers


def _timed(work: Callable[[], S], timer: Timer, rest_s: float) -> tuple[S, float]:
    """Return what the work gives after a rest, and its milliseconds on the timer's device."""
    if rest_s:
        time.sleep(rest_s)
    start, cpu = time.perf_counter(), time.thread_time()
    found = work()
    return found, timer.device_ms((time.perf_counter() - start) * 1e3, (time.thread_time() - cpu) * 1e3)


def _check_exact(tensors: Sequence[Live], sent: "Arrays", arrived: "Arrays") -> None:
    """What travels as it is must arrive as it was: then the answer behind it is the same by construction."""
    import numpy as np

    for live in tensors:
        if not np.array_equal(sent[live.name], arrived[live.name]):
            raise FormatError(f"the tensor {live.name!r} did not arrive as it was sent")


def gated(
    coding: Coding, reference: Sequence[float], marks: Sequence[float], max_drop: float, answer_bytes: int = 0
) -> Coding:
    """Return the coding with its drop, input against input.

    Over the budget, or where it or the answer is too large for a message, it is not admitted.
    """
    import numpy as np

    drop, interval = paired_drop(np.asarray(reference), np.asarray(marks))
    fits = coding.bytes_p95 <= oip.MAX_MESSAGE_BYTES and fits_message(answer_bytes)
    return dataclasses.replace(coding, drop=drop, drop_ci95=interval, admitted=drop <= max_drop and fits)


def with_reply(
    coding: Coding, reference: Sequence[float], returns: Sequence[tuple[Coding, Sequence[float]]], max_drop: float
) -> Coding:
    """Return a gated coding with the first reply that fits a message and together with it the budget, and what both lose."""
    for reply, marks in returns if coding.drop <= max_drop else ():
        both = gated(dataclasses.replace(coding, reply=reply.name), reference, marks, max_drop, reply.bytes_p95)
        if both.admitted:
            return both
    return coding


def scorer(answers: Sequence["Arrays"], outputs: Sequence[str], labels: "NDArray[Any] | None") -> Scorer:
    """Return how to mark answers: accuracy on labels, else agreement of the likeliest class with the whole float model.

    Outputs that are no class scores are compared as `fidelity`: one minus the relative error, never below nought.
    `answers` are the whole model's.

    Raises:
        FormatError: a label is no class of the model's.
    """
    import numpy as np

    name = outputs[0]
    shapes, kind = {np.asarray(one[name]).shape for one in answers}, np.asarray(answers[0][name]).dtype.kind
    shape = min(shapes)
    classes = len(outputs) == len(shapes) == 1 and len(shape) == 2 and shape[0] == 1 < shape[1] and kind == "f"

    def top(answer: "Arrays") -> int:
        return int(np.asarray(answer[name])[0].argmax())

    if not classes:
        return Scorer("fidelity", lambda answer, truth, _: _fidelity(answer, truth, outputs))
    if labels is not None:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= shape[1]:
            raise FormatError(
                f"labels in y run from {low} to {high}, the model's output has {shape[1]} classes (0 to {shape[1] - 1})"
            )
        return Scorer("accuracy", lambda answer, _, label: float(top(answer) == label))
    return Scorer("agreement", lambda answer, truth, _: float(top(answer) == top(truth)))


def paired_drop(reference: "NDArray[Any]", values: "NDArray[Any]") -> tuple[float, tuple[float, float]]:
    """Return the mean drop in percentage points and its 95 % interval, sample against sample.

    Without a single difference the upper end is the rule of three: 3/n.
    """
    import numpy as np

    difference = (reference - values) * 100
    drop, count = float(difference.mean()), len(difference)
    if not difference.any():
        return 0.0, (0.0, _rounded(300 / count))
    half = 1.96 * float(np.std(difference, ddof=1)) / math.sqrt(count) if count > 1 else 100.0
    return _rounded(drop), (_rounded(drop - half), _rounded(drop + half))


def _fidelity(answer: "Arrays", truth: "Arrays", outputs: Sequence[str]) -> float:
    import numpy as np

    errors = []
    for name in outputs:
        found, right = np.asarray(answer[name], np.float64), np.asarray(truth[name], np.float64)
        if found.shape != right.shape:
            return 0.0
        errors.append(float(np.linalg.norm(found - right)) / max(float(np.linalg.norm(right)), 1e-12))
    return max(0.0, 1.0 - max(errors))


def _millis(values: Sequence[float]) -> Millis:
    return Millis(_rounded(_at(values, 0.5)), _rounded(_at(values, 0.9)))


def _at(values: Sequence[T], share: float) -> T:
    ordered = sorted(values)
    return ordered[round((len(ordered) - 1) * share)]


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
