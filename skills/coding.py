"""How a tensor is described, and the ways to write it for the wire. Pure; `skills.codec` does the writing."""

import dataclasses
import math
from typing import Annotated, Literal

from skills.errors import FormatError
from skills.manifest import Datatype
from skills.wire import Doc, Limits

CODED_KINDS = ("u8", "u4", "u16", "rice")
TOP = {"u4": 15, "u8": 255, "u16": 65_535, "rice": 65_535}  # the largest code of each affine coding
IMAGE_KINDS = ("pixels", "png", "jpeg")

Positive = Limits(min=1e-9)
TensorName = Annotated[str, Limits(min=1, max_items=512)]
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
