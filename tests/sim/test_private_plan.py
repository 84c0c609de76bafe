"""A private plan with its audit, end to end: only a cut that was shown to keep the input may be used."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

from cloud.split import privacy, split
from skills.network import Link
from skills.split import admitted


def test_what_an_audit_does_not_call_private_is_never_used_and_the_report_says_so(
    small_net: Any, tmp_path: Path
) -> None:
    net, out = small_net("plain"), tmp_path / "out"
    report = split(
        net.model.SerializeToString(), {"x": net.x[:220]}, out=out, private=True, audit=True, rounds=1, most_samples=4,
        most_gate=220, links=(Link(1000, 0.1),), max_drop=50,
    )  # fmt: skip
    true = [cut for cut in report.plan.cuts if cut.name.startswith("c")]
    assert true
    assert all(cut.leak is not None and cut.leak.inputs == 220 for cut in true)
    private = {cut.name for cut in true if cut.leak is not None and cut.leak.verdict == "private"}
    assert {cut.name for cut, coding in admitted(report.plan) if coding is not None} <= private
    said = json.loads((out / "report.json").read_text())
    assert said["privacy_audit"]["control"] > 0.6
    assert "no guarantee" in said["privacy"]
    assert all(f"{cut.name} is " in said["privacy"] for cut in true)


def two_inputs() -> bytes:
    """Nothing of `settings` gets through, all of `values` does."""
    chance = np.random.default_rng(0)
    weights = {
        "w": chance.normal(size=(2, 2)),
        "nought": np.zeros(1),
        "v": chance.normal(size=(8, 8)),
        "u": np.ones((8, 3)),
    }
    node = helper.make_node
    nodes = [
        node("MatMul", ["settings", "w"], ["s"]), node("Mul", ["s", "nought"], ["none"]),
        node("ReduceSum", ["none"], ["bias"], keepdims=1), node("MatMul", ["values", "v"], ["mixed"]),
        node("Add", ["mixed", "bias"], ["cut"]), node("Sigmoid", ["cut"], ["squashed"]), node("MatMul", ["squashed", "u"], ["y"]),
    ]  # fmt: skip
    ports = [
        helper.make_tensor_value_info(name, 1, ["n", size]) for name, size in (("settings", 2), ("values", 8), ("y", 3))
    ]
    stored = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", ports[:2], ports[2:], stored)
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )


def test_every_input_is_audited_and_the_one_that_is_given_away_most_counts(tmp_path: Path) -> None:
    chance = np.random.default_rng(1)
    data = {name: chance.normal(size=(300, size)).astype(np.float32) for name, size in (("settings", 2), ("values", 8))}
    report = split(
        two_inputs(), data, out=tmp_path / "out", private=True, audit=True, rounds=1, most_samples=4, most_gate=300,
        links=(Link(1000, 0.1),), max_drop=100,
    )  # fmt: skip
    true = [cut for cut in report.plan.cuts if cut.name.startswith("c")]
    assert true
    assert {cut.leak.verdict for cut in true if cut.leak} == {"recoverable"}
    each = report.details["privacy_audit"]["each_input"]
    assert {leak["verdict"] for leak in each["settings"]["leaks"].values()} == {"private"}
    assert {leak["verdict"] for leak in each["values"]["leaks"].values()} == {"recoverable"}
    assert report.verdicts[0].cut == "local"


@pytest.mark.parametrize("values", [[np.ones((1, 2))] * 300, [np.ones((1, 1 + at % 2)) for at in range(300)]])
def test_an_input_that_cannot_be_judged_is_inconclusive(values: Any) -> None:
    tensors = {"c1": [np.zeros((300, 2))]}
    leaks, facts = privacy._about(None, values, tensors, tensors["c1"], lambda done, of: None)
    assert leaks["c1"].verdict == "inconclusive"
    assert "cannot be judged" in facts["why"]
