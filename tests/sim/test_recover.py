"""What least squares brings back after pruning, without a label."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from compress import channels, graph, saliency
from compress.passes.canonicalise import canonicalise
from compress.recover import recover
from skills import ort


def wrong(model: Any, net: Any) -> float:
    logits = ort.session(model.SerializeToString()).run({"x": net.x})["logits"]
    return float(np.mean(logits.argmax(axis=1) != net.y))


@pytest.mark.parametrize("kind", ["plain", "residual", "depthwise"])
def test_refitting_makes_up_for_most_of_what_pruning_cost(small_net: Callable[[str], Any], kind: str) -> None:
    net = small_net(kind)
    model = canonicalise(net.model)
    weights = graph.arrays(model)
    keep = {
        at: np.sort(np.argsort(-saliency.magnitude(weights, group))[: channels.rounded(group.size * 0.6, 4)])
        for at, group in enumerate(channels.groups(model))
    }
    smaller = channels.shrink(model, keep)
    before = smaller.SerializeToString()
    told: list[float] = []
    better = recover(model, smaller, keep, net.x[:200], told.append)
    assert smaller.SerializeToString() == before
    assert told == sorted(told)
    assert told[-1] == 1
    assert wrong(better, net) - wrong(model, net) < 0.34 * (wrong(smaller, net) - wrong(model, net))


def test_a_model_that_lost_nothing_is_not_refitted(small_net: Callable[[str], Any]) -> None:
    net = small_net("residual")
    model = canonicalise(net.model)
    same = recover(model, channels.shrink(model, {}), {}, net.x[:8], lambda done: None)
    assert same.graph.node == model.graph.node
    for name, value in graph.arrays(model).items():
        assert np.array_equal(graph.arrays(same)[name], value)


def test_the_layers_behind_a_removed_branch_make_up_for_it(small_net: Callable[[str], Any]) -> None:
    net = small_net("residual")
    model = canonicalise(net.model)
    smaller = channels.shrink(model, {}, channels.branches(model))
    better = recover(model, smaller, {}, net.x[:200], lambda done: None)
    assert wrong(better, net) < 0.5 * wrong(smaller, net)
