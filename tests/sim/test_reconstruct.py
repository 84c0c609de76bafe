"""Layer after layer: the rounded net keeps the original's answers where plain rounding loses them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from compress import graph, profiles
from compress.data import Data
from compress.emit import emit
from compress.measure import answers, divergence
from compress.metrics import choose
from compress.passes.bias import BIAS
from compress.passes.bits import BITS
from compress.passes.canonicalise import CANONICALISE
from compress.passes.place import PLACE
from compress.passes.ranges import RANGES
from compress.passes.reconstruct import Fit, Problem, rebuild, walk
from compress.pipeline import Bench, State
from compress.scheme import Scheme
from compress.splits import split
from skills import ort

CHANCE = np.random.default_rng(5)


@dataclasses.dataclass(frozen=True, slots=True)
class Net:
    """A model with inputs, and as labels what it answers itself."""

    model: Any
    x: Any
    y: Any


def of_nodes(nodes: list[Any], stored: dict[str, Any], shape: list[int]) -> Net:
    body = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", 1, ["n", *shape])],
        [helper.make_tensor_value_info("y", 1, ["n", 5])],
        [graph.tensor(name, np.asarray(v, np.int64 if name == "axes" else np.float32)) for name, v in stored.items()],
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    x = np.cumsum(CHANCE.standard_normal((300, *shape)), axis=-1).astype(np.float32)
    return Net(model, x, ort.session(model.SerializeToString()).run({"x": x})["y"].argmax(1).astype(np.int64))


def conv1d() -> Net:
    stored = {"w1": CHANCE.standard_normal((32, 3, 5)) / 4, "w2": CHANCE.standard_normal((32, 8, 3)) / 4}
    stored |= {"b1": CHANCE.standard_normal(32), "w3": CHANCE.standard_normal((5, 32)) / 4, "b3": np.zeros(5)}
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], "first", strides=[2], pads=[2, 2]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["c"], "grouped", group=4, dilations=[2], pads=[2, 2]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("GlobalAveragePool", ["d"], ["e"]),
        helper.make_node("Flatten", ["e"], ["f"]),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], "head", transB=1),
    ]
    return of_nodes(nodes, stored, [3, 40])


def transformer() -> Net:
    stored = {name: CHANCE.standard_normal((16, 16)) / 4 for name in ("wq", "wk", "wv")}
    stored |= {"w1": CHANCE.standard_normal((16, 32)) / 4, "w2": CHANCE.standard_normal((32, 5)) / 5}
    stored |= {"axes": [1], "b1": CHANCE.standard_normal(32), "g": np.ones(16), "h": np.zeros(16)}
    nodes = [
        helper.make_node("LayerNormalization", ["x", "g", "h"], ["n1"], "norm"),
        *(helper.make_node("MatMul", ["n1", f"w{at}"], [at], at) for at in "qkv"),
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["s"], "scores"),
        helper.make_node("Softmax", ["s"], ["p"]),
        helper.make_node("MatMul", ["p", "v"], ["o"], "mix"),
        helper.make_node("Add", ["o", "x"], ["r"]),
        helper.make_node("MatMul", ["r", "w1"], ["u"], "up"),
        helper.make_node("Add", ["u", "b1"], ["ub"]),
        helper.make_node("Relu", ["ub"], ["ur"]),
        helper.make_node("MatMul", ["ur", "w2"], ["t"], "down"),
        helper.make_node("ReduceMean", ["t", "axes"], ["y"], keepdims=0),
    ]
    return of_nodes(nodes, stored, [6, 16])


def prepared(net: Any, seed: int = 0) -> tuple[State, Bench]:
    state = CANONICALISE.run(State(net.model), None)  # type: ignore[arg-type] - it never looks at its bench
    samples = Data(net.x, net.y)
    parts = split(samples, seed)
    session = ort.session(state.model.SerializeToString())
    original = [answers(session, part.x) for part in (parts.calibrate, parts.select)]
    metric = choose(samples, original[0][:1], net.x[:1])
    bench = Bench(profiles.find("x86-avx2"), parts, metric, *original, 3.0, "both", lambda _share, _best: None)
    return PLACE.run(RANGES.run(state, bench), bench), bench


def at_width(scheme: Scheme, bits: float) -> Scheme:
    return scheme.with_bits({layer.node: bits for layer in scheme.layers})


def off(state: State, bench: Bench, scheme: Scheme) -> float:
    session = ort.session(emit(state.model, scheme, state.seen()).SerializeToString())
    return divergence(bench.original_select, answers(session, bench.splits.select.x), classes=True)


@pytest.fixture
def net_of(small_net: Callable[[str], Any]) -> Callable[[str], Any]:
    own = {"conv1d": conv1d, "transformer": transformer}
    return lambda kind: own[kind]() if kind in own else small_net(kind)


KINDS = ["plain", "residual", "depthwise", "conv1d", "transformer"]


@pytest.mark.parametrize("kind", KINDS)
def test_rebuilt_three_bit_nets_stay_nearer_to_the_original_on_data_they_never_saw(
    kind: str, net_of: Callable[[str], Any]
) -> None:
    state, bench = prepared(net_of(kind))
    scheme = at_width(state.planned(), 3)
    rebuilt = rebuild(state.model, scheme, bench.splits.calibrate.x)
    assert off(state, bench, rebuilt) < 0.6 * off(state, bench, scheme)


def test_the_mean_answer_of_each_layer_is_right_on_the_calibration_data(net_of: Callable[[str], Any]) -> None:
    state, bench = prepared(net_of("conv1d"))
    found: dict[str, tuple[Problem, Fit]] = {}

    def choose(problem: Problem) -> Fit:
        found[problem.layer.node] = (problem, problem.fit(2))
        return found[problem.layer.node][1]

    walk(state.model, state.planned(), bench.splits.calibrate.x, choose, lambda _share: None)
    assert set(found) == {"first", "grouped", "head"}
    for problem, fit in found.values():
        seen = problem.moments
        rows = fit.codes.restore().reshape(len(seen.inputs), -1, seen.inputs.shape[1])
        weight = problem.weight.reshape(rows.shape)
        wanted = (weight @ seen.inputs[..., None])[..., 0] + seen.missing
        assert fit.bias is not None
        got = (rows @ seen.inputs[..., None])[..., 0] + fit.bias.reshape(wanted.shape)
        assert np.abs(got - wanted).max() < 1e-4 * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize("kind", KINDS)
def test_widths_are_chosen_within_the_budget_and_everything_tried_is_kept(
    kind: str, net_of: Callable[[str], Any]
) -> None:
    net = net_of(kind)
    state, bench = prepared(net)
    state = BITS.run(BIAS.run(state, bench), bench)
    chosen = next(one for one in state.tried if one.scheme is state.scheme)
    assert chosen.drop <= bench.max_drop
    assert chosen.bytes < state.tried[0].bytes
    assert set(state.harm) == {layer.node for layer in state.planned().layers if layer.count >= 64}
    report = bench.splits.report
    model = emit(state.model, state.planned(), state.seen()).SerializeToString()
    right = [
        (answers(ort.session(m), report.x).argmax(1) == report.y).mean() for m in (net.model.SerializeToString(), model)
    ]
    assert right[1] > right[0] - 0.08


@pytest.mark.parametrize("kind", ["plain", "depthwise"])
def test_what_is_offered_runs_from_all_in_8_bits_to_the_smallest_without_a_leap(
    kind: str, net_of: Callable[[str], Any]
) -> None:
    state, bench = prepared(net_of(kind))
    state = BITS.run(BIAS.run(state, bench), bench)
    assert state.safer
    offered = [*state.safer, state.planned(), *state.bolder]
    tried = [next(one for one in state.tried if one.scheme is scheme) for scheme in offered]
    sizes = [one.bytes for one in tried]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] < state.tried[0].bytes
    assert all(one.drop <= bench.max_drop / 2 for one in tried[: len(state.safer) + 1])


def test_the_same_seed_gives_the_same_scheme(net_of: Callable[[str], Any]) -> None:
    files = []
    for _ in range(2):
        state, bench = prepared(net_of("depthwise"))
        state = BITS.run(BIAS.run(state, bench), bench)
        files.append(emit(state.model, state.planned(), state.seen()).SerializeToString())
    assert files[0] == files[1]


def test_a_spent_time_budget_ends_the_search_with_what_there_is(net_of: Callable[[str], Any]) -> None:
    state, bench = prepared(net_of("plain"))
    state = BITS.run(state, dataclasses.replace(bench, left=lambda: 0.0))
    assert len(state.tried) == 1
    assert state.scheme is state.tried[0].scheme


@pytest.mark.parametrize(("budget", "fitted"), [(31.0, ["first", "grouped", "head"]), (25.0, ["first", "grouped"])])
def test_no_layer_and_no_model_is_begun_that_cannot_be_finished_in_the_time_left(
    budget: float, fitted: list[str], net_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, bench = prepared(net_of("conv1d"))
    now, seen, fit = [0.0], dict[str, None](), Problem.fit

    def slow(problem: Problem, bits: float) -> Fit:
        seen[problem.layer.node] = None
        now[0] += 2.0  # five widths a layer
        return fit(problem, bits)

    monkeypatch.setattr(Problem, "fit", slow)
    bench = dataclasses.replace(bench, left=lambda: budget - now[0])
    state = BITS.run(state, bench)
    assert list(seen) == fitted
    assert now[0] <= 1.1 * budget
    assert state.cut_short
    assert state.scheme is state.tried[0].scheme
