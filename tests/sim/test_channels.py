"""Removing a unit is the same as setting everything that belongs to it to zero, on every net that we have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from compress import channels, graph
from compress.channels import Group
from compress.passes.canonicalise import canonicalise
from skills import ort

CLOSE = 1e-5
REFERENCES = {  # removable units, residual branches that can go
    "cifar10jpeg/resnet20_cifar10jpeg.onnx": (400, 7),
    "cifar10jpeg/resnet56_cifar10jpeg.onnx": (1072, 25),
    "imagenet/efficientnet_lite0.onnx": (11024, 9),
    "mlperf_tiny/kws_dscnn.onnx": (256, 0),
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
