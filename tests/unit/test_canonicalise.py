"""What only passes its input on goes, and the graph's outputs keep their names."""

from typing import Any

import numpy as np
from onnx import helper

from compress import channels, graph
from compress.conclude import counted
from compress.passes.canonicalise import canonicalise


def ending_in(*nodes: Any) -> list[tuple[str, list[str]]]:
    ends = [helper.make_tensor_value_info(name, 1, ["n", 4]) for name in ("x", "y")]
    body = helper.make_graph(list(nodes), "g", ends[:1], ends[1:], [graph.tensor("w", np.ones((4, 4), np.float32))])
    made = canonicalise(helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    return [(node.op_type, list(node.output)) for node in made.graph.node]


def test_an_identity_in_front_of_the_output_gives_its_name_to_what_it_passed_on() -> None:
    nodes = [helper.make_node("Softmax", ["x"], ["a"]), helper.make_node("Identity", ["a"], ["b"]),
             helper.make_node("Dropout", ["b"], ["y"])]  # fmt: skip
    assert ending_in(*nodes) == [("Softmax", ["y"])]


def test_an_identity_of_the_input_itself_stays() -> None:
    assert ending_in(helper.make_node("Identity", ["x"], ["y"])) == [("Identity", ["y"])]


def test_a_relu_behind_a_relu_goes_and_one_behind_anything_else_stays() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Relu", ["a"], ["b"]),
             helper.make_node("Neg", ["b"], ["c"]), helper.make_node("Relu", ["c"], ["y"])]  # fmt: skip
    assert [kind for kind, _ in ending_in(*nodes)] == ["Relu", "Neg", "Relu"]


def behind_an_identity(weight_is_input: bool = False) -> Any:
    shapes = {"x": ["n", 4], "y": ["n", 3]} | ({"given": [4, 3]} if weight_is_input else {})
    ends = {name: helper.make_tensor_value_info(name, 1, shape) for name, shape in shapes.items()}
    nodes = [helper.make_node("Identity", ["given" if weight_is_input else "w"], ["same"]),
             helper.make_node("Gemm", ["x", "same"], ["y"])]  # fmt: skip
    stored = [] if weight_is_input else [graph.tensor("w", np.ones((4, 3), np.float32))]
    body = helper.make_graph(nodes, "g", [end for name, end in ends.items() if name != "y"], [ends["y"]], stored)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_weights_behind_an_identity_are_counted_before_as_they_are_after() -> None:
    model = behind_an_identity()
    for count in (channels.params, channels.macs):
        assert counted(count, model.SerializeToString(), canonicalise(model)) == (12, 12)


def test_a_count_that_cannot_be_made_is_left_out() -> None:
    model = behind_an_identity(weight_is_input=True)
    assert counted(channels.macs, model.SerializeToString(), canonicalise(model)) is None
