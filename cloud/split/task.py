"""What the planner measures for a device: segments written and timed, codings tried, and what each of them loses."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloud.split.gap import allowed_gap, largest_gap
from cloud.split.graph import Flow
from cloud.split.live import LiveDevice, with_figures
from cloud.split.profile import (
    Costs,
    arrived,
    gated,
    measure,
    measure_coding,
    measured_replies,
    paying_replies,
    possible_codings,
    returned,
    scorer,
    with_reply,
)
from cloud.split.segment import Pieces, Types, write_segments
from cloud.split.shortlist import Candidate
from skills import ort
from skills.coding import Coding, Image
from skills.errors import FormatError
from skills.files import storage_errors
from skills.measurement import Figures
from skills.split_plan import Millis
from skills.timer import PAUSE_S, Timer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

Progress = Callable[[str, int, int], None]

GATE_S = 20.0  # how long inputs beyond the timed ones may keep on proving the budget


@dataclasses.dataclass(frozen=True, slots=True)
class Timed:
    """Segments that were written, loaded, found equal to the whole, and timed."""

    pieces: Pieces
    chain: ort.Chain
    costs: Mapping[int, Costs]
    whole: Millis
    gap: float
    shapes: Mapping[str, tuple[int, ...]]  # of all that crosses, for the sample with the middle amount of it


@dataclasses.dataclass(frozen=True, slots=True)
class Gate:
    """Every coding with what it loses, by cut, `input` first; the whole model's own metric, and on how many inputs."""

    codings: list[tuple[Coding, ...]]
    metric: str
    whole: float
    inputs: int
    reply_bytes: int  # of a raw answer
    replies: tuple[Coding, ...]  # every coding of it, as measured, the smallest first


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """What is measured, on what, and for which device."""

    raw: bytes | Path
    beside: Path | None  # where the model's external data lies
    graph: Any
    flow: Flow
    types: Types
    samples: "Sequence[Arrays]"
    more: "Sequence[Arrays]"  # inputs that only help to judge the budget
    labels: "NDArray[Any] | None"
    image: Image | None
    device: Timer
    max_drop: float
    slowest_mbit: float  # of the links that the plan is for
    progress: Progress

    def time(self, cuts: Sequence[Candidate], folder: Path, stage: str, rounds: int, pause_s: float = PAUSE_S) -> Timed:
        """Write the segments between `cuts` to `folder`/segments and time every head, after a pause each, and tail."""
        with storage_errors(folder):
            (folder / "segments").mkdir(parents=True)
        pieces = write_segments(
            self.graph, self.flow, [cut.prefix for cut in cuts], folder / "segments", self.types, self.image,
            source=self.beside,
        )  # fmt: skip
        unused = set(self.flow.inputs) - {live.name for live in pieces.live[0]}
        if unused:
            raise FormatError(f"the model's input {min(unused)!r} is used by nothing: remove it, then split")
        whole = ort.session(self.raw, beside=self.beside)
        chain = ort.chain([folder / segment.file for segment in pieces.segments], self.flow.outputs)
        few = self.samples[:8]
        gap = largest_gap(chain, few, [whole.run(sample) for sample in few], allowed_gap(self.flow, pieces))
        ticker = _ticker(self.progress, stage, rounds)
        afters = range(len(cuts) + 2)
        costs, whole_ms = measure(chain, whole, afters, self.samples, self.device, rounds, ticker, pause_s=pause_s)
        shapes = sorted((_shapes(chain, sample) for sample in few), key=lambda one: sum(map(math.prod, one.values())))
        return Timed(pieces, chain, costs, whole_ms, gap, shapes[len(few) // 2])

    def there(
        self,
        device: LiveDevice,
        timed: Timed,
        codings: list[tuple[Coding, ...]],
        folder: Path,
        rounds: int,
    ) -> tuple[Timed, list[tuple[Coding, ...]], Figures]:
        """Return the same with the times that a live device took for every head and every coding, and all it measured."""
        figures = device.figures(folder, timed.pieces, self.samples, codings, rounds, self.progress)
        costs, codings = with_figures(timed.costs, codings, figures)
        return dataclasses.replace(timed, costs=costs), codings, figures

    def code(self, cuts: Sequence[Candidate], timed: Timed) -> Gate:
        """Measure every coding of every cut on all samples, then judge the budget on more inputs while time lasts."""
        whole, live = ort.session(self.raw, beside=self.beside), timed.pieces.live
        truths = [whole.run(sample) for sample in self.samples]
        score = scorer(truths, self.flow.outputs, self.labels)

        def mark(at: int, answer: "Arrays", truth: "Arrays") -> float:
            return score.mark(answer, truth, None if self.labels is None else int(self.labels[at]))

        reference = [mark(at, truth, truth) for at, truth in enumerate(truths)]
        outputs = timed.pieces.outputs
        reply_bytes = sorted(sum(int(array.nbytes) for array in one.values()) for one in truths)[len(truths) // 2]
        replies = measured_replies(outputs, truths, self.device)
        paying = paying_replies(replies, reply_bytes, self.slowest_mbit)

        def marked(at: int, answer: "Arrays", truth: "Arrays") -> list[float]:
            ways = (answer, *(returned(reply, outputs, answer) for reply in paying))
            return [mark(at, way, truth) for way in ways]

        found: list[list[tuple[Coding, list[list[float]]]]] = []  # marks by input, then by reply, raw first
        for after, tensors in enumerate(live):
            self.progress("measuring codings", after, len(live))
            values = [timed.chain.run(sample, 0, after) for sample in self.samples]

            def finish(decoded: "Arrays", after: int = after) -> "Arrays":
                return timed.chain.run(decoded, after)

            found.append([])
            for one in possible_codings(tensors, after == 0, values):
                coding, answers = measure_coding(one, tensors, values, finish, self.device)
                marks = [marked(at, *pair) for at, pair in enumerate(zip(answers, truths, strict=True))]
                found[-1].append((coding, marks))
        self.progress("measuring codings", len(found), len(found))
        until = time.monotonic() + GATE_S
        for at, sample in enumerate(self.more, len(self.samples)):
            if time.monotonic() > until:
                break
            self.progress("judging the budget", at, len(self.samples) + len(self.more))
            truth = whole.run(sample)
            reference.append(mark(at, truth, truth))
            for after, measured in enumerate(found):
                values_here = timed.chain.run(sample, 0, after)
                for coding, marks in measured:
                    decoded = arrived(coding, live[after], values_here)
                    marks.append(marked(at, timed.chain.run(decoded, after), truth))
        if self.more:
            self.progress("judging the budget", len(reference), len(reference))

        def judged(coding: Coding, marks: list[list[float]]) -> Coding:
            raw, *coded = zip(*marks, strict=True)
            alone = gated(coding, reference, raw, self.max_drop, reply_bytes)
            return with_reply(alone, reference, tuple(zip(paying, coded, strict=True)), self.max_drop)

        codings = [tuple(judged(*one) for one in cut) for cut in found]
        return Gate(codings, score.metric, sum(reference) / len(reference), len(reference), reply_bytes, replies)


def _shapes(chain: ort.Chain, values: "Arrays") -> dict[str, tuple[int, ...]]:
    found = dict[str, tuple[int, ...]]()
    for at in range(len(chain.sessions)):
        found |= {name: array.shape for name, array in values.items()}
        values = chain.run(values, at, at + 1)
    return found


def _ticker(progress: Progress, stage: str, rounds: int) -> Callable[[], None]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(stage, min(done, rounds), rounds)

    return tick
