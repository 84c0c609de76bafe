"""What compression decides, as values: the range of each activation, and how each layer computes and is stored."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from skills.profile import Profile

Compute = Literal["int8", "float"]
HEAVY = ("Conv", "Gemm", "MatMul", "ConvTranspose")


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """The interval that an activation is clipped to; it always contains zero, which padding must represent exactly."""

    lo: float
    hi: float

    def __post_init__(self) -> None:
        if not self.lo <= 0 <= self.hi:
            raise ValueError(f"a range must contain zero, got [{self.lo}, {self.hi}]")

    def union(self, other: "Range") -> "Range":
        """Return the smallest range that contains both."""
        return Range(min(self.lo, other.lo), max(self.hi, other.hi))

    def quant(self, activation: Literal["u8", "s8"]) -> tuple[float, int]:
        """Return scale and zero point for 256 levels."""
        scale = max((self.hi - self.lo) / 255, 1e-12)
        zero = round(-self.lo / scale)
        return scale, zero - (128 if activation == "s8" else 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """One operator with trained weights: what it computes in, and in how many bits its weights are stored."""

    node: str
    op: str
    weight: str
    axis: int  # output channels in the weight's shape
    shape: tuple[int, ...]
    groups: int = 1
    compute: Compute = "int8"
    bits: int = 8  # 4 or 8; 32: stored as it came

    @property
    def count(self) -> int:
        """Return how many weights there are."""
        product = 1
        for size in self.shape:
            product *= size
        return product

    @property
    def depthwise(self) -> bool:
        """Return whether each output channel sees one input channel."""
        return self.op == "Conv" and self.groups > 1 and self.shape[1] == 1

    @property
    def stored_bytes(self) -> int:
        """Return the bytes of the weights as stored, with one float scale a channel."""
        scales = 0 if self.bits == 32 else 4 * self.shape[self.axis]
        return (self.count * self.bits + 7) // 8 + scales


@dataclasses.dataclass(frozen=True, slots=True)
class Scheme:
    """A complete answer: `ranges` are the tensors that carry 8-bit codes, `layers` every operator with weights."""

    layers: tuple[Layer, ...]
    ranges: Mapping[str, Range]
    profile: Profile
    correct_bias: bool = False

    def with_bits(self, bits: Mapping[str, int]) -> "Scheme":
        """Return this scheme with other stored widths for the layers named."""
        layers = tuple(dataclasses.replace(layer, bits=bits.get(layer.node, layer.bits)) for layer in self.layers)
        return dataclasses.replace(self, layers=layers)

    def layer(self, node: str) -> Layer | None:
        """Return the layer of a node, or None where the node has no trained weights."""
        return next((layer for layer in self.layers if layer.node == node), None)
