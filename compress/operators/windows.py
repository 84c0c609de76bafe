"""Sliding windows: what pooling and convolution have in common, and pooling itself.

Sources: the ONNX operator specification for shapes and padding; onnxruntime where the specification leaves a choice.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as nnf

from compress.operators.site import Builder, Compute, Site

MAX_POOL = (nnf.max_pool1d, nnf.max_pool2d, nnf.max_pool3d)
AVERAGE_POOL = (nnf.avg_pool1d, nnf.avg_pool2d, nnf.avg_pool3d)


class Windows:
    """Kernel, strides, dilations and padding of one node, for `dims` spatial dimensions."""

    def __init__(self, site: Site, kernel: Sequence[int]) -> None:
        dims = len(kernel)
        self.kernel = tuple(kernel)
        self.strides = tuple(site.fact("strides", [1] * dims))
        self.dilations = tuple(site.fact("dilations", [1] * dims))
        self.auto = site.fact("auto_pad", "NOTSET")
        self.spans = tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilations, strict=True))
        pads = site.fact("pads", [0] * 2 * dims) if self.auto in ("NOTSET", "") else [0] * 2 * dims
        self.pads = list(zip(pads[:dims], pads[dims:], strict=True))

    def padding(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """Return (before, after) of each spatial dimension for an input of these spatial sizes."""
        if not self.auto.startswith("SAME"):
            return self.pads
        found = []
        for size, stride, span in zip(sizes, self.strides, self.spans, strict=True):
            total = max(0, (math.ceil(size / stride) - 1) * stride + span - size)
            small, large = total // 2, total - total // 2
            found.append((small, large) if self.auto == "SAME_UPPER" else (large, small))
        return found

    def overhang(self, sizes: Sequence[int], pads: Sequence[tuple[int, int]]) -> list[int]:
        """Return how far the last window of ceil mode reaches past the padded input, in each dimension."""
        found = []
        for size, (before, after), stride, span in zip(sizes, pads, self.strides, self.spans, strict=True):
            steps = math.ceil((size + before + after - span) / stride)
            if steps * stride >= size + before:  # a window must begin inside the picture
                steps -= 1
            found.append(max(0, steps * stride + span - (size + before + after)))
        return found


def as_torch(pads: Sequence[tuple[int, int]]) -> list[int]:
    """Return paddings in the order of `torch.nn.functional.pad`: last dimension first."""
    return [side for pair in reversed(pads) for side in pair]


def symmetric(pads: Sequence[tuple[int, int]]) -> tuple[int, ...] | None:
    """Return one padding for both sides of each dimension, or None where the sides differ."""
    return tuple(before for before, _ in pads) if all(before == after for before, after in pads) else None


def _max_pool(site: Site) -> Compute:
    site.one_output()
    windows, ceil = Windows(site, site.fact("kernel_shape")), bool(site.fact("ceil_mode", 0))
    pool = MAX_POOL[len(windows.kernel) - 1]

    def compute(x: Any) -> Any:
        sizes = x.shape[2:]
        pads = windows.padding(sizes)
        even = symmetric(pads)
        if ceil or even is None or any(2 * p > k for p, k in zip(even, windows.kernel, strict=True)):
            extra = windows.overhang(sizes, pads) if ceil else [0] * len(pads)
            pads = [(before, after + more) for (before, after), more in zip(pads, extra, strict=True)]
            x, even = nnf.pad(x, as_torch(pads), value=-math.inf), (0,) * len(pads)
        return pool(x, windows.kernel, windows.strides, even, windows.dilations)

    return compute


def _average_pool(site: Site) -> Compute:
    windows, ceil = Windows(site, site.fact("kernel_shape")), bool(site.fact("ceil_mode", 0))
    pool, dims = AVERAGE_POOL[len(windows.kernel) - 1], len(windows.kernel)
    counts_pads = bool(site.fact("count_include_pad", 0))
    if any(dilation != 1 for dilation in windows.dilations):
        raise site.refusal("average pooling with dilations is not supported")

    def compute(x: Any) -> Any:
        sizes = x.shape[2:]
        pads = windows.padding(sizes)
        extra = windows.overhang(sizes, pads) if ceil else [0] * dims
        even = symmetric(pads)
        if even is not None and not any(extra) and all(2 * p <= k for p, k in zip(even, windows.kernel, strict=True)):
            return pool(x, windows.kernel, windows.strides, even, count_include_pad=counts_pads)
        counted = torch.ones((1, 1, *sizes), dtype=x.dtype, device=x.device)
        counted = nnf.pad(counted, as_torch(pads), value=float(counts_pads))
        x = nnf.pad(x, as_torch(pads))
        over = as_torch([(0, more) for more in extra])
        share = pool(nnf.pad(counted, over), windows.kernel, windows.strides)
        return pool(nnf.pad(x, over), windows.kernel, windows.strides) / share

    return compute


def _global_average(_site: Site) -> Compute:
    return lambda x: x.mean(tuple(range(2, x.ndim)), keepdim=True)


def _global_max(_site: Site) -> Compute:
    return lambda x: x.amax(tuple(range(2, x.ndim)), keepdim=True)


POOLS: dict[str, Builder] = {
    "MaxPool": _max_pool, "AveragePool": _average_pool, "GlobalAveragePool": _global_average,
    "GlobalMaxPool": _global_max,
}  # fmt: skip
