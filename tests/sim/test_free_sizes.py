"""A model with sizes that are free, or follow the data: what is cut from it takes every size that the whole takes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, helper, numpy_helper

from cloud.split import plan as planning
from cloud.split.check import check_plan
from cloud.split.graph import free_types, observed_types
from edge_agent.infer import SplitModel
from edge_agent.tail_fake import FakeClock, FakeTail
from skills import ort
from skills.plain import uncoded

FLOAT, BOOL = 1, 9


def graph(
    nodes: list[Any], stored: dict[str, Any], takes: list[Any], gives: tuple[str, list[Any] | None]
) -> ModelProto:
    body = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", FLOAT, takes)],
        [helper.make_tensor_value_info(gives[0], FLOAT, gives[1])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def weights(*shape: int) -> np.ndarray:
    return (np.random.default_rng(shape).normal(size=shape) / np.prod(shape[1:]) ** 0.5).astype(np.float32)


def listener(steps: int | str = "t") -> ModelProto:
    """Convolutions along time, [n, 3, t]; fewer than five steps are too few for them."""
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a0"], pads=[1, 1]),
        helper.make_node("Relu", ["a0"], ["a"]),
        helper.make_node("Conv", ["a", "w1"], ["b0"], pads=[1, 1], strides=[2]),
        helper.make_node("Relu", ["b0"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["c0"], strides=[2]),
        helper.make_node("Relu", ["c0"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Reshape", ["p", "flat"], ["f"]),
        helper.make_node("Gemm", ["f", "w3"], ["logits"], transB=1),
    ]
    stored = {"w0": weights(8, 3, 3), "w1": weights(8, 8, 3), "w2": weights(4, 8, 3), "w3": weights(10, 4)}
    return graph(nodes, {**stored, "flat": np.array([0, -1])}, ["n", 3, steps], ("logits", ["n", 10]))


def picker() -> ModelProto:
    """A detector in small: the rows of a map that are lively enough, as many as there are, in a batch of exactly one."""
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a0"], pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Relu", ["a0"], ["a"]),
        helper.make_node("Transpose", ["a"], ["t"], perm=[0, 2, 3, 1]),
        helper.make_node("Reshape", ["t", "rows"], ["r"]),
        helper.make_node("ReduceMax", ["r", "last"], ["m"], keepdims=0),
        helper.make_node("Greater", ["m", "limit"], ["k"]),
        helper.make_node("NonZero", ["k"], ["i0"]),
        helper.make_node("Reshape", ["i0", "all"], ["i"]),
        helper.make_node("Gather", ["r", "i"], ["picked"], axis=0),
        helper.make_node("MatMul", ["picked", "w1"], ["d"]),
        helper.make_node("Softmax", ["d"], ["found"], axis=0),
    ]
    stored = {
        "w0": weights(8, 1, 3, 3), "w1": weights(8, 6), "rows": np.array([-1, 8]), "last": np.array([1]),
        "all": np.array([-1]), "limit": np.float32(0.9),
    }  # fmt: skip
    return graph(nodes, stored, [1, 1, 16, 16], ("found", ["k", 6]))


@dataclasses.dataclass(frozen=True, slots=True)
class Planned:
    folder: Path
    model: bytes
    report: Any
    x: np.ndarray


def planned(model: ModelProto, x: np.ndarray, folder: Path) -> Planned:
    """Plan with every cut of the shortlist, whatever it costs."""
    raw = model.SerializeToString()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "worth_cutting", lambda cuts, **_: frozenset(cut.name for cut in cuts))
        report = planning.split(
            raw, {"x": x}, out=folder, slowdown=10, rounds=2, most_samples=12, most_gate=24, max_drop=100
        )
    return Planned(folder, raw, report, x)


@pytest.fixture(scope="module")
def listening(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    x = np.random.default_rng(1).normal(size=(24, 3, 16)).astype(np.float32)
    return planned(listener(), x, tmp_path_factory.mktemp("listener") / "plan")


def test_a_plan_made_of_sixteen_steps_answers_twenty_four_wherever_it_runs(listening: Planned) -> None:
    x = np.random.default_rng(2).normal(size=(1, 3, 24)).astype(np.float32)
    right = ort.session(listening.model).run({"x": x})["logits"]
    alone = SplitModel(listening.folder)
    np.testing.assert_allclose(alone(x=x)["logits"], right, atol=1e-5)
    assert (alone.last.where, alone.last.reason) == ("local", "no link")
    clock = FakeClock()
    tail = FakeTail(listening.folder, clock)
    model = SplitModel(listening.folder, link=tail, clock=clock)
    cuts = [cut.name for cut in model.plan.cuts if cut.name.startswith("c")]
    assert any(-1 in tensor.shape[1:] for name in cuts for tensor in model.plan.cut(name).tensors)
    for name in ("input", *cuts):
        for coding in model.plan.cut(name).codings:
            model.use(name, coding)
            found = model(x=x)["logits"]
            assert (model.last.where, model.last.reason) == ("cloud" if name == "input" else "split", "")
            np.testing.assert_allclose(found, right, atol=1.0 if coding.kind == "u4" else 0.1)
        tail.silent = True
        np.testing.assert_allclose(model(x=x)["logits"], right, atol=1e-5)
        assert model.last.where == "continued"
        tail.silent = False


def test_a_plan_with_free_sizes_is_sound_and_says_what_its_figures_hold_for(listening: Planned, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(listening.model)
    assert check_plan(listening.folder, tmp_path / "net.onnx").faults == ()
    (said,) = json.loads((listening.folder / "report.json").read_text())["warnings"]
    assert said.startswith(
        "the model leaves sizes of 'x' free: the plan answers every size that it takes, but its times,"
    )


def test_a_cut_with_free_sizes_weighs_what_it_weighs_on_the_data(listening: Planned) -> None:
    plan = listening.report.plan
    weights = {cut.tensors[0].name: cut.codings[0].bytes_p50 for cut in uncoded(plan).cuts if cut.tensors}
    assert weights.items() >= {"x": 3 * 16 * 4, "b": 8 * 8 * 4}.items()
    assert all(cut.memory_mb > 0 for cut in plan.cuts if cut.after)


def test_samples_that_give_other_sizes_inside_are_planned_and_answered(tmp_path: Path) -> None:
    chance = np.random.default_rng(3)
    x = (chance.normal(size=(24, 1, 16, 16)) * (0.3 + chance.random((24, 1, 1, 1)))).astype(np.float32)
    made = planned(picker(), x, tmp_path / "plan")
    whole = ort.session(made.model)
    rights = [whole.run({"x": one[None]})["found"] for one in x]
    assert len({len(right) for right in rights}) > 5
    assert made.report.plan.outputs[0].shape == (-1, 6)
    (cut,) = (one for one in made.report.plan.cuts if [live.name for live in one.tensors] == ["picked"])
    assert cut.tensors[0].shape == (-1, 8)
    assert cut.raw_bytes > 0
    assert made.report.plan.metric == "fidelity"
    clock = FakeClock()
    alone, model = SplitModel(made.folder), SplitModel(made.folder, link=FakeTail(made.folder, clock), clock=clock)
    model.use(cut.name, cut.codings[0])
    for one, right in zip(x, rights, strict=True):
        np.testing.assert_allclose(alone(x=one[None])["found"], right, atol=1e-5)
        np.testing.assert_allclose(model(x=one[None])["found"], right, atol=0.1)
        assert model.last.where == ("split" if right.size else "continued")  # nothing found: there is nothing to send
    (tmp_path / "net.onnx").write_bytes(made.model)
    assert check_plan(made.folder, tmp_path / "net.onnx").faults == ()


def test_behind_what_follows_the_data_only_proven_sizes_are_fixed() -> None:
    x = np.random.default_rng(3).normal(size=(1, 1, 16, 16)).astype(np.float32)
    shapes = {name: shape for name, (_, shape) in free_types(picker(), observed_types(picker(), {"x": x})).items()}
    assert (shapes["a"], shapes["r"], shapes["k"]) == ((1, 8, 8, 8), (64, 8), (64,))
    assert (shapes["i0"], shapes["picked"], shapes["d"]) == ((1, -1), (-1, 8), (-1, 6))


def test_what_a_file_says_of_its_insides_proves_nothing() -> None:
    model = listener()
    model.graph.value_info.append(helper.make_tensor_value_info("b", FLOAT, ["n", 8, 8]))
    seen = observed_types(model, {"x": np.ones((1, 3, 16), np.float32)})
    found = free_types(model, seen)
    assert (seen["b"][1], found["b"][1], found["p"][1]) == ((-1, 8, 8), (-1, 8, -1), (-1, 4, 1))


def test_no_cut_crosses_a_tensor_whose_number_of_sizes_depends_on_a_free_one() -> None:
    def branch(op: str) -> Any:
        nodes = [helper.make_node(op, ["a", *(["two"] if op == "Squeeze" else [])], [op])]
        return helper.make_graph(nodes, op, [], [helper.make_empty_tensor_value_info(op)])

    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Shape", ["a"], ["s"]),
        helper.make_node("Gather", ["s", "two"], ["t"]),
        helper.make_node("Equal", ["t", "one"], ["alone"]),
        helper.make_node("If", ["alone"], ["b"], then_branch=branch("Squeeze"), else_branch=branch("Identity")),
        helper.make_node("Abs", ["b"], ["y"]),
    ]
    model = graph(nodes, {"one": np.array([1]), "two": np.array([2])}, ["n", 3, "t"], ("y", None))
    seen = observed_types(model, {"x": np.ones((1, 3, 16), np.float32)})
    found = free_types(model, seen)
    assert set(seen) - set(found) == {"b"}
    assert found["y"][1] == (-1, -1, -1)


@pytest.mark.parametrize("kind", ["plain", "residual", "squeeze", "conv1d", "lstm", "transformer"])
def test_with_a_free_batch_alone_everything_is_as_it_was_seen(kind: str, small_net: Any) -> None:
    net = small_net(kind)
    seen = observed_types(net.model, {"x": net.x})
    assert free_types(net.model, seen) == seen


def test_a_loop_gives_free_sizes_only_where_the_data_say_how_often_it_runs_or_how_much_it_finds() -> None:
    def looping(goes_on: list[Any], found: list[Any]) -> ModelProto:
        ends = [helper.make_empty_tensor_value_info(name) for name in ("on", "now", "each")]
        takes = [helper.make_empty_tensor_value_info(name) for name in ("i", "go", "was")]
        takes[0].CopyFrom(helper.make_tensor_value_info("i", 7, []))
        takes[1].CopyFrom(helper.make_tensor_value_info("go", BOOL, []))
        twice = helper.make_node("Add", ["was", "was"], ["now"])
        body = helper.make_graph([twice, *goes_on, *found], "body", takes, ends)
        nodes = [helper.make_node("Loop", ["times", "", "x"], ["last", "y"], body=body)]
        return graph(nodes, {"times": np.int64(3), "limit": np.float32(9), "rest": np.array([-1])}, [1, 4], ("y", None))

    always = [helper.make_node("Identity", ["go"], ["on"])]
    until = [
        helper.make_node("ReduceMax", ["now"], ["top"], keepdims=0),
        helper.make_node("Less", ["top", "limit"], ["on"]),
    ]
    given = [helper.make_node("Reshape", ["now", "rest"], ["each"])]
    picked = [helper.make_node("NonZero", ["now"], ["each"])]
    x = {"x": np.ones((1, 4), np.float32)}
    seen = [observed_types(one, x) for one in (looping(always, given), looping(until, given), looping(always, picked))]
    assert [one["y"][1] for one in seen] == [(3, 4), (3, 4), (3, 2, 4)]
    assert free_types(looping(always, given), seen[0]) == seen[0]
    assert free_types(looping(until, given), seen[1])["y"][1] == (-1, -1)
    assert free_types(looping(always, picked), seen[2])["y"][1] == (-1, -1, -1)
