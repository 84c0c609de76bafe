"""Resize and Upsample: one dimension after the other, each output value a weighted sum of a few input values."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from compress.graph import Array
from compress.operators.site import Builder, Compute, Site

NEAREST: dict[str, Callable[[Array], Array]] = {
    "floor": np.floor, "ceil": np.ceil,
    "round_prefer_floor": lambda at: np.ceil(at - np.float32(0.5)),
    "round_prefer_ceil": lambda at: np.floor(at + np.float32(0.5)),
}  # fmt: skip
COORDINATES = ("half_pixel", "asymmetric", "pytorch_half_pixel", "align_corners", "half_pixel_symmetric")


def _resize(site: Site) -> Compute:
    old = site.opset < 11
    mode, where = site.fact("mode", "nearest"), site.fact("coordinate_transformation_mode", "half_pixel")
    nearest = site.fact("nearest_mode", "round_prefer_floor")
    if old:
        where, nearest = "asymmetric", "floor"
    refused = {"antialias": 0, "exclude_outside": 0, "keep_aspect_ratio_policy": "stretch"}
    wrong = [name for name, usual in refused.items() if site.fact(name, usual) != usual]
    if wrong or where not in COORDINATES or nearest not in NEAREST or mode not in ("nearest", "linear", "cubic"):
        raise site.refusal(f"{wrong[0] if wrong else f'{mode}, {where}, {nearest}'} is not supported")
    scales, sizes = site.numbers(1 if old else 2, "scales"), site.numbers(3)
    chosen, cubic = site.fact("axes"), site.fact("cubic_coeff_a", -0.75)

    def compute(*args: Any) -> Any:
        x = args[0]
        axes = chosen or range(x.ndim)
        for at, axis in enumerate(axes):
            size, factors = x.shape[axis], scales(args)
            factor = factors[at] if factors else sizes(args)[at] / size
            made = int(np.float32(size) * np.float32(factor)) if factors else sizes(args)[at]
            if made != size or factor != 1:
                x = _along(x, axis, _taps(size, made, factor, mode, where, nearest, cubic))
        return x

    return compute


def _along(x: Any, axis: int, taps: tuple[tuple[Array, Array], ...]) -> Any:
    if len(taps) == 1:
        return x.index_select(axis, torch.as_tensor(taps[0][0], device=x.device))
    shape = [-1 if at == axis % x.ndim else 1 for at in range(x.ndim)]
    parts = [
        x.index_select(axis, torch.as_tensor(index, device=x.device))
        * torch.as_tensor(weight, dtype=x.dtype, device=x.device).reshape(shape)
        for index, weight in taps
    ]
    return functools.reduce(torch.add, parts)


@functools.lru_cache(maxsize=256)
def _taps(
    size: int, made: int, factor: float, mode: str, where: str, nearest: str, cubic: float
) -> tuple[tuple[Array, Array], ...]:
    """Return (which input, its weight) for every output of one dimension, once per value that is summed up."""
    at = _coordinates(size, made, np.float32(factor), where)
    if mode == "nearest":
        return ((np.clip(NEAREST[nearest](at), 0, size - 1).astype(np.int64), np.ones(0)),)
    if mode == "linear":
        at = np.clip(at, 0, size - 1)
    first = np.floor(at).astype(np.int64)
    past = at - first
    weights = {0: 1 - past, 1: past}
    if mode == "cubic":
        weights = {step: _keys(np.abs(past - step), cubic) for step in (-1, 0, 1, 2)}
    return tuple((np.clip(first + step, 0, size - 1), weight.astype(np.float32)) for step, weight in weights.items())


def _coordinates(size: int, made: int, factor: np.float32, where: str) -> Array:
    """Return where in the input each output lies; float32, as onnxruntime computes it, for the same rounding."""
    out, half = np.arange(made, dtype=np.float32), np.float32(0.5)
    match where:
        case "asymmetric":
            return np.asarray(out / factor)
        case "align_corners":
            return np.asarray(out * np.float32((size - 1) / max(1, made - 1)))
        case "pytorch_half_pixel" if made == 1:
            return np.zeros(1, np.float32)
        case "half_pixel_symmetric":
            offset = np.float32(size / 2 * (1 - made / (size * factor)))
            return np.asarray(offset + (out + half) / factor - half, np.float32)
        case _:
            return np.asarray((out + half) / factor - half)


def _keys(distance: Array, a: float) -> Array:
    """Return the weights of cubic convolution (Keys, 1981)."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, far)


RESIZE: dict[str, Builder] = {"Resize": _resize, "Upsample": _resize}
