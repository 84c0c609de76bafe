"""What only passes its input on goes, and the graph's outputs keep their names."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from compress import channels, graph
from compress.conclude import counted
from compress.passes.canonicalise import canonicalise
from skills import ort


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


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
def test_a_convolution_with_a_computed_bias_answers_the_same_with_it_apart(kind: str) -> None:
    chance = np.random.default_rng(2)
    nodes = [helper.make_node("ReduceMean", ["x"], ["b"], axes=[0, 2, 3], keepdims=0),
             helper.make_node(kind, ["x", "w", "b"], ["a"], "c"),
             helper.make_node("BatchNormalization", ["a", *"ssss"], ["y"])]  # fmt: skip
    stored = [graph.tensor("w", chance.normal(size=(3, 3, 2, 2)).astype(np.float32)),
              graph.tensor("s", np.ones(3, np.float32))]  # fmt: skip
    ends = [helper.make_tensor_value_info(name, 1, ["n", 3, size, size]) for name, size in (("x", 5), ("y", None))]
    body = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = chance.normal(size=(2, 3, 5, 5)).astype(np.float32)
    after = canonicalise(model)
    assert [len(node.input) for node in after.graph.node if node.op_type == kind] == [2]
    before, now = (ort.session(one.SerializeToString()).run({"x": x})["y"] for one in (model, after))
    np.testing.assert_allclose(now, before, rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    alpha=st.sampled_from([1.0, 2.0, -0.5]), beta=st.sampled_from([1.0, 0.0, 3.0]), transposed=st.booleans(),
    summand=st.sampled_from(["", "b", "square"]), left_out=st.booleans(),
)  # fmt: skip
def test_a_gemm_of_any_factors_answers_the_same(
    alpha: float, beta: float, transposed: bool, summand: str, left_out: bool
) -> None:
    chance = np.random.default_rng(1)
    inputs = ["x", "w"] + ([summand] if summand or not left_out else [])  # none is written in two ways
    gemm = helper.make_node("Gemm", inputs, ["y"], "g", alpha=alpha, beta=beta, transB=int(transposed))
    nodes = [helper.make_node("MatMul", ["x", "v"], ["square"]), gemm]
    sizes = {"w": (3, 4) if transposed else (4, 3), "b": (3,), "v": (4, 3)}
    stored = [graph.tensor(name, chance.normal(size=size).astype(np.float32)) for name, size in sizes.items()]
    ends = [helper.make_tensor_value_info(name, 1, ["n", size]) for name, size in (("x", 4), ("y", 3))]
    body = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    x = chance.normal(size=(5, 4)).astype(np.float32)
    before, after = (ort.session(one.SerializeToString()).run({"x": x})["y"] for one in (model, canonicalise(model)))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
