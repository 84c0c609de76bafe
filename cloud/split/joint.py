"""A small model on the device, hard inputs to the big one: its temperature and threshold, chosen on data.

Calibration: temperature scaling (Guo et al., ICML 2017), because miscalibrated exits hurt (Pacheco et al., 2020). The
threshold is the lowest with which both together reach the target on one half of the data; the other half says what they
really reach.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloud.split.export import commented
from cloud.split.inputs import check_fit, read_data, read_model
from cloud.split.profile import Scorer, paired_drop, scorer
from skills import ort
from skills.confidence import Scores, confidence
from skills.errors import FormatError, NotReached, UsageError
from skills.files import read_bytes, sha256_hex, write_atomic
from skills.network import Link
from skills.split import Estimate, choose_cut
from skills.split_plan import MAX_PLAN_BYTES, Millis, Plan, Small, load_plan
from skills.timer import Dilated, Local, Timer
from skills.units import readable_ms

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Arrays = Mapping[str, NDArray[Any]]

LEAST_INPUTS = 100
MOST_INPUTS = 2000
FOLDER = "small"
ROUNDS = 20
MAX_MODEL_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True, slots=True)
class Joined:
    """What a small and a big model reach together, on inputs that chose nothing."""

    small: Small
    alone: float  # accuracy of the small model
    big: float
    together: float
    drop_ci95: tuple[float, float]  # of both together against the big model, percentage points
    inputs: int
    text: str


def join(plan_folder: Path, small: Path, data: "Path | Arrays", target: float | None = None, seed: int = 0) -> Joined:
    """Add a small model to the split plan of a big one: split.yaml is written anew, the model is put beside it.

    `target` is the accuracy to reach together, from 0 to 1; without it, the big model's less the plan's `max_drop`. A model
    that does not give one row of class scores is taken for a detector: its first output has scores from 0 to 1, the highest
    one says how sure it is, and it is marked by how close its outputs are to the big model's (`fidelity`, as in the plan).

    Raises:
        NotFound, FormatError: the plan, model or data is missing or does not fit.
        NotReached: not even asking about every input reaches the target; the plan is as it was.
    """
    import numpy as np

    file = plan_folder / "split.yaml"
    plan = load_plan(read_bytes(file, "the split plan", MAX_PLAN_BYTES).decode("utf-8", "replace"), str(file))
    raw, graph = read_model(small)
    given = read_data(data, graph)
    feeds, labels = given.feeds, given.labels
    session = ort.session(raw, beside=small.parent)
    check_fit(given, session.inputs)
    inputs, outputs = _ends(session, plan)
    count = min(len(next(iter(feeds.values()))), MOST_INPUTS)
    if count < LEAST_INPUTS:
        raise FormatError(f"the data has {count} inputs: to choose a threshold takes at least {LEAST_INPUTS}")
    chain = ort.chain([plan_folder / one.file for one in plan.segments], [live.name for live in plan.outputs])
    rows = [{name: array[at : at + 1] for name, array in feeds.items()} for at in range(count)]
    names = [live.name for live in plan.outputs]
    mine: list[Arrays] = [dict(zip(names, map(session.run(row).__getitem__, outputs), strict=True)) for row in rows]
    theirs: list[Arrays] = [
        chain.run({live.name: row[name] for live, name in zip(plan.inputs, inputs, strict=True)}) for row in rows
    ]
    score = scorer(theirs, names, labels)
    scores = [answer[names[0]] for answer in mine]
    kind = _check_scores(scores, theirs[0][names[0]], score, outputs[0])
    truth = [None if labels is None else int(labels[at]) for at in range(count)]
    right_small = np.array([score.mark(*one) for one in zip(mine, theirs, truth, strict=True)])
    right_big = np.array([score.mark(*one) for one in zip(theirs, theirs, truth, strict=True)])
    order = np.random.default_rng(seed).permutation(count)
    fit, judge = order[: count // 2], order[count // 2 :]
    temperature = 1.0  # of what was found the highest score counts, and a threshold on it needs no more
    if kind == "classes":
        classes = np.array(
            [np.asarray(big[names[0]]).argmax() if y is None else y for big, y in zip(theirs, truth, strict=True)]
        )
        temperature = round(fit_temperature(np.concatenate(scores)[fit], classes[fit]), 4)
    sure = np.array([confidence(one, kind, temperature) for one in scores])
    goal = float(right_big[fit].mean()) - plan.max_drop / 100 if target is None else target
    threshold = choose_threshold(sure[fit], right_small[fit], right_big[fit], goal)
    kept = sure[judge] >= threshold
    both = np.where(kept, right_small[judge], right_big[judge])
    drop, interval = paired_drop(right_big[judge], both)
    content = _one_file(raw, graph, small.parent)
    found = Small(
        f"{FOLDER}/{small.name}", sha256_hex(content), len(content), inputs, outputs, kind, temperature,
        threshold, round(float(1 - kept.mean()), 4), round(float(both.mean()), 4), drop, interval, len(judge),
        _timed(session, rows, plan),
    )  # fmt: skip
    (plan_folder / FOLDER).mkdir(exist_ok=True)
    write_atomic(
        plan_folder / found.file, content
    )  # 1. The model lies there. A crash leaves a file that no plan names.
    joined = dataclasses.replace(plan, small=found)
    write_atomic(file, commented(joined).encode())  # 2. Commit point: the plan names it.
    return Joined(
        found, float(right_small[judge].mean()), float(right_big[judge].mean()), float(both.mean()), interval, len(judge),
        describe(joined, joined.network),
    )  # fmt: skip


def _one_file(raw: bytes | Path, graph: Any, folder: Path) -> bytes:
    """Return the small model as it is, or with all in it that lies in other files of `folder`."""
    from onnx import external_data_helper

    alone = graph.SerializeToString()
    external_data_helper.load_external_data_for_model(graph, str(folder))
    if graph.ByteSize() > MAX_MODEL_BYTES:
        raise FormatError(f"the small model has {graph.ByteSize()} bytes, the limit is {MAX_MODEL_BYTES}")
    if (whole := graph.SerializeToString()) != alone:
        return bytes(whole)
    return raw if isinstance(raw, bytes) else read_bytes(raw, "the small model", MAX_MODEL_BYTES)


def _check_scores(scores: "Sequence[Array]", big: "Array", score: Scorer, name: str) -> Scores:
    """Return what the small model's scores are, by what the big one's were marked as."""
    import numpy as np

    if score.metric != "fidelity":
        if scores[0].shape != big.shape:
            raise FormatError(
                f"the small model answers {scores[0].shape}, the big one {big.shape}: both must give one row of class scores"
            )
        return "classes"
    if any(((one < 0) | (one > 1)).any() for one in map(np.asarray, scores)):
        raise FormatError(
            f"the small model's first output {name!r} holds no scores from 0 to 1, so nothing says when it is sure"
        )
    return "detections"


def fit_temperature(scores: "Array", truth: "Array") -> float:
    """Return the temperature from 0.05 to 20 under which the scores' likelihood of the truth is greatest."""
    import numpy as np

    def loss(log_t: float) -> float:
        scaled = scores.astype(np.float64) / math.exp(log_t)
        scaled -= scaled.max(1, keepdims=True)
        return float((np.log(np.exp(scaled).sum(1)) - scaled[np.arange(len(truth)), truth]).mean())

    low, high = math.log(0.05), math.log(20)
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(60):  # golden section: the loss has one valley in log temperature
        one, two = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, two) if loss(one) < loss(two) else (one, high)
    return math.exp((low + high) / 2)


def choose_threshold(sure: "Array", right_small: "Array", right_big: "Array", target: float) -> float:
    """Return the lowest threshold (most answers here) with which both together are right as often as `target` says.

    It has six digits, as a plan is to have it, and is judged as such.

    Raises:
        UsageError: the target is no share.
        NotReached: no threshold reaches it.
    """
    import numpy as np

    if not 0 < target <= 1:
        raise UsageError(f"the target is {target:g}: it is the share of right answers, above 0 and at most 1")
    best = 0.0
    for threshold in (0.0, *np.unique(np.floor(sure * 1e6) / 1e6), 2.0):
        reached = float(np.where(sure >= threshold, right_small, right_big).mean())
        best = max(best, reached)
        if reached >= target:
            return float(min(threshold, 1.0)) if threshold < 2 else 1.0
    raise NotReached(f"both models together reach {best:.1%} at best, the target is {target:.1%}")


def describe(plan: Plan, link: Link) -> str:
    """Say in words what the small model saves on `link`: T = small + share asked about x the big model's best option.

    It pays where it saves more than the measured times spread (90th percentile less median, the widest). A drop above 0 is worse.
    """
    small = plan.small
    if small is None:
        return "there is no small model"
    best = choose_cut(plan, Estimate(link.mbit, link.rtt_ms))
    mine, theirs = small.device_ms, f"{best.cut.name}, {readable_ms(best.ms)}"
    expected = mine.p50 + small.asked * best.ms
    times = (mine, best.cut.device_ms, *([best.cut.tail_ms] if best.coding is not None else []))
    spread = max(one.p90 - one.p50 for one in times)
    pays = best.ms - expected > spread
    interval = f" (95 % interval {small.drop_ci95[0]:+.1f} … {small.drop_ci95[1]:+.1f})" if small.drop_ci95 else ""
    lost = f"{small.accuracy:.1%}, a drop of {small.drop + 0:+.1f} points{interval} against the big model"
    if not small.threshold:
        word = "that alone is" if pays else "but that is not clearly"
        return (
            f"the big model would never be asked: the small one alone does, in {readable_ms(mine.p50)}; {word} faster "
            f"({theirs}), so joining them does not pay; the small one reaches {lost}"
        )
    word = "pays" if pays else "does not pay: that is not clearly faster"
    return (
        f"the small model answers {1 - small.asked:.0%} by itself in {readable_ms(mine.p50)} and asks about the rest "
        f"({theirs}): {readable_ms(expected)} on average against {readable_ms(best.ms)}, "
        f"so it {word}; together they reach {lost}"
    )


def _ends(session: ort.Session, plan: Plan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the small model's inputs and outputs in the order of the plan's."""
    found = []
    for what, ports, wanted in (("input", session.inputs, plan.inputs), ("output", session.outputs, plan.outputs)):
        names = {port.name for port in ports}
        if names == {live.name for live in wanted}:
            found.append(tuple(live.name for live in wanted))
        elif len(ports) == len(wanted):
            found.append(tuple(port.name for port in ports))
        else:
            raise FormatError(f"the small model has {len(ports)} {what}s, the big one {len(wanted)}")
    return found[0], found[1]


def _timed(session: ort.Session, rows: "Sequence[Arrays]", plan: Plan) -> Millis:
    device: Timer = Dilated(plan.slowdown) if plan.slowdown > 1 else Local()
    taken = ort.interleaved({"small": lambda: session.run(rows[0])}, ROUNDS)["small"]
    return Millis(
        float(f"{device.device_ms(taken.p50_ms, taken.p50_ms):.4g}"),
        float(f"{device.device_ms(taken.p90_ms, taken.p90_ms):.4g}"),
    )
