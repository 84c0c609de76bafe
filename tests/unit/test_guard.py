"""Which layers may compute in float, and when they do."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from compress import graph
from compress.passes.canonicalise import canonicalise
from compress.passes.guard import LEAST_GAIN, MORE_GAIN, candidates, quickest
from compress.passes.place import PLACE
from compress.passes.ranges import RANGES
from compress.pipeline import Bench, State
from compress.profiles import find

NOTHING: Any = None


def state(*groups: int) -> tuple[State, Bench]:
    """A chain of convolutions of eight channels, each in so many groups, and a bench to place it on."""
    nodes, stored, name = [], [], "x"
    for at, count in enumerate(groups):
        stored.append(graph.tensor(f"w{at}", np.ones((8, 8 // count, 3, 3), np.float32)))
        nodes.append(helper.make_node("Conv", [name, f"w{at}"], [f"t{at}"], f"c{at}", kernel_shape=[3, 3], group=count))
        name = f"t{at}"
    ends = [
        helper.make_tensor_value_info("x", 1, ["n", 8, 12, 12]), helper.make_tensor_value_info(name, 1, ["n", 8, None, None])
    ]  # fmt: skip
    body = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    model = canonicalise(helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))

    class Splits:
        class calibrate:  # noqa: N801
            x = np.random.default_rng(0).normal(size=(4, 8, 12, 12)).astype(np.float32)

    bench = Bench(find("x86-vnni"), Splits, NOTHING, NOTHING, NOTHING, 1.0, "both", lambda *_: None)  # type: ignore[arg-type]
    return PLACE.run(RANGES.run(State(model), bench), bench), bench


@pytest.mark.parametrize(
    ("groups", "in_float"),
    [
        ((1, 1), [{}, {"c0"}, {"c0", "c1"}]),
        ((1, 8), [{}, {"c1"}, {"c0"}, {"c0", "c1"}, {"c0", "c1"}]),
    ],
)
def test_the_ways_leave_depthwise_layers_the_first_layer_or_both_in_float(groups: Any, in_float: Any) -> None:
    ways = candidates(*state(*groups))
    floats = [{layer.node for layer in way.layers if layer.compute == "float"} for way in ways.values()]
    assert [set(one) for one in in_float] == floats
    assert len(ways) == len(floats)


def test_a_layer_in_float_reads_floats_and_what_follows_reads_codes() -> None:
    ways = candidates(*state(1, 1, 1))
    assert "x" in ways["int8"].ranges
    assert "x" not in ways["int8 but for the first layer"].ranges
    assert "t0" in ways["int8 but for the first layer"].ranges


@pytest.mark.parametrize(
    ("times", "taken"),
    [
        ({"int8": 1.0, "float": 2.0}, "int8"), ({"int8": 1.0, "float": 1.01}, "float"),
        ({"int8": 1.0, "more": 0.98, "float": 2.0}, "int8"), ({"int8": 1.0, "more": 0.9, "float": 2.0}, "more"),
        ({"int8": 1.0, "more": 0.9, "most": 0.89, "float": 2.0}, "more"), ({"int8": 1.0, "more": 0.9, "float": 0.9}, "float"),
        ({"int8": 1.0, "more": 0.97, "float": 1.0}, "more"), ({"int8": 1.0, "more": 0.99, "float": 1.03}, "int8"),
    ],
)  # fmt: skip
def test_the_quickest_way_wins_unless_a_simpler_one_is_as_quick(times: dict[str, float], taken: str) -> None:
    assert quickest(times) == taken


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=5))
def test_what_is_taken_is_never_clearly_slower_than_another(times: list[float]) -> None:
    ways = {str(at): value for at, value in enumerate(times)}
    assert ways[quickest(ways)] <= min(times) * MORE_GAIN


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=5))
def test_float_is_taken_exactly_where_no_way_wins_enough_over_it(times: list[float]) -> None:
    *others, in_float = times
    taken = quickest({str(at): value for at, value in enumerate(times)})
    assert (taken == str(len(others))) is (in_float < LEAST_GAIN * min(others))
