"""Removing a unit is the same as setting everything that belongs to it to zero, on every net that we have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from compress import channels, graph
from compress.channels import Group
from compress.passes.canonicalise import canonicalise
from skills import ort

CLOSE = 1e-5
REFERENCES = {  # removable units, residual branches that can go
    "cifar10jpeg/resnet20_cifar10jpeg.onnx": (400, 7),
    "cifar10jpeg/resnet56_cifar10jpeg.onnx": (1072, 25),
    "imagenet/efficientnet_lite0.onnx": (11024, 9),
    "mlperf_tiny/kws_dscnn.onnx": (320, 0),
    "mlperf_tiny/vww_mobilenetv1_025.onnx": (1496, 0),
    "mlperf_tiny/ic_resnet8.onnx": (224, 1),
    "mlperf_tiny/ad_autoencoder.onnx": (1032, 0),
    "watch_imu/har_watch_cnn.onnx": (288, 0),
    "sst2/sst2_textcnn.onnx": (192, 0),
    "face/ultraface_RFB-320.onnx": (1716, 0),
}


def zeroed(model: Any, group: Group, units: list[int]) -> Any:
    """The original with every entry that belongs to these units at zero."""
    values = {name: value.copy() for name, value in graph.arrays(model).items()}
    for member in group.members:
        np.moveaxis(values[member.weight], member.axis, 0)[member.index[units].reshape(-1)] = 0
    other = graph.copy(model)
    graph.replace(other.graph.initializer, [graph.tensor(name, value) for name, value in values.items()])
    return other


def answers(model: Any, x: Any) -> list[Any]:
    session = ort.session(model.SerializeToString())
    return list(session.run({session.inputs[0].name: x}).values())


def some_input(model: Any, count: int) -> Any:
    port = ort.session(model.SerializeToString()).inputs[0]
    sizes = [size if size > 0 else count for size in port.shape]
    chance = np.random.default_rng(3)
    return chance.integers(0, 99, sizes) if "int" in port.dtype else chance.standard_normal(sizes).astype(np.float32)


def check_removal(model: Any, number: int, units: list[int], x: Any) -> None:
    group = channels.groups(model)[number]
    smaller = channels.shrink(model, {number: [unit for unit in range(group.size) if unit not in units]})
    onnx.checker.check_model(smaller, full_check=True)
    for want, got in zip(answers(zeroed(model, group, units), x), answers(smaller, x), strict=True):
        assert np.abs(want - got).max() <= CLOSE * (1 + np.abs(want).max())


@pytest.mark.parametrize("kind", ["plain", "residual", "depthwise"])
def test_removing_a_unit_equals_setting_its_weights_to_zero(small_net: Callable[[str], Any], kind: str) -> None:
    net = small_net(kind)
    model = canonicalise(net.model)
    for number, group in enumerate(channels.groups(model)):
        for unit in range(0, group.size, 5):
            check_removal(model, number, [unit], net.x[:4])
        check_removal(model, number, list(range(1, group.size)), net.x[:4])


@pytest.mark.reference
@pytest.mark.parametrize("name", REFERENCES)
def test_removing_a_unit_of_a_reference_model_equals_setting_its_weights_to_zero(reference: Path, name: str) -> None:
    model = canonicalise(onnx.load(reference / name))
    found, x, chance = channels.groups(model), some_input(model, 2), np.random.default_rng(0)
    assert (sum(group.size for group in found), len(channels.branches(model))) == REFERENCES[name]
    for number in chance.permutation(len(found))[:4].tolist():
        units = chance.permutation(found[number].size)[: max(found[number].size // 3, 1)].tolist()
        check_removal(model, number, units, x)


@pytest.mark.reference
@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_model_without_half_of_its_units_and_without_its_branches_runs(reference: Path, name: str) -> None:
    model = canonicalise(onnx.load(reference / name))
    keep = {at: range(0, group.size, 2) for at, group in enumerate(channels.groups(model))}
    smaller = channels.shrink(model, keep, channels.branches(model))
    onnx.checker.check_model(smaller, full_check=True)
    x = some_input(model, 2)
    assert [y.shape for y in answers(smaller, x)] == [y.shape for y in answers(model, x)]
    assert sum(channels.macs(smaller).values()) < 0.5 * sum(channels.macs(model).values())
    assert sum(channels.params(smaller).values()) < 0.55 * sum(channels.params(model).values())


def test_a_model_that_keeps_everything_is_unchanged(small_net: Callable[[str], Any]) -> None:
    model = canonicalise(small_net("residual").model)
    same = channels.shrink(model, {at: range(group.size) for at, group in enumerate(channels.groups(model))})
    assert graph.arrays(same).keys() == graph.arrays(model).keys()
    assert [node.SerializeToString() for node in same.graph.node] == [n.SerializeToString() for n in model.graph.node]


def test_the_input_of_shrink_is_left_as_it_was(small_net: Callable[[str], Any]) -> None:
    model = canonicalise(small_net("depthwise").model)
    before = model.SerializeToString()
    channels.shrink(model, {0: [0, 3]})
    assert model.SerializeToString() == before


def test_a_layer_without_any_channel_left_is_refused_by_its_name(small_net: Callable[[str], Any]) -> None:
    model = canonicalise(small_net("plain").model)
    with pytest.raises(ValueError, match=r"c0: no channel is left; keep at least one unit here"):
        channels.shrink(model, {0: []})


def test_a_unit_that_does_not_exist_is_refused(small_net: Callable[[str], Any]) -> None:
    model = canonicalise(small_net("plain").model)
    with pytest.raises(ValueError, match=r"there is no such unit in group 0"):
        channels.shrink(model, {0: [99]})


def test_a_removed_branch_leaves_its_shortcut(small_net: Callable[[str], Any]) -> None:
    net = small_net("residual")
    model = canonicalise(net.model)
    (branch,) = channels.branches(model)
    smaller = channels.shrink(model, {}, [branch])
    assert not {node.name for node in smaller.graph.node} & {branch.add, *branch.nodes}
    silent = graph.copy(model)
    last = {node.name: node for node in model.graph.node}[branch.nodes[-1]]
    for item in silent.graph.initializer:
        if item.name in last.input:
            item.CopyFrom(graph.tensor(item.name, 0 * graph.array(item)))
    for want, got in zip(answers(silent, net.x[:4]), answers(smaller, net.x[:4]), strict=True):
        assert np.abs(want - got).max() <= CLOSE


def of_nodes(nodes: list[Any], stored: dict[str, Any], takes: list[Any], gives: list[Any]) -> Any:
    ends = [helper.make_tensor_value_info("x", 1, takes), helper.make_tensor_value_info("y", 1, gives)]
    inits = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in stored.items()]
    body = helper.make_graph(nodes, "net", ends[:1], ends[1:], inits)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(body, opset_imports=opsets, ir_version=10)


def test_a_product_with_a_vector_counts_its_inputs() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "last")]
    model = of_nodes(nodes, {"w": np.ones(12)}, ["n", 5, 12], ["n", 5])
    assert channels.macs(model) == {"last": 5 * 12}
    assert channels.work(model, 16) >= 5 * 12


def test_a_convolution_whose_size_is_not_known_counts_as_one_place() -> None:
    nodes = [
        helper.make_node("Gelu", ["x"], ["g"], "gelu", domain="com.microsoft"),
        helper.make_node("Conv", ["g", "w"], ["c"], "conv"),
        helper.make_node("Relu", ["c"], ["y"], "relu"),
    ]
    model = of_nodes(nodes, {"w": np.ones((6, 4, 3, 3))}, ["n", 4, 8, 8], [None] * 4)
    assert channels.macs(model) == {"conv": 6 * 4 * 9}
    assert channels.work(model, 16) >= 6 * 4 * 9


class Drawn:
    """A random graph of layers with one thing in common: whatever comes out, the file is valid."""

    def __init__(self, seed: int) -> None:
        self.chance = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.stored: list[Any] = []
        self.open = [("x", 4)]  # name and number of channels; every picture is 8x8

    def constant(self, value: Any, kind: Any = np.float32) -> str:
        name = f"k{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(np.asarray(value, kind), name))
        return name

    def add(self, op: str, inputs: list[str], outputs: int = 1, **facts: Any) -> list[str]:
        names = [f"t{len(self.nodes)}_{at}" for at in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, f"n{len(self.nodes)}", **facts))
        return names

    def conv(self, source: str, ins: int, outs: int, size: int = 1, groups: int = 1) -> str:
        stored = [self.random(outs, ins // groups, size, size), self.random(outs)]
        return self.add("Conv", [source, *stored], pads=[size // 2] * 4, group=groups)[0]

    def random(self, *sizes: int) -> str:
        return self.constant(self.chance.standard_normal(sizes) / max(np.prod(sizes[1:]), 1) ** 0.5)

    def step(self, kind: str) -> None:
        name, count = self.open[self.chance.integers(len(self.open))]
        self.open.append(STEPS[kind](self, name, count))

    def partner(self) -> tuple[str, int]:
        return self.open[self.chance.integers(len(self.open))]

    def some_conv(self, name: str, count: int) -> tuple[str, int]:
        outs = int(self.chance.integers(2, 7))
        return self.conv(name, count, outs, 3), outs

    def turned(self, name: str, count: int) -> tuple[str, int]:
        return self.add("ConvTranspose", [name, self.random(count, 3, 1, 1)])[0], 3

    def norm(self, name: str, count: int) -> tuple[str, int]:
        stored = [self.constant(0.5 + self.chance.random(count)) for _ in range(4)]
        return self.add("BatchNormalization", [name, *stored])[0], count

    def act(self, name: str, count: int) -> tuple[str, int]:
        return self.add(str(self.chance.choice(["Relu", "Sigmoid", "HardSwish", "Cos"])), [name])[0], count

    def scale(self, name: str, count: int) -> tuple[str, int]:
        return self.add(str(self.chance.choice(["Mul", "Sub", "PRelu"])), [name, self.random(1, count, 1, 1)])[0], count

    def meet(self, name: str, count: int) -> tuple[str, int]:
        other, wide = self.partner()
        return self.add("Mul", [name, other if wide == count else self.conv(other, wide, count)])[0], count

    def concat(self, name: str, count: int) -> tuple[str, int]:
        other, wide = self.partner()
        return self.add("Concat", [name, other, self.random(2, 1, 8, 8)], axis=1)[0], count + wide + 1

    def split(self, name: str, count: int) -> tuple[str, int]:
        if count < 2:
            return name, count
        first = int(self.chance.integers(1, count))
        made, rest = self.add("Split", [name, self.constant([first, count - first], np.int64)], 2, axis=1)
        self.open.append((made, first))
        return rest, count - first

    def slice(self, name: str, count: int) -> tuple[str, int]:
        if count < 3:
            return name, count
        return self.add("Slice", [name, *(self.constant([at], np.int64) for at in (1, -1, 1))])[0], count - 2

    def excite(self, name: str, count: int) -> tuple[str, int]:
        pooled = self.add("ReduceMean", [name, self.constant([2, 3], np.int64)], keepdims=1)[0]
        gate = self.add("Sigmoid", [self.conv(self.conv(pooled, count, 3), 3, count)])[0]
        return self.add("Mul", [name, gate])[0], count

    def around(self, name: str, count: int) -> tuple[str, int]:
        last = self.add("Transpose", [name], perm=[0, 2, 3, 1])[0]
        made = self.add("MatMul", [last, self.random(count, 5)])[0]
        return self.add("Transpose", [made], perm=[0, 3, 1, 2])[0], 5

    def shuffle(self, name: str, count: int) -> tuple[str, int]:
        wide = self.add("Reshape", [name, self.constant([0, 1, count, 64], np.int64)])[0]
        return self.add("Reshape", [wide, self.constant([0, count, 8, 8], np.int64)])[0], count

    def views(self, name: str, count: int) -> tuple[str, int]:
        wide = self.add("Unsqueeze", [name, self.constant([1], np.int64)])[0]
        return self.add("Squeeze", [wide, self.constant([1], np.int64)])[0], count

    def resized(self, name: str, count: int) -> tuple[str, int]:
        larger = self.add("Resize", [name, "", self.constant([1, 1, 2, 2])])[0]
        return self.add("AveragePool", [larger], kernel_shape=[2, 2], strides=[2, 2])[0], count

    def attended(self, name: str, count: int) -> tuple[str, int]:
        most = self.add("ReduceMax", [name, self.constant([1], np.int64)], keepdims=1)[0]
        return self.add("Mul", [name, most])[0], count

    def batched(self, name: str, count: int) -> tuple[str, int]:
        batch = self.add("Gather", [self.add("Shape", [name])[0], self.constant([0], np.int64)])[0]
        sizes = self.add("Concat", [batch, self.constant([count, 8, 8], np.int64)], axis=0)[0]
        return self.add("Reshape", [name, sizes])[0], count

    def stretched(self, name: str, count: int) -> tuple[str, int]:
        row = self.constant([[int(self.chance.integers(9)) for _ in range(8)]], np.int64)
        table = self.add("Gather", [self.random(9, count), row])[0]  # [1, 8, count]
        turned = self.add(
            "Unsqueeze", [self.add("Transpose", [table], perm=[0, 2, 1])[0], self.constant([3], np.int64)]
        )
        return self.add("Add", [name, turned[0]])[0], count

    def pad(self, name: str, count: int) -> tuple[str, int]:
        return self.add("Pad", [name, self.constant([0, 1, 0, 0, 0, 2, 0, 0], np.int64)])[0], count + 3

    def finished(self) -> Any:
        ends = []
        for name, count in self.open[-2:]:
            made = self.add("Gemm", [self.add("Flatten", [name])[0], self.random(count * 64, 3)])[0]
            ends.append(helper.make_tensor_value_info(made, 1, ["n", 3]))
        inputs = [helper.make_tensor_value_info("x", 1, ["n", 4, 8, 8])]
        body = helper.make_graph(self.nodes, "drawn", inputs, ends, self.stored)
        model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        graph.drop_dead(model)
        return model


STEPS: dict[str, Callable[[Drawn, str, int], tuple[str, int]]] = {
    "conv": Drawn.some_conv,
    "depthwise": lambda drawn, name, count: (drawn.conv(name, count, 2 * count, 3, count), 2 * count),
    "grouped": lambda drawn, name, count: (drawn.conv(name, count, 6, 3, 1 + (count % 2 == 0)), 6),
    "add": lambda drawn, name, count: (drawn.add("Add", [name, drawn.conv(name, count, count)])[0], count),
    "softmax": lambda drawn, name, count: (drawn.add("Softmax", [name], axis=1)[0], count),
    "unknown": lambda drawn, name, count: (drawn.add("LpNormalization", [name], axis=1)[0], count),
    **{name: getattr(Drawn, name) for name in (
        "turned", "norm", "act", "scale", "meet", "concat", "split", "slice", "pad", "excite", "around", "shuffle", "views",
        "resized", "attended", "batched", "stretched",
    )},
}  # fmt: skip


def check_all(drawn: Drawn) -> int:
    """Remove some units of each group, and return how many groups had one to spare."""
    model, spared = drawn.finished(), 0
    x = drawn.chance.standard_normal((2, 4, 8, 8)).astype(np.float32)
    for number, group in enumerate(channels.groups(model)):
        try:
            check_removal(model, number, drawn.chance.permutation(group.size)[: max(group.size // 2, 1)].tolist(), x)
            spared += 1
        except ValueError as error:  # the last channel of something
            assert "no channel is left" in str(error)
    return spared


@pytest.mark.parametrize("kind", STEPS)
def test_the_rule_of_every_operator_keeps_the_function(kind: str) -> None:
    spared = 0
    for seed in range(8):
        drawn = Drawn(seed)
        drawn.open = [drawn.some_conv("x", 4)]
        for step in (kind, kind, "conv"):
            drawn.step(step)
        spared += check_all(drawn)
    assert spared > 0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(kinds=st.lists(st.sampled_from(sorted(STEPS)), min_size=3, max_size=9), seed=st.integers(0, 1000))
def test_removing_a_unit_of_any_graph_equals_setting_its_weights_to_zero(kinds: list[str], seed: int) -> None:
    drawn = Drawn(seed)
    for kind in ("conv", *kinds):
        drawn.step(kind)
    check_all(drawn)
