"""What compression decides, as values: the range of each activation, and how each layer computes and is stored."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from compress.graph import Array
from compress.weights import Blocks, Codes, half
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
        """Return scale and zero point for 256 levels; the scale is one that 16 bits hold, where they reach."""
        scale = float(half(np.asarray(max((self.hi - self.lo) / 255, 1e-12), np.float32)))
        zero = min(round(-self.lo / scale), 255)  # a tiny scale may have lost percents of itself in 16 bits
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
    bits: float = 8  # as stored: 8, 4, 3, 2 or TERNARY; 32: as it came

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
        return math.ceil(self.count * self.bits / 8) + scales


@dataclasses.dataclass(frozen=True, slots=True)
class Scheme:
    """A complete answer: `ranges` are the tensors that carry 8-bit codes, `layers` every operator with weights.

    `codes` (node -> codes) holds weights that were rounded with more care than rounding to nearest; they count where
    their width is the layer's. `biases` (node -> float bias) replace the model's. `blocks` (node -> codes) are of linear layers
    that compute in float, weights alone rounded; `bits_before` (node -> bits) is how such a layer was stored when those behind it
    were fitted.
    """

    layers: tuple[Layer, ...]
    ranges: Mapping[str, Range]
    profile: Profile
    codes: Mapping[str, Codes] = dataclasses.field(default_factory=dict)
    biases: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    blocks: Mapping[str, Blocks] = dataclasses.field(default_factory=dict)
    bits_before: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def with_bits(self, bits: Mapping[str, float]) -> "Scheme":
        """Return this scheme with other stored widths for the layers named."""
        layers = tuple(dataclasses.replace(layer, bits=bits.get(layer.node, layer.bits)) for layer in self.layers)
        return dataclasses.replace(self, layers=layers)

    def with_codes(self, codes: Mapping[str, Codes]) -> "Scheme":
        """Return this scheme with these codes for the layers named."""
        return dataclasses.replace(self, codes={**self.codes, **codes})

    def with_biases(self, biases: Mapping[str, Array]) -> "Scheme":
        """Return this scheme with these float biases for the layers named."""
        return dataclasses.replace(self, biases={**self.biases, **biases})

    def layer(self, node: str) -> Layer | None:
        """Return the layer of a node, or None where the node has no trained weights."""
        return next((layer for layer in self.layers if layer.node == node), None)


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A whole model that was tried: its file's bytes, its distance to the original's answers on calibration data, and the
    drop in points to expect from the select part."""

    bytes: int
    distance: float
    drop: float
    scheme: Scheme
