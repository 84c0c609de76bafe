"""What a smaller network is made to answer before it is trained."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from compress import graph
from compress.channels import branches, groups, survivors
from compress.compensate import compensated
from compress.graph import with_biases
from compress.measure import answers
from compress.passes.canonicalise import canonicalise
from compress.shrinking import Shrink, choose
from skills import ort

KINDS = ["plain", "residual", "depthwise", "squeeze", "conv1d", "transformer"]


def prepared(net: Any) -> tuple[Any, Any, Any]:
    """Return the canonicalised model, some inputs and what it answers to them."""
    model, x = with_biases(canonicalise(net.model)), net.x[:128]
    return model, x, told(model, x)


def told(model: Any, x: Any) -> Any:
    return answers(ort.session(model.SerializeToString()), x)


def apart(wanted: Any, model: Any, x: Any) -> float:
    return float(((told(model, x) - wanted) ** 2).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_its_answers_come_nearer_to_those_of_the_network_before(kind: str, small_net: Callable[[str], Any]) -> None:
    model, x, wanted = prepared(small_net(kind))
    found = choose(model, Shrink(), x[:48], wanted[:48], 0.7, "latency")
    small = found.apply(model)
    better = compensated(model, small, survivors(model, found.keep), x)
    assert [node.output[0] for node in better.graph.node] == [node.output[0] for node in small.graph.node]
    assert apart(wanted, better, x) < 0.9 * apart(wanted, small, x)


def test_a_channel_that_says_what_another_says_is_not_missed(small_net: Callable[[str], Any]) -> None:
    model, x, wanted = prepared(small_net("plain"))
    number, group = next((at, one) for at, one in enumerate(groups(model)) if one.makers and one.readers)
    twins = graph.copy(model)
    for item in twins.graph.initializer:
        value = graph.array(item).copy()
        for member in group.members:
            if member.weight == item.name and member.role == "makes":
                of = np.moveaxis(value, member.axis, 0)
                of[member.index[1]] = 0.5 * of[member.index[0]]
                item.CopyFrom(graph.tensor(item.name, value))
    wanted = told(twins, x)
    without = Shrink({number: tuple(unit for unit in range(group.size) if unit != 1)})
    small = without.apply(twins)
    better = compensated(twins, small, survivors(twins, without.keep), x)
    assert apart(wanted, small, x) > 100 * apart(wanted, better, x)


def test_layers_that_share_a_bias_are_each_given_their_own(small_net: Callable[[str], Any]) -> None:
    model = graph.copy(prepared(small_net("residual"))[0])
    convs = [node for node in model.graph.node if node.op_type == "Conv"][:3]  # of one width
    for node in convs:
        node.input[2] = convs[0].input[2]
    parted = with_biases(model)
    own = [node.input[2] for node in parted.graph.node if node.op_type == "Conv"][:3]
    assert len(set(own)) == len(convs)
    shared = graph.arrays(model)[convs[0].input[2]]
    assert all(np.array_equal(graph.arrays(parted)[name], shared) for name in own)


def test_where_nothing_went_nothing_changes_and_a_branch_that_went_is_made_up_for(
    small_net: Callable[[str], Any],
) -> None:
    model, x, wanted = prepared(small_net("residual"))
    same = compensated(model, model, {}, x)
    for name, value in graph.arrays(same).items():
        np.testing.assert_allclose(value, graph.arrays(model)[name], atol=1e-4)
    without = Shrink({}, tuple(branch.add for branch in branches(model)))
    small = without.apply(model)
    assert apart(wanted, compensated(model, small, {}, x), x) < 0.9 * apart(wanted, small, x)
