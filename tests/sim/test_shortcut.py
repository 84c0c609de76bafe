"""Shortcuts that leave out pixels and add empty channels become convolutions: the same function, in int8 and faster."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from compress import channels, graph, profiles
from compress.emit import emit
from compress.passes.canonicalise import canonicalise
from compress.passes.place import PLACE
from compress.passes.ranges import RANGES
from compress.passes.shortcut import as_convolution
from compress.pipeline import Bench, State
from skills import ort

NOTHING: Any = None
FAR = 2**31 - 1


def net(
    width: int = 8, more: int = 4, steps: Sequence[int] = (2, 2), starts: Sequence[int] = (0, 0),
    pads: Sequence[int] | None = None, fill: float = 0.0, **pad: Any,
) -> Any:  # fmt: skip
    """A residual block that halves the picture and adds channels, with such a shortcut."""
    chance = np.random.default_rng(0)
    weights = {
        "stem": chance.normal(size=(width, 3, 3, 3)), "inner": chance.normal(size=(width + 2 * more, width, 3, 3)) / 6,
        "head": chance.normal(size=(5, width + 2 * more)),
    }  # fmt: skip
    values = [graph.tensor(name, value.astype(np.float32)) for name, value in weights.items()]
    numbers = {"starts": starts, "ends": (FAR, FAR), "axes": (2, 3), "steps": steps}
    numbers["pads"] = (0, more, 0, 0, 0, more, 0, 0) if pads is None else pads
    values += [graph.tensor(name, np.array(value, np.int64)) for name, value in numbers.items()]
    values.append(graph.tensor("fill", np.array(fill, np.float32)))
    nodes = [
        helper.make_node("Conv", ["x", "stem"], ["a"], pads=[1] * 4), helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "inner"], ["c"], pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Slice", ["b", "starts", "ends", "axes", "steps"], ["d"]),
        helper.make_node("Pad", ["d", "pads", "fill"], ["e"], **pad), helper.make_node("Add", ["c", "e"], ["f"]),
        helper.make_node("Relu", ["f"], ["g"]), helper.make_node("GlobalAveragePool", ["g"], ["h"]),
        helper.make_node("Flatten", ["h"], ["i"]), helper.make_node("Gemm", ["i", "head"], ["y"], transB=1),
    ]  # fmt: skip
    ends = [helper.make_tensor_value_info(name, 1, size) for name, size in (("x", ["n", 3, 8, 8]), ("y", ["n", 5]))]
    body = helper.make_graph(nodes, "g", ends[:1], ends[1:], values)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return canonicalise(model)


def inputs(count: int = 64) -> Any:
    return np.random.default_rng(1).normal(size=(count, 3, 8, 8)).astype(np.float32)


def told(model: Any) -> Any:
    return ort.session(model.SerializeToString()).run({"x": inputs()})["y"]


@pytest.mark.parametrize(("width", "more", "steps"), [(8, 4, (2, 2)), (4, 0, (2, 2)), (6, 3, (2, 2))])
def test_the_convolution_answers_as_the_shortcut_did(width: int, more: int, steps: tuple[int, int]) -> None:
    before = net(width, more, steps)
    after = as_convolution(before)
    assert {"Slice", "Pad"}.isdisjoint(node.op_type for node in after.graph.node)
    assert sum(node.op_type == "Conv" for node in after.graph.node) == 3
    np.testing.assert_allclose(told(after), told(before), atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        {"starts": (1, 1)},
        {"fill": 1.0},
        {"mode": "edge", "pads": (0, 0, 0, 0, 0, 0, 0, 0), "more": 0},
        {"width": 64, "more": 32},
    ],
)
def test_what_does_anything_else_or_would_be_large_is_left_as_it_came(other: dict[str, Any]) -> None:
    model = net(**other)
    assert as_convolution(model) is model


def test_a_picture_that_others_read_too_is_left_as_it_came() -> None:
    model = net()
    (pad,) = [node for node in model.graph.node if node.op_type == "Pad"]
    model.graph.output.append(helper.make_tensor_value_info(pad.input[0], 1, ["n", 8, 4, 4]))
    assert as_convolution(model) is model


def test_the_runtime_computes_it_in_int8_with_fewer_nodes() -> None:
    class Splits:
        class calibrate:  # noqa: N801
            x = inputs()

    bench = Bench(profiles.find("x86-vnni"), Splits, NOTHING, NOTHING, NOTHING, 1.0, "both", lambda *_: None)  # type: ignore[arg-type]
    counts = []
    for model in (net(), as_convolution(net())):
        state = PLACE.run(RANGES.run(State(model), bench), bench)
        file = emit(state.model, state.planned(), state.seen()).SerializeToString()
        counts.append(ort.audit(file).counts)
    before, after = counts
    assert after["QLinearConv"] == before["QLinearConv"] + 1
    assert "Pad" not in after
    assert after["QuantizeLinear"] == before["QuantizeLinear"] - 1
    assert sum(after.values()) <= sum(before.values()) - 3


def test_channels_may_go_on_either_side_of_it() -> None:
    model = graph.with_biases(as_convolution(net()))
    found = channels.groups(model)
    assert {group.size for group in found if group.makers and group.readers} == {8, 16}
    keep = {at: range(group.size // 2) for at, group in enumerate(found) if group.makers and group.readers}
    assert told(channels.shrink(model, keep)).shape == (64, 5)
