"""What is known before any input comes is computed once, when the graph is made canonical."""

from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

from compress import graph
from compress.passes.canonicalise import canonicalise
from skills import ort


def model(nodes: list[Any], shape: list[Any], **stored: Any) -> Any:
    body = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", 1, shape)],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def same_answers(one: Any, other: Any, x: Any) -> bool:
    want, got = (ort.session(m.SerializeToString()).run({"x": x})["y"] for m in (one, other))
    return want.shape == got.shape and bool(np.allclose(want, got, atol=1e-6))


def kinds(one: Any) -> list[str]:
    return [node.op_type for node in one.graph.node]


X = np.random.default_rng(1).standard_normal((3, 4, 6, 5)).astype(np.float32)
NODE = helper.make_node


def test_constants_made_of_constants_become_constants() -> None:
    net = model(
        [NODE("Mul", ["a", "b"], ["c"]), NODE("Add", ["x", "c"], ["y"])], ["n", 5], a=np.float32([2]), b=X[0, 0, 0]
    )
    assert kinds(canonicalise(net)) == ["Add"]
    assert same_answers(net, canonicalise(net), X[0, 0])


def test_a_constant_that_would_make_the_file_larger_is_still_computed_at_run_time() -> None:
    net = model(
        [NODE("Expand", ["a", "sizes"], ["c"]), NODE("Add", ["x", "c"], ["y"])],
        ["n", 5000],
        a=np.float32([2]),
        sizes=np.int64([1, 5000]),
    )
    assert kinds(canonicalise(net)) == ["Expand", "Add"]


@pytest.mark.parametrize(("batch", "sizes"), [("n", [0, -1]), (3, [3, -1])])
def test_sizes_that_only_depend_on_the_batch_are_written_down(batch: Any, sizes: list[int]) -> None:
    nodes = [
        NODE("Shape", ["x"], ["s"]),
        NODE("Gather", ["s", "first"], ["b"]),
        NODE("Unsqueeze", ["b", "axes"], ["u"]),
        NODE("Concat", ["u", "rest"], ["to"], axis=0),
        NODE("Reshape", ["x", "to"], ["y"]),
    ]
    net = model(nodes, [batch, 4, 6, 5], first=np.int64(0), axes=np.int64([0]), rest=np.int64([-1]))
    folded = canonicalise(net)
    assert kinds(folded) == ["Reshape"]
    assert graph.arrays(folded)[folded.graph.node[0].input[1]].tolist() == sizes
    assert same_answers(net, folded, X)


def test_a_first_size_that_is_not_the_batch_stays_computed() -> None:
    nodes = [
        NODE("Shape", ["x"], ["s"]),
        NODE("Gather", ["s", "second"], ["b"]),
        NODE("Concat", ["b", "rest"], ["to"], axis=0),
        NODE("Reshape", ["x", "to"], ["y"]),
    ]
    net = model(nodes, ["n", "c"], second=np.int64([1]), rest=np.int64([-1]))
    assert kinds(canonicalise(net)) == kinds(net)


@pytest.mark.parametrize(("value", "found"), [(0.0, ["Conv"]), (1.0, ["Pad", "Conv"])])
def test_a_convolution_adds_the_zeros_before_it_itself(value: float, found: list[str]) -> None:
    nodes = [
        NODE("Pad", ["x", "pads", "value"], ["p"]),
        NODE("Conv", ["p", "w"], ["y"], pads=[1, 0, 0, 2], strides=[2, 1]),
    ]
    weight = np.random.default_rng(2).standard_normal((2, 4, 3, 3)).astype(np.float32)
    net = model(nodes, ["n", 4, 6, 5], pads=np.int64([0, 0, 1, 2, 0, 0, 3, 0]), value=np.float32(value), w=weight)
    assert kinds(canonicalise(net)) == found
    assert same_answers(net, canonicalise(net), X)
