"""Operators that work on each value by itself: arithmetic, comparison, activations, casts; and softmax."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as nnf

from compress.operators.site import Builder, Compute, Site

DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip


def _div(a: Any, b: Any) -> Any:
    return torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")


def _pow(a: Any, b: Any) -> Any:
    return torch.pow(a, b).to(a.dtype)


def _mod(site: Site) -> Compute:
    function: Compute = torch.fmod if site.fact("fmod", 0) else torch.remainder
    return function


def _many(pair: Callable[[Any, Any], Any], *, mean: bool = False) -> Builder:
    def compute(*args: Any) -> Any:
        made = functools.reduce(pair, args)
        return made / len(args) if mean else made

    return lambda _site: compute


def _clip(site: Site) -> Compute:
    low, high = site.numbers(1, "min"), site.numbers(2, "max")

    def compute(*args: Any) -> Any:
        least, most = low(args), high(args)
        if least is None and most is None:
            return args[0]
        return args[0].clamp(least[0] if least else None, most[0] if most else None)

    return compute


def _hard_sigmoid(site: Site) -> Compute:
    alpha, beta = site.fact("alpha", 0.2), site.fact("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return nnf.hardsigmoid  # type: ignore[no-any-return]
    return lambda x: (alpha * x + beta).clamp(0.0, 1.0)


def _selu(site: Site) -> Compute:
    alpha, gamma = site.fact("alpha", 1.67326319217681884765625), site.fact("gamma", 1.05070102214813232421875)
    return lambda x: gamma * nnf.elu(x, alpha)


def _gelu(site: Site) -> Compute:
    approximate = site.fact("approximate", "none")
    return lambda x: nnf.gelu(x, approximate=approximate)


def _prelu(x: Any, slope: Any) -> Any:
    return x.clamp(min=0) + slope * x.clamp(max=0)


def _softmax(function: Callable[..., Any]) -> Builder:
    def build(site: Site) -> Compute:
        axis = site.fact("axis", -1 if site.opset >= 13 else 1)
        if site.opset >= 13:
            return lambda x: function(x, axis)
        # Before operator set 13, softmax ran over everything from `axis` on.
        return lambda x: function(x.flatten(axis % x.ndim if axis else 0), -1).reshape(x.shape)

    return build


def _cast(site: Site) -> Compute:
    to = DTYPES.get(site.fact("to"))
    if to is None:
        raise site.refusal(f"it casts to data type {site.fact('to')}, which is not supported")
    return lambda x: x.to(to)


def _plain(function: Callable[..., Any]) -> Builder:
    return lambda _site: function


def _with(function: Callable[..., Any], name: str, default: float) -> Builder:
    """An activation with one number of its own."""

    def build(site: Site) -> Compute:
        value = site.fact(name, default)
        return lambda x: function(x, value)

    return build


ELEMENTWISE: dict[str, Builder] = {
    "Add": _plain(torch.add), "Sub": _plain(torch.sub), "Mul": _plain(torch.mul), "Div": _plain(_div),
    "Pow": _plain(_pow), "Mod": _mod, "Min": _many(torch.minimum), "Max": _many(torch.maximum),
    "Sum": _many(torch.add), "Mean": _many(torch.add, mean=True),
    "Neg": _plain(torch.neg), "Abs": _plain(torch.abs), "Sqrt": _plain(torch.sqrt), "Exp": _plain(torch.exp),
    "Log": _plain(torch.log), "Erf": _plain(torch.erf), "Reciprocal": _plain(torch.reciprocal),
    "Sign": _plain(torch.sign), "Floor": _plain(torch.floor), "Ceil": _plain(torch.ceil), "Round": _plain(torch.round),
    "Sin": _plain(torch.sin), "Cos": _plain(torch.cos),
    "Relu": _plain(nnf.relu), "LeakyRelu": _with(nnf.leaky_relu, "alpha", 0.01), "PRelu": _plain(_prelu),
    "Clip": _clip, "Sigmoid": _plain(torch.sigmoid), "Tanh": _plain(torch.tanh), "HardSigmoid": _hard_sigmoid,
    "HardSwish": _plain(nnf.hardswish), "Elu": _with(nnf.elu, "alpha", 1.0), "Celu": _with(nnf.celu, "alpha", 1.0),
    "Selu": _selu, "Softplus": _plain(nnf.softplus),
    "Softsign": _plain(nnf.softsign), "Gelu": _gelu, "Mish": _plain(nnf.mish),
    "Softmax": _softmax(torch.softmax), "LogSoftmax": _softmax(torch.log_softmax),
    "Equal": _plain(torch.eq), "Greater": _plain(torch.gt), "GreaterOrEqual": _plain(torch.ge),
    "Less": _plain(torch.lt), "LessOrEqual": _plain(torch.le), "Not": _plain(torch.logical_not),
    "And": _plain(torch.logical_and), "Or": _plain(torch.logical_or), "Xor": _plain(torch.logical_xor),
    "Where": _plain(torch.where), "Cast": _cast, "CastLike": _plain(lambda x, like: x.to(like.dtype)),
    "Identity": _plain(lambda x: x),
}  # fmt: skip
