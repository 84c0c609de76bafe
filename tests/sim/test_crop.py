"""Rows that nobody reads are not computed, and the answers stay what they were."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from compress import channels, graph
from compress.passes.canonicalise import canonicalise
from compress.passes.crop import CROP, crop
from compress.pipeline import State
from compress.profiles import find
from skills import ort

CHANNELS = 3


@dataclasses.dataclass(frozen=True)
class Step:
    kind: str
    kernel: int = 1
    stride: int = 1
    before: int = 0
    after: int = 0
    apart: int = 1


def net(size: int, *steps: Step) -> Any:
    """A chain of steps over a picture of size × 9; what is not said for columns is a kernel of one."""
    nodes, stored, name = [], [], "x"
    for at, step in enumerate(steps):
        made = "y" if at == len(steps) - 1 else f"t{at}"
        window = {
            "kernel_shape": [step.kernel, 1],
            "strides": [step.stride, 1],
            "pads": [step.before, 0, step.after, 0],
        }
        match step.kind:
            case "Conv":
                stored.append(graph.tensor(f"w{at}", weights(at, CHANNELS, CHANNELS, step.kernel, 1)))
                nodes.append(helper.make_node("Conv", [name, f"w{at}"], [made], dilations=[step.apart, 1], **window))
            case "AveragePool" | "MaxPool":
                nodes.append(helper.make_node(step.kind, [name], [made], **window))
            case "Skip":
                nodes += [
                    helper.make_node("Neg", [name], [made + "n"]),
                    helper.make_node("Add", [name, made + "n"], [made]),
                ]
            case _:
                nodes.append(helper.make_node(step.kind, [name], [made]))
        name = made
    ends = [
        helper.make_tensor_value_info("x", 1, ["n", CHANNELS, size, 9]),
        helper.make_tensor_value_info("y", 1, ["n", None, None, None]),
    ]
    body = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    return canonicalise(helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def weights(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def answers(model: Any, size: int) -> Any:
    return ort.session(model.SerializeToString()).run({"x": weights(99, 2, CHANNELS, size, 9)})["y"]


def test_a_pooling_that_leaves_out_the_last_row_saves_it_in_every_layer_up_to_the_padding() -> None:
    model = net(25, Step("Conv", 3, 1, 1, 1), Step("Relu"), Step("Conv"), Step("Relu"), Step("AveragePool", 24, 24))
    less = crop(model)
    assert {node: count * 25 // 24 for node, count in channels.macs(less).items()} == channels.macs(model)
    assert next(graph.attributes(node).get("pads") for node in less.graph.node if node.op_type == "Conv") == [
        1,
        0,
        0,
        0,
    ]
    np.testing.assert_allclose(answers(less, 25), answers(model, 25), rtol=1e-5, atol=1e-5)


def test_a_pooling_that_then_sees_the_whole_picture_becomes_global() -> None:
    model = net(25, Step("Conv", 3, 1, 1, 1), Step("AveragePool", 24, 24))
    columns = next(node for node in model.graph.node if node.op_type == "AveragePool")
    for item in columns.attribute:
        if item.name == "kernel_shape":
            item.ints[1] = 9
    assert [node.op_type for node in crop(model).graph.node] == ["Conv", "GlobalAveragePool"]
    np.testing.assert_allclose(answers(crop(model), 25), answers(model, 25), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "steps",
    [
        (Step("Conv", 3, 1, 1, 1), Step("AveragePool", 5, 5)),  # 25 rows are read to the end
        (Step("Conv", 3, 1, 1, 0), Step("AveragePool", 23, 23)),  # nothing is padded behind
        (Step("Conv", 3, 1, 1, 1), Step("Skip"), Step("AveragePool", 24, 24)),  # another branch
    ],
)
def test_where_nothing_can_be_left_out_the_model_is_the_one_that_came(steps: tuple[Step, ...]) -> None:
    model = net(25, *steps)
    assert crop(model) is model


def test_only_onnxruntime_gets_uneven_padding() -> None:
    state = State(net(25, Step("Conv", 3, 1, 1, 1), Step("AveragePool", 24, 24)))

    class Tools:
        profile = find("arm64-litert")

    assert CROP.run(state, Tools).model is state.model  # type: ignore[arg-type]


windows = st.builds(
    Step,
    st.sampled_from(["Conv", "AveragePool", "MaxPool"]),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 4),
    before=st.integers(0, 2),
    after=st.integers(0, 2),
    apart=st.integers(1, 2),
).map(
    lambda one: dataclasses.replace(one, before=min(one.before, one.kernel - 1), after=min(one.after, one.kernel - 1))
)
steps = st.lists(
    st.one_of(windows, st.sampled_from([Step("Relu"), Step("Skip"), Step("Sigmoid")])), min_size=1, max_size=6
)


@settings(max_examples=150, deadline=None)
@given(size=st.integers(12, 40), chain=steps)
def test_any_chain_answers_the_same_and_never_computes_more(size: int, chain: list[Step]) -> None:
    rows = size
    for step in chain:
        if step.kind in ("Conv", "AveragePool", "MaxPool"):
            apart = step.apart if step.kind == "Conv" else 1
            rows = (rows + step.before + step.after - (step.kernel - 1) * apart - 1) // step.stride + 1
            if rows < 1:
                return
    model = net(size, *chain)
    less = crop(model)
    np.testing.assert_allclose(answers(less, size), answers(model, size), rtol=1e-4, atol=1e-4)
    assert sum(channels.macs(less).values()) <= sum(channels.macs(model).values())
