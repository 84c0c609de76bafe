"""Do not compute what nobody reads: rows and columns at the end of a picture that the pooling behind it leaves out.

A pooling whose windows do not reach the end (24 of 25 rows, say) leaves the rest unread, and so do the point-wise layers in
front of it. The first layer that pads there pads less instead. What then covers the whole picture is GlobalAveragePool,
whose int8 kernel is faster. Only for onnxruntime: LiteRT has no word for uneven padding and would copy the picture.
"""

import dataclasses
from typing import Any

import onnx

from compress import graph
from compress.passes.canonicalise import whole_pool
from compress.pipeline import Bench, Pass, State

WINDOWS = ("Conv", "AveragePool", "MaxPool")
POINTWISE = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh")
Sizes = tuple[int, ...]


def crop(model: Any) -> Any:
    """Return the model without the rows and columns that are never read; the same object where there are none."""
    sizes, needed = graph.shapes(model), _needed(model)
    cropped = graph.copy(model)
    actual: dict[str, Sizes] = {}  # where a tensor is now smaller
    for node in cropped.graph.node:
        source, made = next(iter(node.input), ""), node.output[0]
        given = actual.get(source, sizes.get(source, ())[2:])
        if node.op_type in POINTWISE and source in actual:
            actual[made] = given
        elif node.op_type in WINDOWS and (source in actual or made in needed):
            window = _Window(node)
            if window.strange or len(given) != len(window.spans) or min(given) < 1:
                continue
            after = window.after
            if node.op_type == "Conv":
                after = window.padding(given, needed.get(made, sizes[made][2:]))
                _set_padding(node, (*window.before, *after))
            answers = window.answers(given, after)
            if answers != sizes[made][2:]:
                actual[made] = answers
    if not actual:
        return model
    del cropped.graph.value_info[:]
    whole_pool(cropped)
    return cropped


def _needed(model: Any) -> dict[str, Sizes]:
    """Return how much of each picture is read, for those that are not read to the end."""
    sizes, readers = graph.shapes(model), graph.consumers(model)
    whole = graph.outputs(model) | {
        name for node in model.graph.node for item in node.attribute for name in graph.outer_names(item)
    }
    found: dict[str, Sizes] = {}
    for node in reversed(model.graph.node):
        made = node.output[0]
        size = sizes.get(made, ())[2:]
        if made in whole or not size or min(size) < 1 or made not in readers or len(node.output) > 1:
            continue
        reads = [_reads(reader, made, size, sizes, found) for reader in readers[made]]
        most = tuple(max(axis) for axis in zip(*reads, strict=True))
        if most != size:
            found[made] = most
    return found


def _reads(reader: Any, name: str, size: Sizes, sizes: dict[str, Sizes], needed: dict[str, Sizes]) -> Sizes:
    """Return how much of the picture `name` one of its readers needs for what is needed of its own result."""
    made = reader.output[0]
    asked = needed.get(made, sizes.get(made, ())[2:])
    if list(reader.input).count(name) > 1 or reader.input[0] != name:
        return size
    if reader.op_type in POINTWISE:
        return asked
    if reader.op_type not in WINDOWS or len(asked) != len(size) or min(asked) < 1 or len(reader.output) > 1:
        return size
    window = _Window(reader)
    if window.strange or (reader.op_type != "Conv" and any((*window.before, *window.after))):
        return size
    return tuple(min(one, own) for one, own in zip(window.reach(asked), size, strict=True))


class _Window:
    """Kernel, steps and padding of a node, axis by axis (the formulas of ONNX's Conv and pooling operators)."""

    def __init__(self, node: Any) -> None:
        facts = graph.attributes(node)
        kernel = tuple(facts.get("kernel_shape", ()))
        plain = facts.get("auto_pad", b"NOTSET") == b"NOTSET" and not facts.get("ceil_mode", 0)
        self.strange = not (kernel and plain)
        self.steps = tuple(facts.get("strides", ())) or (1,) * len(kernel)
        spread = tuple(facts.get("dilations", ())) or (1,) * len(kernel)
        self.spans = tuple((size - 1) * apart + 1 for size, apart in zip(kernel, spread, strict=True))
        pads = tuple(facts.get("pads", ())) or (0,) * 2 * len(kernel)
        self.before, self.after = pads[: len(kernel)], pads[len(kernel) :]

    def reach(self, answers: Sizes) -> Sizes:
        """Return up to where the input and its padding behind are read for so many answers."""
        rows = zip(answers, self.steps, self.spans, self.before, strict=True)
        return tuple((count - 1) * step + span - pad for count, step, span, pad in rows)

    def padding(self, given: Sizes, answers: Sizes) -> Sizes:
        """Return the padding behind `given` for at least so many answers."""
        return tuple(max(0, far - own) for far, own in zip(self.reach(answers), given, strict=True))

    def answers(self, given: Sizes, after: Sizes) -> Sizes:
        """Return how many answers an input with this padding behind it has."""
        rows = zip(given, self.before, after, self.spans, self.steps, strict=True)
        return tuple((own + first + last - span) // step + 1 for own, first, last, span, step in rows)


def _set_padding(node: Any, pads: Sizes) -> None:
    rest = [item for item in node.attribute if item.name != "pads"]
    graph.replace(node.attribute, [*rest, onnx.helper.make_attribute("pads", pads)])


def _run(state: State, bench: Bench) -> State:
    if bench.profile.runtime != "onnxruntime":
        return state
    return dataclasses.replace(state, model=crop(state.model))


CROP = Pass("crop", "leaving out what nobody reads", _run)
