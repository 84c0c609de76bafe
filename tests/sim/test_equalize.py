"""Channels of very different size are evened out, without changing what the model computes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from compress import graph, profiles
from compress.data import Data
from compress.measure import answers
from compress.metrics import choose
from compress.passes.canonicalise import canonicalise
from compress.passes.equalize import EQUALIZE, equalized, links
from compress.passes.ranges import RANGES
from compress.pipeline import Bench, State
from compress.splits import split
from skills import ort


def prepared(model: Any, net: Any) -> tuple[State, Bench]:
    samples = Data(net.x, net.y)
    parts = split(samples, 0)
    session = ort.session(model.SerializeToString())
    original = [answers(session, part.x) for part in (parts.calibrate, parts.select)]
    metric = choose(samples, original[0][:1], net.x[:1])
    bench = Bench(profiles.find("x86-avx2"), parts, metric, *original, 1.0, "both", lambda _share, _best: None)
    return RANGES.run(State(model), bench), bench


def uneven(model: Any) -> Any:
    """Return the model with each channel between linked layers scaled by its own large or small factor."""
    model = graph.copy(model)
    values = {name: np.array(value) for name, value in graph.arrays(model).items()}
    for at, link in enumerate(links(model)):
        factor = np.exp(np.random.default_rng(at).uniform(-4, 4, link.first.shape[0])).astype(np.float32)
        values[link.first.weight] *= factor.reshape(-1, 1, 1, 1)
        values[link.bias] *= factor
        values[link.second.weight] /= factor.reshape(1, -1, 1, 1)
    graph.replace(
        model.graph.initializer, [graph.tensor(item.name, values[item.name]) for item in model.graph.initializer]
    )
    return model


@pytest.mark.parametrize("kind", ["plain", "residual", "depthwise"])
def test_evened_out_channels_compute_the_same(kind: str, small_net: Callable[[str], Any]) -> None:
    net = small_net(kind)
    model = canonicalise(net.model)
    state, _ = prepared(model, net)
    before, after = (
        answers(ort.session(m.SerializeToString()), net.x[:50]) for m in (model, equalized(model, state.seen()))
    )
    assert np.allclose(before, after, atol=1e-4)


def test_uneven_channels_are_evened_out_and_even_ones_left_alone(small_net: Callable[[str], Any]) -> None:
    net = small_net("plain")
    model = canonicalise(net.model)
    state, bench = prepared(uneven(model), net)
    done = EQUALIZE.run(state, bench)
    assert done.model is not state.model
    assert done.notes[-1].endswith(": kept.")
    even, bench = prepared(equalized(model, prepared(model, net)[0].seen()), net)
    assert EQUALIZE.run(even, bench).model is even.model
