"""Operators that fold dimensions away or run along one: sums, means, extremes, running sums, the largest k."""

from collections.abc import Callable
from typing import Any

import torch

from compress.operators.site import Builder, Compute, Site


def _reduce(function: Callable[[Any, tuple[int, ...], bool], Any]) -> Builder:
    def build(site: Site) -> Compute:
        axes, keep = site.numbers(1, "axes"), bool(site.fact("keepdims", 1))
        nothing = bool(site.fact("noop_with_empty_axes", 0))

        def compute(*args: Any) -> Any:
            over = axes(args)
            if not over:
                if nothing:
                    return args[0]
                over = range(args[0].ndim)
            return function(args[0], tuple(over), keep)

        return compute

    return build


def _product(x: Any, axes: tuple[int, ...], keep: bool) -> Any:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _extreme_at(function: Callable[..., Any]) -> Builder:
    def build(site: Site) -> Compute:
        axis, keep = site.fact("axis", 0), bool(site.fact("keepdims", 1))
        if site.fact("select_last_index", 0):
            raise site.refusal("select_last_index is not supported")
        return lambda x: function(x, axis, keepdim=keep)

    return build


def _top_k(site: Site) -> Compute:
    count, axis = site.numbers(1, "k"), site.fact("axis", -1)
    largest, ordered = bool(site.fact("largest", 1)), bool(site.fact("sorted", 1))
    return lambda *args: tuple(torch.topk(args[0], count(args)[0], axis, largest, ordered))


def _running_sum(site: Site) -> Compute:
    along, exclusive, reverse = site.numbers(1), bool(site.fact("exclusive", 0)), bool(site.fact("reverse", 0))

    def compute(*args: Any) -> Any:
        (axis,) = along(args)
        x = args[0].flip(axis) if reverse else args[0]
        made = x.cumsum(axis, dtype=x.dtype)
        if exclusive:
            made = made - x
        return made.flip(axis) if reverse else made

    return compute


REDUCTIONS: dict[str, Builder] = {
    "ReduceMean": _reduce(torch.mean), "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axes, keep, dtype=x.dtype)),
    "ReduceMax": _reduce(torch.amax), "ReduceMin": _reduce(torch.amin), "ReduceProd": _reduce(_product),
    "ReduceL1": _reduce(lambda x, axes, keep: x.abs().sum(axes, keep)),
    "ReduceL2": _reduce(lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep)),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: (x * x).sum(axes, keep)),
    "ReduceLogSumExp": _reduce(torch.logsumexp),
    "ReduceLogSum": _reduce(lambda x, axes, keep: x.sum(axes, keep).log()),
    "ArgMax": _extreme_at(torch.argmax), "ArgMin": _extreme_at(torch.argmin),
    "TopK": _top_k, "CumSum": _running_sum,
}  # fmt: skip
