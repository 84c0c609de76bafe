"""Where the bytes of a file went, on files that the emitter wrote."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from compress import profiles
from compress.emit import emit
from compress.packing import pack
from compress.passes.canonicalise import canonicalise
from compress.pieces import GRAPH, SCALES, pieces, weights
from compress.scheme import Layer, Range, Scheme

Build = Callable[[str], Any]


def test_the_weights_of_a_float_model_are_found_and_all_adds_up(small_net: Build) -> None:
    file = small_net("plain").model.SerializeToString()
    found = pieces(file)
    assert list(found) == [weights(32), SCALES, GRAPH]
    assert sum(found.values()) == len(file)
    assert found[weights(32)] > 0.5 * len(file)


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1.6])
def test_packed_weights_are_told_by_their_width(bits: float, small_net: Build) -> None:
    model = canonicalise(small_net("plain").model)
    layers = tuple(
        Layer(node.name, node.op_type, node.input[1], 0, tuple(weight.dims), bits=bits if at else 8)
        for at, (node, weight) in enumerate(convolutions(model))
    )
    ranges = {name: Range(-4.0, 4.0) for node, _ in convolutions(model) for name in (node.input[0], node.output[0])}
    scheme = Scheme(layers, ranges, profiles.find("x86-vnni"))
    file = emit(model, scheme, {}).SerializeToString()
    found = pieces(file)
    assert sum(found.values()) == len(file)
    narrow = sum(layer.count for layer in layers if layer.bits == bits)
    planes = sum(plane.nbytes for plane in pack(np.zeros(-(-narrow // 40) * 40, np.int8), bits)) if bits < 8 else narrow
    assert found[weights(bits)] == pytest.approx(planes, abs=24)
    assert set(found) <= {weights(32), weights(8), weights(bits), SCALES, GRAPH}


def convolutions(model: Any) -> list[tuple[Any, Any]]:
    known = {item.name: item for item in model.graph.initializer}
    return [(node, known[node.input[1]]) for node in model.graph.node if node.op_type == "Conv"]
