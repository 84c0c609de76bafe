"""What a controller has a device measure for a split plan, and what the device answers. Pure.

The order is small and sealed with the director's key, as an assignment is. It names the *work* by its hash, and the work
names the segments and samples: all of them travel as the chunks of any other object do.
"""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Literal

from skills.bundle import Part
from skills.coding import Coding, Live, TensorName
from skills.desired import ObjectRef, open_payload, seal_payload
from skills.errors import FormatError, TrustError
from skills.report import Sha256
from skills.split_plan import Millis
from skills.wire import Limits, decode_json, encode_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MAX_ORDER_BYTES = 4 << 10
MAX_WORK_BYTES = 8 << 20
MAX_FIGURES_BYTES = 64 << 10
PREFIX = b"skerry measure/v1\n"
RUNTIME = "onnxruntime"
PROFILE_INSTEAD = "a profile with its slowdown and memory_mb (--device FILE) is planned for without measuring"

Path = Annotated[str, Limits(min=1, max_items=255)]
State = Literal["fetching", "measuring", "done"]


@dataclasses.dataclass(frozen=True, slots=True)
class Order:
    """One device is to measure one work; `work` is the object that says what."""

    device: str
    work: ObjectRef
    format: Literal["measure/v1"] = "measure/v1"


@dataclasses.dataclass(frozen=True, slots=True)
class Crossing:
    """The tensors behind the first `after` segments, and the codings that are to be timed on them."""

    after: Annotated[int, Limits(min=0, max=64)]
    tensors: Annotated[tuple[Live, ...], Limits(min=1, max_items=64)]
    codings: Annotated[tuple[Coding, ...], Limits(max_items=16)]


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """Segments to run and codings to write, on samples; `number` is random, so that no work is taken for an earlier one.

    `samples` is the path of an .npz whose arrays arr_0, arr_1, … belong to `inputs`, one sample a row.
    """

    number: Annotated[str, Limits(min=8, max_items=64)]
    parts: Annotated[tuple[Part, ...], Limits(min=2, max_items=80)]
    segments: Annotated[tuple[Path, ...], Limits(min=1, max_items=64)]
    inputs: Annotated[tuple[TensorName, ...], Limits(min=1, max_items=32)]
    outputs: Annotated[tuple[TensorName, ...], Limits(min=1, max_items=32)]
    samples: Path
    crossings: Annotated[tuple[Crossing, ...], Limits(max_items=64)]
    rounds: Annotated[int, Limits(min=1, max=1000)]
    format: Literal["work/v1"] = "work/v1"

    def __post_init__(self) -> None:
        paths = [part.path for part in self.parts]
        if len(set(paths)) != len(paths):
            raise FormatError("two parts have the same path")
        if missing := sorted({*self.segments, self.samples} - set(paths)):
            raise FormatError(f"the work lacks the part {missing[0]}")
        if any(crossing.after > len(self.segments) for crossing in self.crossings):
            raise FormatError(f"a crossing lies behind the last of {len(self.segments)} segments")

    @property
    def objects(self) -> frozenset[str]:
        """Return what a device fetches for it, by SHA-256 of the wire form."""
        return frozenset(part.wire_sha256 for part in self.parts)

    @property
    def model_bytes(self) -> int:
        """Bytes of the segments and their shared constants: the least memory that running them takes."""
        return sum(part.size for part in self.parts if part.path != self.samples)


@dataclasses.dataclass(frozen=True, slots=True)
class Figures:
    """What a device measured: `heads` by number of segments (0 to all), `encode_ms` by crossing and coding of the work.

    `memory_mb` is the most that the first 1, 2, … segments took, in MiB above the bare runtime; `busy` the share of the
    measured time that something else had the processor.
    """

    work: Sha256
    heads: Annotated[tuple[Millis, ...], Limits(min=2, max_items=65)]
    encode_ms: Annotated[tuple[tuple[Annotated[float, Limits(min=0)], ...], ...], Limits(max_items=64)]
    memory_mb: Annotated[tuple[Annotated[float, Limits(min=0)], ...], Limits(max_items=64)]
    rounds: Annotated[int, Limits(min=1)]
    busy: Annotated[float, Limits(min=0, max=1)]
    cores: Annotated[int, Limits(min=1)]
    machine: Annotated[str, Limits(max_items=200)]
    arch: Annotated[str, Limits(max_items=50)]
    runtime: Annotated[str, Limits(max_items=50)]
    agent: Annotated[str, Limits(max_items=50)]
    format: Literal["figures/v1"] = "figures/v1"

    def check(self, sha256: str, work: Work) -> None:
        """Hold the figures against the work that they are said to answer.

        Raises:
            FormatError: another work, or other counts than it has.
        """
        asked = [len(crossing.codings) for crossing in work.crossings]
        if self.work != sha256 or len(self.heads) != len(work.segments) + 1:
            raise FormatError(f"the device measured something else than the work {sha256[:12]}…")
        if [len(row) for row in self.encode_ms] != asked or len(self.memory_mb) != len(work.segments):
            raise FormatError("the device answered with other counts of codings or segments than it was asked for")


def seal_order(order: Order, director: "Ed25519PrivateKey") -> bytes:
    """Sign an order; the result is what travels."""
    return seal_payload(PREFIX, encode_json(order), director)


def open_order(data: bytes, director_pem: bytes, device: str) -> Order:
    """Check who sealed an order and for whom.

    Raises:
        FormatError: not a sealed order at all.
        TrustError: another key, or another device.
    """
    payload = open_payload(PREFIX, data, director_pem, "the order to measure", MAX_ORDER_BYTES)
    order = decode_json(Order, payload, "the order to measure", MAX_ORDER_BYTES)
    if order.device != device:
        raise TrustError(f"the order to measure is for the device '{order.device}', this is '{device}'")
    return order


def read_work(data: bytes) -> Work:
    """Check the bytes of a work.

    Raises:
        FormatError: what is wrong with it.
    """
    return decode_json(Work, data, "the work to measure", MAX_WORK_BYTES)
