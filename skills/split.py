"""What a split plan is (`split.yaml`) and which cut a request takes. Pure: facts in, decisions out.

A model is cut once into K+1 segments. A cut says how many of them run on the device; the tensors that live on across it
travel, coded, to the tail. `input` (send the compressed input) and `local` (send nothing) stand in every plan.
docs/splitting.md explains the cost model.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterator
from typing import Annotated, Literal

from skills.errors import FormatError, UsageError
from skills.manifest import Datatype, check_path
from skills.report import Sha256
from skills.wire import Doc, Limits, decode_yaml, encode_json

MAX_PLAN_BYTES = 1 << 20
CALL_BYTES = 600  # headers and parameters of one call and its answer, on the wire
CODED_REPLY_BYTES = 42  # what names a reply's coding, in the call and in its answer
INITIAL_WINDOW_BYTES = 14_600  # ten segments of 1460 bytes: what TCP sends before the first acknowledgement (RFC 6928)
CODED_KINDS = ("u8", "u4", "u16", "rice")
TOP = {"u4": 15, "u8": 255, "u16": 65_535, "rice": 65_535}  # the largest code of each affine coding
IMAGE_KINDS = ("pixels", "png", "jpeg")

Positive = Limits(min=1e-9)
TensorName = Annotated[str, Limits(min=1, max_items=512)]
CutName = Annotated[str, Limits(pattern=r"local|input|c[1-9]\d{0,2}", hint="local, input or c1, c2, …")]
Kind = Literal["u8", "u4", "u16", "rice", "native", "pixels", "png", "jpeg"]


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
    """An input that is a picture: pixel = value x std + mean, a whole number from 0 to 255."""

    mean: Annotated[tuple[float, ...], Limits(min=1, max_items=4), Doc("one per channel, in pixel units")]
    std: Annotated[
        tuple[Annotated[float, Positive], ...], Limits(min=1, max_items=4), Doc("one per channel, in pixel units")
    ]
    layout: Annotated[Literal["NCHW", "NHWC"], Doc("where the channels stand")] = "NCHW"


@dataclasses.dataclass(frozen=True, slots=True)
class Live:
    """A tensor that lives across a cut, or an input or output of the model; -1 is a free size."""

    name: TensorName
    dtype: Datatype
    shape: Annotated[tuple[Annotated[int, Limits(min=-1)], ...], Limits(max_items=8)]
    image: Annotated[Image | None, Doc("set on an input that is a picture")] = None


@dataclasses.dataclass(frozen=True, slots=True)
class Millis:
    """Milliseconds: median and 90th percentile of interleaved, warm runs."""

    p50: Annotated[float, Limits(min=0)]
    p90: Annotated[float, Limits(min=0)]


@dataclasses.dataclass(frozen=True, slots=True)
class Coding:
    """One way to write the tensors of a cut, with what it costs; scales and zeros stand here, never on the wire."""

    kind: Annotated[
        Kind,
        Doc(
            "u4, u8, u16: affine codes + zstd; rice: 16-bit codes, predicted along time, without further loss; native: the "
            "tensor's own bytes + zstd; pixels, png, jpeg: an image input"
        ),
    ]
    quality: Annotated[int, Limits(min=0, max=100), Doc("of jpeg")] = 0
    scales: Annotated[
        tuple[Annotated[float, Limits(min=1e-30, max=1e30)], ...], Limits(max_items=64), Doc("one per tensor")
    ] = ()
    zeros: Annotated[
        tuple[Annotated[int, Limits(min=0, max=65_535)], ...], Limits(max_items=64), Doc("one per tensor")
    ] = ()
    bytes_p50: Annotated[int, Limits(min=0)] = 0
    bytes_p95: Annotated[int, Limits(min=0)] = 0
    encode_ms: Annotated[float, Limits(min=0), Doc("on the device; of a reply, at the tail")] = 0.0
    decode_ms: Annotated[float, Limits(min=0), Doc("at the tail; of a reply, on the device")] = 0.0
    reply: Annotated[
        str, Limits(max_items=16), Doc("the one of `replies` that the answer may come back in; empty: raw only")
    ] = ""
    drop: Annotated[float, Doc("percentage points lost against the whole model, its reply's included")] = 0.0
    drop_ci95: Annotated[tuple[float, float] | None, Doc("paired interval of the drop")] = None
    admitted: Annotated[bool, Doc("false: its drop is over the budget, so it is never chosen")] = True

    def __post_init__(self) -> None:
        if not all(math.isfinite(scale) and scale > 0 for scale in self.scales):
            raise FormatError(f"coding {self.kind} has the scales {list(self.scales)}: each is a finite number above 0")
        top = TOP.get(self.kind, 65_535)
        if any(not 0 <= zero <= top for zero in self.zeros):
            raise FormatError(
                f"coding {self.kind} has the zero points {list(self.zeros)}: each lies between 0 and {top}"
            )

    @property
    def name(self) -> str:
        """The word for people: `u4`, `jpeg q90`."""
        return f"jpeg q{self.quality}" if self.kind == "jpeg" else self.kind


@dataclasses.dataclass(frozen=True, slots=True)
class Leak:
    """What a decoder that was trained for it made of the tensors of a cut: how much of the input they give away."""

    verdict: Annotated[Literal["private", "recoverable", "inconclusive"], Doc("inconclusive counts as not private")]
    measure: Annotated[
        Literal["ssim", "explained variance"], Doc("of reconstructed inputs that the decoder was not trained on")
    ]
    value: Annotated[float, Limits(min=-1, max=1), Doc("1: the input itself; about 0: nothing of it")]
    inputs: Annotated[int, Limits(min=0), Doc("how many inputs the decoder was trained and judged on")] = 0
    flat: Annotated[bool, Doc("whether its held-out loss had stopped falling when it was judged")] = True


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """A place between segments: the first `after` of them run on the device."""

    name: CutName
    after: Annotated[int, Limits(min=0)]
    device_ms: Annotated[Millis, Doc("the device's segments as one run, on the device")]
    tail_ms: Annotated[Millis, Doc("the other segments as one run, at the tail")]
    tensors: Annotated[tuple[Live, ...], Limits(max_items=64)] = ()
    codings: Annotated[tuple[Coding, ...], Limits(max_items=16)] = ()
    raw: Annotated[bool, Doc("the input itself, or the input in another dress, leaves the device here")] = False
    memory_mb: Annotated[float, Limits(min=0), Doc("memory that the device's segments take; 0: not measured")] = 0.0
    leak: Annotated[Leak | None, Doc("with private: what the audit found")] = None

    def __post_init__(self) -> None:
        for coding in self.codings:
            if coding.kind in CODED_KINDS and not len(coding.scales) == len(coding.zeros) == len(self.tensors):
                raise FormatError(
                    f"cut {self.name} has {len(self.tensors)} tensors, its coding {coding.name} {len(coding.scales)} scales"
                )
            if coding.kind in IMAGE_KINDS and not all(tensor.image for tensor in self.tensors):
                raise FormatError(f"cut {self.name} uses {coding.name}, but a tensor of it is no image")


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the model, an ONNX file beside the plan."""

    file: str
    sha256: Sha256
    bytes: Annotated[int, Limits(min=1)]
    inputs: Annotated[tuple[TensorName, ...], Limits(min=1, max_items=64)]
    outputs: Annotated[tuple[TensorName, ...], Limits(min=1, max_items=64)]


@dataclasses.dataclass(frozen=True, slots=True)
class SharedData:
    """Constants that several segments use, stored once as ONNX external data."""

    file: str
    sha256: Sha256
    bytes: Annotated[int, Limits(min=1)]


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """A network between device and tail: uplink rate and round-trip time."""

    mbit: Annotated[float, Limits(min=0.001, max=1e6)]
    rtt_ms: Annotated[float, Limits(min=0, max=60_000)]

    def __str__(self) -> str:
        return f"{self.mbit:g}mbit/{self.rtt_ms:g}ms"


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What the measurements say for one link, in words."""

    link: Link
    cut: CutName
    coding: str
    ms: float
    text: str
    reply: Annotated[
        str, Limits(max_items=16), Doc("the coding that the answer comes back in; empty: raw, or none comes")
    ] = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """How the device decides between requests; a person may edit every line of it."""

    minimize: Annotated[Literal["latency", "bytes"], Doc("what the best answer has least of")] = "latency"
    slo_ms: Annotated[float | None, Limits(min=0.001), Doc("the slowest answer allowed; minimize: bytes needs it")] = (
        None
    )
    pin: Annotated[CutName | None, Doc("always use this cut while the tail answers")] = None
    overhead_ms: Annotated[float, Limits(min=0), Doc("one remote call without its bytes, on a link without delay")] = (
        3.0
    )
    gain: Annotated[
        float,
        Limits(min=0),
        Doc("switch when a cut is this share better (faster, or fewer bytes), several times in a row"),
    ] = 0.08
    gain_at_once: Annotated[float, Limits(min=0), Doc("switch at once when it is this share better")] = 0.30
    streak: Annotated[int, Limits(min=1), Doc("how many times in a row")] = 3
    dwell_s: Annotated[float, Limits(min=0), Doc("shortest stay at a cut")] = 1.0
    tail: Annotated[
        Literal["skerry", "stock"],
        Doc("stock: any server of the Open Inference Protocol; tensors travel as they are, there and back"),
    ] = "skerry"


@dataclasses.dataclass(frozen=True, slots=True)
class Small:
    """A small model that answers on the device when it is sure; only hard inputs go on to the plan's own, big model.

    Whatever becomes of such a question, its answer is there: when the big one's does not come in time, this one's counts.
    """

    file: str
    sha256: Sha256
    bytes: Annotated[int, Limits(min=1)]
    inputs: Annotated[tuple[TensorName, ...], Limits(min=1, max_items=32), Doc("in the order of the plan's inputs")]
    outputs: Annotated[tuple[TensorName, ...], Limits(min=1, max_items=32), Doc("in the order of the plan's outputs")]
    scores: Annotated[
        Literal["classes", "detections"],
        Doc(
            "what its first output holds: logits over classes, or scores from 0 to 1 of what was found; none found is hard"
        ),
    ] = "classes"
    temperature: Annotated[
        float, Limits(min=0.01, max=100), Doc("divides the logits, so that they tell true shares")
    ] = 1.0
    threshold: Annotated[float, Limits(min=0, max=1), Doc("below this share the big model is asked; may be edited")] = (
        0.8
    )
    asked: Annotated[float, Limits(min=0, max=1), Doc("measured share of inputs that the big model is asked about")] = (
        1.0
    )
    accuracy: Annotated[float, Limits(min=0, max=1), Doc("of both together, on inputs that chose nothing")] = 0.0
    drop: Annotated[float, Doc("percentage points lost against asking the big model always")] = 0.0
    drop_ci95: Annotated[tuple[float, float] | None, Doc("paired interval of the drop")] = None
    samples: Annotated[int, Limits(min=0), Doc("how many inputs that was measured on")] = 0
    device_ms: Annotated[Millis, Doc("the small model on the device")] = Millis(0.0, 0.0)


@dataclasses.dataclass(frozen=True, slots=True)
class StageAt:
    """Where a skill's stage belongs on the assumed network, and what it hands on."""

    name: Annotated[str, Limits(min=1, max_items=63)]
    place: Literal["device", "cloud"]
    message: Annotated[tuple[Live, ...], Limits(max_items=64)] = ()
    model: Annotated[str, Limits(max_items=200), Doc("the model file, among `parts`, that a tail runs it with")] = ""


@dataclasses.dataclass(frozen=True, slots=True)
class StagePart:
    """A file that the stages need beside their code: a model, or an asset."""

    file: str
    sha256: Sha256
    bytes: Annotated[int, Limits(min=0)]


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """Segments, cuts, codings and measured costs of one model on one class of device."""

    model_sha256: Sha256
    inputs: Annotated[tuple[Live, ...], Limits(min=1, max_items=32)]
    outputs: Annotated[tuple[Live, ...], Limits(min=1, max_items=32)]
    segments: Annotated[tuple[Segment, ...], Limits(min=1, max_items=64)]
    cuts: Annotated[tuple[Cut, ...], Limits(min=2, max_items=66)]
    network: Annotated[Link, Doc("assumed until the device has measured its own")] = Link(20, 30)
    slowdown: Annotated[
        float, Limits(min=0.01), Doc("how many times slower than the planning machine the device was taken to be")
    ] = 1.0
    private: Annotated[bool, Doc("raw or compressed input never leaves the device")] = False
    min_cut: Annotated[CutName | None, Doc("with private: the first cut that may be used")] = None
    max_drop: Annotated[float, Limits(min=0), Doc("budget of every coding, percentage points")] = 1.0
    metric: Annotated[str, Doc("accuracy on labelled data, agreement with the whole model on unlabelled data")] = (
        "agreement"
    )
    samples: Annotated[int, Limits(min=0), Doc("how many inputs the drops were measured on")] = 0
    whole: Annotated[
        float | None,
        Limits(min=0, max=1),
        Doc("the whole model's own value of the metric; 1 where it is the yardstick"),
    ] = None
    reply_bytes: Annotated[
        int, Limits(min=0), Doc("what comes back for one input, raw; the link is taken to be as fast both ways")
    ] = 0
    replies: Annotated[
        tuple[Coding, ...],
        Limits(max_items=8),
        Doc("ways to write the outputs for the way back: encode_ms at the tail, decode_ms on the device"),
    ] = ()
    memory_mb: Annotated[
        float | None, Limits(min=1), Doc("memory of the device; a cut that needs more is not used")
    ] = None
    device: Annotated[
        str,
        Limits(max_items=100),
        Doc("the enrolled device that the device's times were measured on; empty: this machine"),
    ] = ""
    policy: Policy = Policy()
    shared: SharedData | None = None
    small: Annotated[Small | None, Doc("joint inference: a small model that is asked first")] = None
    stages: Annotated[
        tuple[StageAt, ...], Limits(max_items=64), Doc("task split: the segments are these stages of a skill")
    ] = ()
    parts: Annotated[
        tuple[StagePart, ...], Limits(max_items=128), Doc("task split: the models and assets of the stages")
    ] = ()
    verdicts: Annotated[tuple[Verdict, ...], Limits(max_items=64)] = ()
    format: Literal["split/v1"] = "split/v1"

    def __post_init__(self) -> None:
        names = [cut.name for cut in self.cuts]
        if len(set(names)) != len(names) or "local" not in names or "input" not in names:
            raise FormatError(
                f"the cuts are {', '.join(names)}: each name once, and 'local' and 'input' must be among them"
            )
        for cut in self.cuts:
            expected = {"local": len(self.segments), "input": 0}.get(cut.name, cut.after)
            if cut.after != expected or not 0 <= cut.after <= len(self.segments):
                raise FormatError(
                    f"cut {cut.name} is after segment {cut.after}, the plan has {len(self.segments)} segments"
                )
            if cut.name not in ("local", "input") and not (0 < cut.after < len(self.segments)):
                raise FormatError(f"cut {cut.name} is after segment {cut.after}: use 'input' or 'local' for the ends")
        for named, what in ((self.min_cut, "min_cut"), (self.policy.pin, "policy.pin")):
            if named is not None and named not in names:
                raise FormatError(f"{what} is {named}, the cuts are {', '.join(names)}")
        for path in self.files():
            check_path(path)
        self._check_flow()
        self._check_replies()

    def _check_flow(self) -> None:
        known = {tensor.name for tensor in self.inputs}
        for segment in self.segments:
            missing = set(segment.inputs) - known
            if missing:
                raise FormatError(f"segment {segment.file} needs {min(missing)!r}, which nothing before it gives")
            known |= set(segment.outputs)
        absent = {tensor.name for tensor in self.outputs} - known
        if absent:
            raise FormatError(f"no segment gives the output {min(absent)!r}")

    def _check_replies(self) -> None:
        names = [reply.name for reply in self.replies]
        for reply in self.replies:
            if reply.kind in IMAGE_KINDS or names.count(reply.name) > 1:
                raise FormatError(f"the replies are {', '.join(names)}: each name once, and none is for pictures")
            if reply.kind in CODED_KINDS and not len(reply.scales) == len(reply.zeros) == len(self.outputs):
                raise FormatError(
                    f"the model has {len(self.outputs)} outputs, the reply {reply.name} {len(reply.scales)} scales"
                )
        for cut in self.cuts:
            for coding in cut.codings:
                if coding.reply and coding.reply not in names:
                    raise FormatError(
                        f"cut {cut.name}: the coding {coding.name} has the reply {coding.reply!r}, "
                        f"the plan's replies are {', '.join(names) or 'none: leave it out'}"
                    )

    def files(self) -> Iterator[str]:
        """Yield the paths of all other files, each once, relative to split.yaml."""
        pieces: tuple[Segment | StagePart, ...] = (*self.segments, *self.parts)
        yield from dict.fromkeys(one.file for one in pieces)
        if self.shared is not None:
            yield self.shared.file
        if self.small is not None:
            yield self.small.file

    def cut(self, name: str) -> Cut:
        """Return the cut of that name.

        Raises:
            FormatError: the plan has none.
        """
        for cut in self.cuts:
            if cut.name == name:
                return cut
        raise FormatError(f"the plan has no cut {name!r}, it has {', '.join(cut.name for cut in self.cuts)}")


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """What the device knows of its link now."""

    mbit: float
    rtt_ms: float
    up: bool = True
    cold: bool = False  # nothing was sent for a while: TCP starts slowly again
    queue_ms: float = 0.0  # waiting time at the tail


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """A cut, the coding that goes over the wire (None: nothing does), the predicted milliseconds to the answer.

    `reply` is the coding that the answer comes back in; None: raw.
    """

    cut: Cut
    coding: Coding | None
    ms: float
    reply: Coding | None = None


def load_plan(text: str, source: str = "split.yaml") -> Plan:
    """Check the text of a `split.yaml`.

    Raises:
        FormatError: what is wrong, with the line.
    """
    if len(text) > MAX_PLAN_BYTES:
        raise FormatError(f"{source} has {len(text)} characters, the limit is {MAX_PLAN_BYTES}")
    return decode_yaml(Plan, text, source)


def plan_hash(plan: Plan) -> str:
    """Return 16 hexadecimal digits over all that the two sides must agree on: segments, cuts, tensors, codes.

    Costs, policy and verdicts are left out, so a person may pin a cut without a new tail.
    """
    cuts = [
        {
            "name": cut.name,
            "after": cut.after,
            "tensors": cut.tensors,
            "codings": [(c.kind, c.quality, c.scales, c.zeros) for c in cut.codings],
        }
        for cut in plan.cuts
    ]
    files = [segment.sha256 for segment in plan.segments] + ([plan.shared.sha256] if plan.shared else [])
    core = {"format": plan.format, "files": files, "inputs": plan.inputs, "outputs": plan.outputs, "cuts": cuts}
    if plan.stages:  # what a tail is to run: which function of which file, with which model, and what it may hand on
        core["code"] = [segment.file for segment in plan.segments]
        core["stages"] = [(stage.name, stage.model, stage.message) for stage in plan.stages]
        core["parts"] = [(part.file, part.sha256) for part in plan.parts]
    if plan.replies:
        core["replies"] = [(c.kind, c.scales, c.zeros) for c in plan.replies]
    return hashlib.sha256(encode_json(core)).hexdigest()[:16]


def parse_link(text: str) -> Link:
    """Read a link as people write it: `20mbit/30ms`.

    Raises:
        UsageError: what was found and what was expected.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(k|m|g)bit/(?:s/)?(\d+(?:\.\d+)?)\s*ms", text.strip().lower())
    if not found:
        raise UsageError(
            f"the link {text!r} is not understood: write it like 20mbit/30ms (uplink rate / round-trip time)"
        )
    mbit = float(found[1]) * {"k": 0.001, "m": 1.0, "g": 1000.0}[found[2]]
    if not 0.001 <= mbit <= 1e6 or float(found[3]) > 60_000:
        raise UsageError(f"the link {text!r} is out of range: 1kbit to 1000gbit, at most 60000ms")
    return Link(mbit, float(found[3]))


def slow_start_ms(size: int, mbit: float, rtt_ms: float) -> float:
    """Return what a cold TCP connection adds: one round trip per doubling of the window, less what it sends meanwhile.

    It over-estimates payloads above the bandwidth-delay product (docs/splitting.md).
    """
    window, sent, lost = INITIAL_WINDOW_BYTES, 0, 0.0
    while sent + window < size:
        stall = rtt_ms - window * 8 / (mbit * 1000)
        if stall <= 0:
            break
        lost += stall
        sent += window
        window *= 2
    return lost


def reply_ms(raw_bytes: int, reply: Coding | None, mbit: float, alpha: float = 1.0) -> float:
    """Return what an answer of `raw_bytes` costs on its way back, raw (None) or in a coding, on a link of `mbit`.

    Without its share of the round trip; `alpha` is how much slower the device decodes now than when it was measured.
    """
    if reply is None:
        return raw_bytes * 8 / (mbit * 1000)
    return (reply.bytes_p50 + CODED_REPLY_BYTES) * 8 / (mbit * 1000) + reply.encode_ms + reply.decode_ms * alpha


def predict(plan: Plan, cut: Cut, coding: Coding | None, estimate: Estimate, alpha: float = 1.0) -> Choice:
    """Return an option with its milliseconds from input to answer, and the reply that is best for it.

    T = H + E + RTT + 8(S+600)/B + slow start + queue + G + K + reply + overhead, where the reply costs 8R/B raw or
    8(R+42)/B + encoding + decoding. `alpha` is how much slower the device runs now than when it was measured.
    """
    head = cut.device_ms.p50 * alpha
    if coding is None:
        return Choice(cut, None, head)
    back, reply = reply_ms(plan.reply_bytes, None, estimate.mbit), None
    for named in plan.replies if coding.reply else ():
        if named.name == coding.reply:
            coded = reply_ms(plan.reply_bytes, named, estimate.mbit, alpha)
            fewer = plan.policy.minimize == "bytes" and named.bytes_p50 + CODED_REPLY_BYTES < plan.reply_bytes
            if coded < back or fewer:
                back, reply = coded, named
    transfer = (coding.bytes_p50 + CALL_BYTES) * 8 / (estimate.mbit * 1000)
    cold = slow_start_ms(coding.bytes_p50, estimate.mbit, estimate.rtt_ms) if estimate.cold else 0.0
    tail = coding.decode_ms + cut.tail_ms.p50 + estimate.queue_ms
    there = head + coding.encode_ms * alpha + estimate.rtt_ms + transfer + cold + tail
    return Choice(cut, coding, there + back + plan.policy.overhead_ms, reply)


def predict_ms(plan: Plan, cut: Cut, coding: Coding | None, estimate: Estimate, alpha: float = 1.0) -> float:
    """Return the milliseconds that `predict` foresees."""
    return predict(plan, cut, coding, estimate, alpha).ms


def moved_bytes(plan: Plan, choice: Choice) -> int:
    """Return the bytes of tensors that an option moves over the link, there and back (median)."""
    if choice.coding is None:
        return 0
    return choice.coding.bytes_p50 + (choice.reply.bytes_p50 if choice.reply else plan.reply_bytes)


def admitted(plan: Plan, private: bool | None = None) -> Iterator[tuple[Cut, Coding | None]]:
    """Yield every (cut, coding) that accuracy and privacy allow; `local` comes first."""
    private = plan.private if private is None else private or plan.private
    yield plan.cut("local"), None
    least = plan.cut(plan.min_cut).after if private and plan.min_cut else 0
    for cut in plan.cuts:
        if cut.name == "local" or not fits(plan, cut) or (private and not keeps_private(cut, least)):
            continue
        for coding in cut.codings:
            if coding.admitted:
                yield cut, coding


def keeps_private(cut: Cut, least: int = 0) -> bool:
    """Return whether a cut may be used where the input must not leave: an audit that is there must have said `private`."""
    audited = cut.leak is None or cut.leak.verdict == "private"
    return audited and not cut.raw and cut.name != "input" and cut.after >= least


def fits(plan: Plan, cut: Cut) -> bool:
    """Return whether the device has the memory for its side of a cut."""
    return plan.memory_mb is None or cut.memory_mb <= plan.memory_mb


def resident(plan: Plan) -> int:
    """Return how many segments the device keeps loaded: all, or where they do not fit, what the largest cut that does needs."""
    if fits(plan, plan.cut("local")):
        return len(plan.segments)
    return max((cut.after for cut in plan.cuts if cut.name != "local" and fits(plan, cut)), default=0)


def choose_cut(plan: Plan, estimate: Estimate, *, alpha: float = 1.0, private: bool | None = None) -> Choice:
    """Return the best allowed cut for one request; the first one wins a tie, and a link that is down means `local`.

    With `minimize: bytes` the fewest bytes within `slo_ms` win, and the fastest answer where none is.
    """
    choices = [
        predict(plan, cut, coding, estimate, alpha)
        for cut, coding in admitted(plan, private)
        if coding is None or estimate.up
    ]
    if len(choices) > 1 and not fits(plan, choices[0].cut):
        del choices[0]  # staying local would need more memory than there is
    if plan.policy.pin is not None:
        choices = [choice for choice in choices if choice.cut.name == plan.policy.pin] or choices[:1]
    slo_ms = plan.policy.slo_ms
    if plan.policy.minimize == "bytes" and slo_ms is not None:
        in_time = [choice for choice in choices if choice.ms <= slo_ms]
        if in_time:
            return min(in_time, key=lambda choice: (moved_bytes(plan, choice), choice.ms))
    return min(choices, key=lambda choice: choice.ms)


def _gain(plan: Plan, best: Choice, current: Choice) -> float:
    """Return the share by which `best` is better than `current` in what the plan minimizes; infinity: `current` is too late."""
    slo_ms, moved = plan.policy.slo_ms, moved_bytes(plan, current)
    if plan.policy.minimize == "bytes" and slo_ms is not None and best.ms <= slo_ms:
        if current.ms > slo_ms:
            return math.inf
        if moved != moved_bytes(plan, best):
            return 1 - moved_bytes(plan, best) / moved if moved else 0.0
    return 1 - best.ms / current.ms if current.ms > 0 else 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Held:
    """The choice in use, since when, and how often in a row another one looked better."""

    choice: Choice
    since_s: float
    better: int = 0


def settle(plan: Plan, held: Held | None, best: Choice, estimate: Estimate, now_s: float, alpha: float = 1.0) -> Held:
    """Hold on to a choice unless the gain is clear: hysteresis and dwell against flapping. A link that is down counts at once."""
    if held is None or plan.policy.pin is not None or (best.coding is None and not estimate.up):
        same = held is not None and held.choice.coding is None
        return Held(best, held.since_s if held is not None and same else now_s)
    current = predict(plan, held.choice.cut, held.choice.coding, estimate, alpha)
    if (best.cut.name, best.coding) == (current.cut.name, current.coding):
        return Held(current, held.since_s)
    gain = _gain(plan, best, current)
    better = held.better + 1 if gain > plan.policy.gain else 0
    clear = gain > plan.policy.gain_at_once or better >= plan.policy.streak
    if clear and now_s - held.since_s >= plan.policy.dwell_s:
        return Held(best, now_s)
    return Held(current, held.since_s, better)
