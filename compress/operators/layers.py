"""Operators that carry weights: convolution, matrix products, normalization."""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as nnf

from compress.operators.site import Builder, Compute, Site
from compress.operators.windows import Windows, as_torch, symmetric

CONV = (nnf.conv1d, nnf.conv2d, nnf.conv3d)
CONV_TRANSPOSE = (nnf.conv_transpose1d, nnf.conv_transpose2d, nnf.conv_transpose3d)


def _conv(site: Site) -> Compute:
    groups, windows_of = site.fact("group", 1), functools.cache(functools.partial(Windows, site))

    def compute(x: Any, weight: Any, bias: Any = None) -> Any:
        windows = windows_of(weight.shape[2:])
        pads = windows.padding(x.shape[2:])
        even = symmetric(pads)
        if even is None:
            x, even = nnf.pad(x, as_torch(pads)), (0,) * len(pads)
        conv = CONV[x.ndim - 3]
        return conv(x, weight, bias, windows.strides, even, windows.dilations, groups)

    return compute


def _conv_transpose(site: Site) -> Compute:
    groups, wanted = site.fact("group", 1), site.fact("output_shape")
    windows_of = functools.cache(functools.partial(Windows, site))

    def compute(x: Any, weight: Any, bias: Any = None) -> Any:
        windows, dims = windows_of(weight.shape[2:]), x.ndim - 2
        more = site.fact("output_padding", [0] * dims)
        pads = list(windows.pads)
        if wanted or windows.auto.startswith("SAME"):
            pads = []
            sizes = wanted[-dims:] if wanted else [n * s for n, s in zip(x.shape[2:], windows.strides, strict=True)]
            for at, size in enumerate(sizes):
                total = windows.strides[at] * (x.shape[2 + at] - 1) + more[at] + windows.spans[at] - size
                half = total // 2
                pads.append((half, total - half) if windows.auto == "SAME_UPPER" else (total - half, half))
        even = symmetric(pads)
        direct = even is not None and min(even) >= 0
        made = CONV_TRANSPOSE[dims - 1](
            x, weight, bias, windows.strides, even if direct else 0, more, groups, windows.dilations
        )
        return made if direct else nnf.pad(made, [-side for side in as_torch(pads)])

    return compute


def _gemm(site: Site) -> Compute:
    alpha, beta = site.fact("alpha", 1.0), site.fact("beta", 1.0)
    flip_a, flip_b = bool(site.fact("transA", 0)), bool(site.fact("transB", 0))
    plain = alpha == beta == 1.0 and flip_b and not flip_a

    def compute(a: Any, b: Any, c: Any = None) -> Any:
        if plain and (c is None or c.ndim == 1):
            return nnf.linear(a, b, c)
        a, b = a.t() if flip_a else a, b.t() if flip_b else b
        return alpha * (a @ b) if c is None else torch.addmm(c, a, b, beta=beta, alpha=alpha)

    return compute


def _batch_norm(site: Site) -> Compute:
    site.one_output()
    epsilon = site.fact("epsilon", 1e-5)
    return lambda x, scale, shift, mean, variance: nnf.batch_norm(x, mean, variance, scale, shift, eps=epsilon)


def _instance_norm(site: Site) -> Compute:
    epsilon = site.fact("epsilon", 1e-5)
    return lambda x, scale, shift: nnf.group_norm(x, x.shape[1], scale, shift, epsilon)


def _group_norm(site: Site) -> Compute:
    epsilon, groups, per_group = site.fact("epsilon", 1e-5), site.fact("num_groups"), site.opset < 21

    def compute(x: Any, scale: Any, shift: Any) -> Any:
        if per_group:
            times = x.shape[1] // groups
            scale, shift = scale.repeat_interleave(times), shift.repeat_interleave(times)
        return nnf.group_norm(x, groups, scale, shift, epsilon)

    return compute


def _layer_norm(site: Site) -> Compute:
    site.one_output()
    axis, epsilon = site.fact("axis", -1), site.fact("epsilon", 1e-5)

    def compute(x: Any, scale: Any, shift: Any = None) -> Any:
        over = x.shape[axis:]
        if scale.shape == over and (shift is None or shift.shape == over):
            return nnf.layer_norm(x, over, scale, shift, epsilon)
        made = nnf.layer_norm(x, over, eps=epsilon) * scale
        return made if shift is None else made + shift

    return compute


def _local_response(site: Site) -> Compute:
    size, alpha, beta, bias = (
        site.fact(n, d) for n, d in (("size", 1), ("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0))
    )
    before = (size - 1) // 2

    def compute(x: Any) -> Any:
        squares = nnf.pad((x * x).flatten(2).transpose(1, 2), (before, size - 1 - before))
        mean = nnf.avg_pool1d(squares, size, 1).transpose(1, 2).reshape(x.shape)
        return x / (bias + alpha * mean) ** beta

    return compute


def _lp_norm(site: Site) -> Compute:
    axis, power = site.fact("axis", -1), site.fact("p", 2)
    return lambda x: nnf.normalize(x, power, axis, eps=math.ulp(0.0))


LAYERS: dict[str, Builder] = {
    "Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm, "MatMul": lambda _site: torch.matmul,
    "BatchNormalization": _batch_norm, "InstanceNormalization": _instance_norm, "GroupNormalization": _group_norm,
    "LayerNormalization": _layer_norm, "LRN": _local_response, "LpNormalization": _lp_norm,
}  # fmt: skip
