"""Operators that move values about without changing them, and those that make shapes and constants."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from onnx import numpy_helper

from compress.operators.site import Builder, Compute, Site


def _reshape(site: Site) -> Compute:
    sizes, keep_zero = site.numbers(1, "shape"), bool(site.fact("allowzero", 0))

    def compute(*args: Any) -> Any:
        x = args[0]
        return x.reshape([x.shape[at] if n == 0 and not keep_zero else n for at, n in enumerate(sizes(args))])

    return compute


def _flatten(site: Site) -> Compute:
    axis = site.fact("axis", 1)

    def compute(x: Any) -> Any:
        return x.reshape(math.prod(x.shape[: axis if axis >= 0 else x.ndim + axis]), -1)

    return compute


def _transpose(site: Site) -> Compute:
    order = site.fact("perm")
    return lambda x: x.permute(order if order is not None else tuple(reversed(range(x.ndim))))


def _squeeze(site: Site) -> Compute:
    axes = site.numbers(1, "axes")

    def compute(*args: Any) -> Any:
        over = axes(args)
        return args[0].squeeze() if over is None else args[0].squeeze(tuple(over))

    return compute


def _unsqueeze(site: Site) -> Compute:
    axes = site.numbers(1, "axes")

    def compute(*args: Any) -> Any:
        x, new = args[0], axes(args)
        for axis in sorted(axis % (x.ndim + len(new)) for axis in new):
            x = x.unsqueeze(axis)
        return x

    return compute


def _concat(site: Site) -> Compute:
    axis = site.fact("axis", 0)
    return lambda *args: torch.cat(args, axis)


def _split(site: Site) -> Compute:
    axis, parts, sizes = site.fact("axis", 0), len(site.node.output), site.numbers(1, "split")

    def compute(*args: Any) -> Any:
        x, wanted = args[0], sizes(args)
        if wanted is None:
            each = math.ceil(x.shape[axis] / parts)
            wanted = [each] * (parts - 1) + [x.shape[axis] - each * (parts - 1)]
        return torch.split(x, wanted, axis)

    return compute


def _slice(site: Site) -> Compute:
    starts, ends, axes, steps = (site.numbers(at, name) for at, name in enumerate(("starts", "ends", "axes", ""), 1))

    def compute(*args: Any) -> Any:
        x, first, last = args[0], starts(args), ends(args)
        over, strides = axes(args) or range(len(first)), steps(args) or [1] * len(first)
        for start, end, axis, step in zip(first, last, over, strides, strict=True):
            begin, stop, _ = slice(start, end, step).indices(x.shape[axis])
            if step < 0:  # torch has no negative step: turn round what lies between, then step forward
                count = len(range(begin, stop, step))
                x = x.narrow(axis, begin + (count - 1) * step if count else 0, (count - 1) * -step + 1 if count else 0)
                x, begin, stop, step = x.flip(axis), 0, x.shape[axis], -step  # noqa: PLW2901 - the same slice, forward
            x = x[(slice(None),) * (axis % x.ndim) + (slice(begin, max(begin, stop), step),)]
        return x

    return compute


def _gather(site: Site) -> Compute:
    axis = site.fact("axis", 0)

    def compute(x: Any, at: Any) -> Any:
        flat = at.reshape(-1)
        flat = torch.where(flat < 0, flat + x.shape[axis], flat)
        made = nnf.embedding(flat, x) if axis == 0 and x.ndim == 2 else x.index_select(axis, flat)
        where = axis % x.ndim
        return made.reshape(x.shape[:where] + at.shape + x.shape[where + 1 :])

    return compute


def _gather_elements(site: Site) -> Compute:
    axis = site.fact("axis", 0)
    return lambda x, at: x.gather(axis, torch.where(at < 0, at + x.shape[axis], at).long())


def _pad(site: Site) -> Compute:
    sides, fill, axes = site.numbers(1, "pads"), site.numbers(2, "value", [0]), site.numbers(3)
    modes = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    mode = modes.get(site.fact("mode", "constant"))
    if mode is None:
        raise site.refusal(f"padding mode '{site.fact('mode')}' is not supported")

    def compute(*args: Any) -> Any:
        x, given = args[0], sides(args)
        over = axes(args) or range(x.ndim)
        pairs = [(0, 0)] * x.ndim
        for at, axis in enumerate(over):
            pairs[axis] = (given[at], given[at + len(over)])
        if mode == "constant":
            return nnf.pad(x, [side for pair in reversed(pairs) for side in pair], value=fill(args)[0])
        for axis, (before, after) in enumerate(pairs):
            if before or after:
                rows = nnf.pad(x.movedim(axis, -1).flatten(0, -2).unsqueeze(0), (before, after), mode=mode).squeeze(0)
                x = rows.reshape(*x.movedim(axis, -1).shape[:-1], -1).movedim(-1, axis)
        return x

    return compute


def _expand(site: Site) -> Compute:
    sizes = site.numbers(1)
    return lambda *args: args[0].expand(torch.broadcast_shapes(args[0].shape, sizes(args)))


def _tile(site: Site) -> Compute:
    times = site.numbers(1)
    return lambda *args: args[0].repeat(times(args))


def _shape(site: Site) -> Compute:
    part = slice(site.fact("start", 0), site.fact("end"))
    return lambda x: torch.tensor(x.shape[part], dtype=torch.int64)


def _constant(site: Site) -> Compute:
    name, value = next(iter(site.facts.items()), ("", None))
    if name not in ("value", "value_int", "value_ints", "value_float", "value_floats"):
        raise site.refusal(f"a constant given as '{name}' is not supported")
    if name == "value":
        array = numpy_helper.to_array(value).copy()
        return lambda: torch.from_numpy(array)
    dtype = torch.float32 if "float" in name else torch.int64
    return lambda: torch.tensor(value, dtype=dtype)


def _constant_of_shape(site: Site) -> Compute:
    sizes, value = site.numbers(0), site.fact("value")
    one = torch.zeros(1) if value is None else torch.from_numpy(numpy_helper.to_array(value).copy())
    number, dtype = one.item(), one.dtype
    return lambda *args: torch.full(sizes(args), number, dtype=dtype)


def _range(site: Site) -> Compute:
    start, stop, step = (site.numbers(at) for at in range(3))
    return lambda *args: torch.arange(start(args)[0], stop(args)[0], step(args)[0], dtype=args[0].dtype)


def _blocks(axes: Sequence[int], *, deep: bool) -> Builder:
    """DepthToSpace (`deep`) and SpaceToDepth: a view with the block split out, permuted, closed again."""

    def build(site: Site) -> Compute:
        size, column_first = site.fact("blocksize"), site.fact("mode", "DCR") == "CRD"
        order = (0, 1, 4, 2, 5, 3) if column_first else axes

        def compute(x: Any) -> Any:
            n, c, h, w = x.shape
            if not deep:
                split = x.reshape(n, c, h // size, size, w // size, size)
                return split.permute(axes).reshape(n, c * size * size, h // size, w // size)
            depth = c // (size * size)
            shape = (n, depth, size, size, h, w) if column_first else (n, size, size, depth, h, w)
            return x.reshape(shape).permute(order).reshape(n, depth, h * size, w * size)

        return compute

    return build


def _einsum(site: Site) -> Compute:
    equation = site.fact("equation")
    return lambda *args: torch.einsum(equation, *args)


def _trilu(site: Site) -> Compute:
    offset, cut = site.numbers(1, default=[0]), torch.triu if site.fact("upper", 1) else torch.tril
    return lambda *args: cut(args[0], offset(args)[0])


def _dropout(site: Site) -> Compute:
    site.one_output()
    return lambda x, *_: x


LAYOUT: dict[str, Builder] = {
    "Reshape": _reshape, "Flatten": _flatten, "Transpose": _transpose, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze,
    "Concat": _concat, "Split": _split, "Slice": _slice, "Gather": _gather, "GatherElements": _gather_elements,
    "Pad": _pad, "Expand": _expand, "Tile": _tile, "Shape": _shape,
    "Size": lambda _site: lambda x: torch.tensor(x.numel(), dtype=torch.int64),
    "Constant": _constant, "ConstantOfShape": _constant_of_shape, "Range": _range,
    "DepthToSpace": _blocks((0, 3, 4, 1, 5, 2), deep=True), "SpaceToDepth": _blocks((0, 3, 5, 1, 2, 4), deep=False),
    "Einsum": _einsum, "Trilu": _trilu, "Dropout": _dropout,
}  # fmt: skip
