"""The only door to neural-compressor: its weight-only methods, which round the weights of linear layers in blocks.

Its GPTQ (Frantar et al., arXiv 2210.17323) wants a stack of transformer blocks to walk through. It gets one: a block for each
layer, which reads what that layer reads in the graph, whatever comes before it. So any graph will do, not only those that
it knows by their module names.
"""

import contextlib
import dataclasses
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch

from compress.graph import Array
from compress.weights import Blocks
from skills.errors import MissingExtra, SkerryError

Method = Literal["gptq", "rtn"]
METHODS: tuple[Method, ...] = ("gptq", "rtn")
BITS = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer: its weight, [outputs, inputs] in float32, and rows of what it reads, [rows, inputs]."""

    weight: Array
    read: Array


def available() -> bool:
    """Return whether neural-compressor is installed."""
    return importlib.util.find_spec("neural_compressor") is not None


def rounded(layers: Sequence[Linear], method: Method, size: int) -> list[Blocks]:
    """Return 4-bit codes for each layer, with a scale for every `size` inputs of every output.

    Raises:
        MissingExtra: neural-compressor is not installed.
        SkerryError: it left a layer as it was, or failed, in its words.
    """
    try:
        with _silent(), torch.no_grad():
            from neural_compressor.torch.quantization import GPTQConfig, RTNConfig, convert, prepare

            options = {"bits": BITS, "use_sym": True, "group_size": size}
            # Its GPTQ takes a path that is no folder for a model on a hub, and asks there for it.
            config = GPTQConfig(model_path=os.curdir, **options) if method == "gptq" else RTNConfig(**options)
            ready = prepare(_Stack(layers), config)
            ready(torch.zeros(1))
            done = convert(ready)
    except ImportError as error:  # it imports each method's packages when that method is asked for
        raise MissingExtra(f"weight-only methods need {error.name}: pip install 'skerry[inc]'") from None
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise SkerryError(f"neural-compressor's {method} failed: {type(error).__name__}: {error}") from error
    return [_codes(block.linear, method, size) for block in done.blocks]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep what neural-compressor and its packages log and warn of to themselves; what matters comes as an exception."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _Layer(torch.nn.Module):  # type: ignore[misc]
    """One layer that reads what it is known to read."""

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        outputs, inputs = layer.weight.shape
        self.linear = torch.nn.Linear(inputs, outputs, bias=False)
        self.linear.weight.data = torch.from_numpy(np.array(layer.weight, np.float32))
        self.read = torch.from_numpy(np.array(layer.read, np.float32))

    def forward(self, _before: Any) -> Any:
        return self.linear(self.read)


class _Stack(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, layers: Sequence[Linear]) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(_Layer(layer) for layer in layers)

    def forward(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return x


def _codes(module: Any, method: str, size: int) -> Blocks:
    if not hasattr(module, "unpack"):
        raise SkerryError(f"neural-compressor's {method} left a layer as it was: {type(module).__name__}")
    found = module.unpack()
    values, scales = found["int_weight"].numpy().astype(np.int16), found["scales"].float().numpy()
    if found["zp"] is not None:
        values = values - np.repeat(found["zp"].numpy().astype(np.int16), size, axis=1)[:, : values.shape[1]]
    low, high = int(values.min()), int(values.max())
    if low < -8 or high > 7:
        raise SkerryError(f"neural-compressor's {method} gave codes in {low}..{high}, expected -8..7")
    return Blocks(values.astype(np.int8), np.ascontiguousarray(scales, np.float32), size)
