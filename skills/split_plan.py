"""What a split plan is (`split.yaml`). Pure.

A model is cut once into K+1 segments. A cut says how many of them run on the device; the tensors that live on across it
travel, coded, to the tail. `input` (send the compressed input) and `local` (send nothing) stand in every plan.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Annotated, Literal

from skills.coding import CODED_KINDS, IMAGE_KINDS, Coding, Live, TensorName
from skills.errors import FormatError
from skills.manifest import check_path
from skills.network import ASSUMED, Link
from skills.report import Sha256
from skills.wire import Doc, Limits, decode_yaml, encode_json

MAX_PLAN_BYTES = 1 << 20

CutName = Annotated[str, Limits(pattern=r"local|input|c[1-9]\d{0,2}", hint="local, input or c1, c2, …")]


@dataclasses.dataclass(frozen=True, slots=True)
class Millis:
    """Milliseconds: median and 90th percentile of interleaved, warm runs."""

    p50: Annotated[float, Limits(min=0)]
    p90: Annotated[float, Limits(min=0)]


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
    raw_bytes: Annotated[
        int, Limits(min=0), Doc("what its tensors weigh on the data where a size is free; 0: what their sizes say")
    ] = 0

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
    network: Annotated[Link, Doc("assumed until the device has measured its own")] = ASSUMED
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
