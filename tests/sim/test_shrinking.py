"""Which parts go, and that removed parts really count as zeros everywhere."""

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest

from compress import graph
from compress.channels import branches
from compress.graph import with_biases
from compress.measure import answers, divergence
from compress.passes.canonicalise import canonicalise
from compress.shrinking import Shrink, Spared, _Probe, choose, cost, lift
from skills import ort

KINDS = ["plain", "residual", "depthwise", "squeeze", "conv1d", "transformer"]


def prepared(net: Any) -> tuple[Any, Any, Any]:
    """Return the canonicalised model, some inputs and what it answers to them."""
    model = with_biases(canonicalise(net.model))
    x = net.x[:48]
    return model, x, answers(ort.session(model.SerializeToString()), x)


@pytest.mark.parametrize("kind", KINDS)
def test_as_much_goes_as_was_asked_for_and_the_ends_of_the_graph_stay(
    kind: str, small_net: Callable[[str], Any]
) -> None:
    model, x, wanted = prepared(small_net(kind))
    for spared in get_args(Spared):
        found = choose(model, Shrink(), x, wanted, 0.7, spared)
        small = found.apply(model)
        assert cost(small, model, spared) <= 0.7
        for before, after in zip(model.graph.input, small.graph.input, strict=True):
            assert before == after
        assert [item.name for item in small.graph.output] == [item.name for item in model.graph.output]
        assert answers(ort.session(small.SerializeToString()), x).shape == wanted.shape


def test_what_is_chosen_later_goes_on_from_what_went_before(small_net: Callable[[str], Any]) -> None:
    model, x, wanted = prepared(small_net("residual"))
    first = choose(model, Shrink(), x, wanted, 0.8, "latency")
    second = choose(model, first, x, wanted, 0.6, "latency")
    assert set(first.without) <= set(second.without)
    for number, kept in first.keep.items():
        assert set(second.keep[number]) <= set(kept)
    assert choose(model, second, x, wanted, 0.9, "latency") == second


@pytest.mark.parametrize("kind", KINDS)
def test_the_harm_by_masks_is_that_of_the_really_smaller_graph(kind: str, small_net: Callable[[str], Any]) -> None:
    model, x, wanted = prepared(small_net(kind))
    probe = _Probe(model, x, wanted, 0, 1, classes=True)
    assert probe.harm(Shrink()) == pytest.approx(0, abs=1e-5)
    steps = probe.candidates(Shrink())
    assert steps
    for step in steps:
        real = divergence(wanted, answers(ort.session(step.apply(model).SerializeToString()), x), classes=True)
        assert probe.harm(step) == pytest.approx(real, rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_lifting_puts_every_weight_back_and_shrinking_again_gives_the_same_bytes(
    kind: str, small_net: Callable[[str], Any]
) -> None:
    model, x, wanted = prepared(small_net(kind))
    done = choose(model, Shrink(), x, wanted, 0.7, "latency")
    trained = done.apply(model)
    chance = np.random.default_rng(1)
    for item in trained.graph.initializer:
        value = graph.array(item)
        if value.dtype == np.float32:
            changed = value + chance.standard_normal(value.shape).astype(np.float32)
            item.CopyFrom(graph.tensor(item.name, changed.astype(np.float32)))
    lifted = lift(model, done, trained)
    assert done.apply(lifted).SerializeToString() == trained.SerializeToString()
    shapes = {name: value.shape for name, value in graph.arrays(model).items()}
    assert {name: value.shape for name, value in graph.arrays(lifted).items()} == shapes


def test_a_branch_that_went_with_channels_can_be_lifted_too(small_net: Callable[[str], Any]) -> None:
    model, _, _ = prepared(small_net("residual"))
    done = Shrink({}, tuple(branch.add for branch in branches(model)))
    trained = done.apply(model)
    assert len(trained.graph.node) < len(model.graph.node)
    assert done.apply(lift(model, done, trained)).SerializeToString() == trained.SerializeToString()


def test_channels_that_a_kernel_computes_anyway_are_no_saving_of_time(small_net: Callable[[str], Any]) -> None:
    model, x, wanted = prepared(small_net("plain"))
    found = choose(model, Shrink(), x, wanted, 0.6, "size")
    small = found.apply(model)
    widths = {name: value.shape[0] for name, value in graph.arrays(small).items() if value.ndim == 4}
    assert any(width < 16 for width in widths.values())
    assert cost(small, model, "latency") < 1
    assert cost(small, model, "latency", 64) == pytest.approx(1)  # all of them fit into one block, and did before
