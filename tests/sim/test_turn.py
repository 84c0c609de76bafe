"""What is pooled is turned before it is flattened: the same function, and a node less in the runtime's int8 graph."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper

from compress import channels, graph, profiles
from compress.emit import emit
from compress.graph import with_biases
from compress.passes.canonicalise import canonicalise
from compress.passes.place import PLACE
from compress.passes.ranges import RANGES
from compress.passes.turn import TURN, turn
from compress.pipeline import Bench, State
from compress.to_torch import Twin
from skills import ort

NOTHING: Any = None
KINDS = ["plain", "residual", "depthwise", "conv1d"]


def flattened_by(net: Any, kind: str, shape: list[int]) -> Any:
    """The canonicalised net with another operator in place of its Flatten."""
    model = canonicalise(net.model)
    (at,) = [at for at, node in enumerate(model.graph.node) if node.op_type == "Flatten"]
    old = model.graph.node[at]
    model.graph.initializer.append(graph.tensor("how", np.array(shape)))
    new = helper.make_node(kind, [old.input[0], "how"], list(old.output), old.name)
    graph.replace(model.graph.node, [new if node is old else node for node in model.graph.node])
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_runtime_runs_a_node_less_and_answers_the_same(kind: str, small_net: Callable[[str], Any]) -> None:
    net = small_net(kind)

    class Splits:
        class calibrate:  # noqa: N801
            x = net.x[:32]

    bench = Bench(profiles.find("x86-vnni"), Splits, NOTHING, NOTHING, NOTHING, 1.0, "both", lambda *_: None)  # type: ignore[arg-type]
    plain = State(canonicalise(net.model))
    found = []
    for came in (plain, TURN.run(plain, bench)):
        state = PLACE.run(RANGES.run(came, bench), bench)
        file = emit(state.model, state.planned(), state.seen()).SerializeToString()
        answers = [ort.session(one).run({"x": net.x[:64]})["logits"] for one in (state.model.SerializeToString(), file)]
        found.append((ort.audit(file).counts, answers))
    (before, wanted), (after, got) = found
    assert sum(after.values()) == sum(before.values()) - 1
    assert after.get("Transpose", 0) == before["Transpose"] - 1
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("kind", "shape"), [("Reshape", [0, -1]), ("Reshape", [-1, 32]), ("Reshape", [-1, 0]), ("Squeeze", [2, 3])]
)
def test_other_words_for_flatten_are_understood(kind: str, shape: list[int], small_net: Callable[[str], Any]) -> None:
    net = small_net("plain")
    model = flattened_by(net, kind, shape)
    turned = turn(model)
    assert [node.op_type for node in turned.graph.node][-3:] == ["Transpose", "Flatten", "Gemm"]
    before, after = (ort.session(one.SerializeToString()).run({"x": net.x[:8]})["logits"] for one in (model, turned))
    np.testing.assert_array_equal(after, before)


def test_another_shape_or_no_pooling_is_left_as_it_came(small_net: Callable[[str], Any]) -> None:
    net = small_net("plain")
    for model in (turn(canonicalise(net.model)), canonicalise(small_net("transformer").model)):
        assert turn(model) is model
    for shape in ([1, -1], [-1, 16, 2]):
        ends = [helper.make_tensor_value_info(name, 1, size) for name, size in (("x", ["n", 32, 4, 4]), ("y", None))]
        nodes = [helper.make_node("GlobalAveragePool", ["x"], ["p"]), helper.make_node("Reshape", ["p", "s"], ["y"])]
        body = helper.make_graph(nodes, "g", ends[:1], ends[1:], [graph.tensor("s", np.array(shape))])
        model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        assert turn(model) is model


def test_only_onnxruntime_gets_it(small_net: Callable[[str], Any]) -> None:
    class Tools:
        profile = profiles.find("arm64-litert")

    state = State(canonicalise(small_net("plain").model))
    assert TURN.run(state, Tools).model is state.model  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_channels_are_found_and_removed_behind_it_as_before_and_torch_answers_the_same(
    kind: str, small_net: Callable[[str], Any]
) -> None:
    net = small_net(kind)
    plain = with_biases(canonicalise(net.model))
    turned = turn(plain)
    found = [
        [[(m.node, m.weight, m.axis, m.index.tolist()) for m in group.members] for group in channels.groups(model)]
        for model in (plain, turned)
    ]
    assert found[0] == found[1] != []
    keep = {at: range(0, group.size, 2) for at, group in enumerate(channels.groups(plain))}
    x = net.x[:8]
    before, after = (
        ort.session(channels.shrink(model, keep).SerializeToString()).run({"x": x})["logits"]
        for model in (plain, turned)
    )
    np.testing.assert_array_equal(after, before)
    with torch.no_grad():
        answers = [Twin(model)(torch.from_numpy(x)).numpy() for model in (plain, turned)]
    np.testing.assert_array_equal(*answers)
