"""Nets of every kind through the whole workshop: valid, within the budget, smaller or it is said why not."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from compress import graph, judge, learn
from compress.data import Data
from compress.run import PASSES, run
from compress.splits import split
from skills import ort
from skills.errors import SkerryError

KINDS = [
    "plain", "residual", "depthwise", "silu", "hardswish", "squeeze", "transposed", "conv1d", "lstm", "gru", "transformer",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_net_of_any_kind_comes_out_valid_smaller_and_within_the_budget(
    kind: str, small_net: Callable[[str], Any], tmp_path: Path
) -> None:
    net = small_net(kind)
    (tmp_path / "model.onnx").write_bytes(net.model.SerializeToString())
    report = run(tmp_path / "model.onnx", net.data, tmp_path / "out", device="x86-avx2", max_drop=3.0)
    assert report.verdict != "not_reached"
    assert report.drop <= 3.0
    assert report.result.bytes_file < report.baseline.bytes_file
    written = onnx.load(tmp_path / "out" / "model.onnx")
    onnx.checker.check_model(written)
    session = ort.session(tmp_path / "out" / "model.onnx")
    assert (session.run({"x": net.x})["logits"].argmax(1) == net.y).mean() > 0.95
    if kind in ("lstm", "gru"):
        assert report.details.kernels[kind.upper()] == 1


def test_the_report_part_sees_what_needs_no_training_from_the_largest_to_the_smallest(
    small_net: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, look = list[judge.Emitted](), judge.look
    monkeypatch.setattr("compress.run.look", lambda one, *given: seen.append(one) or look(one, *given))
    net = small_net("residual")
    (tmp_path / "model.onnx").write_bytes(net.model.SerializeToString())
    passes = tuple(step for step in PASSES if step.name != "guard")  # a race may go either way on a busy machine
    run(tmp_path / "model.onnx", net.data, tmp_path / "out", device="x86-avx2", max_drop=3.0, passes=passes)
    names = [one.name for one in seen]
    assert names[:2] == ["plain int8", "safer 1"]
    assert names.index("calibrated") == len([name for name in names if "safer" in name]) + 1
    sizes = [len(one.file) for one in seen]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_net_of_any_kind_can_be_trained_or_is_left_as_it_is(
    kind: str, small_net: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.ladder.steps", lambda at, *_: 0 if at else 8)
    net = small_net(kind)
    data = with_training(net)
    (tmp_path / "model.onnx").write_bytes(net.model.SerializeToString())
    report = run(tmp_path / "model.onnx", data, tmp_path / "out", device="x86-avx2", max_drop=3.0)
    assert report.verdict != "not_reached"
    names = {point.name for point in report.details.pareto if not point.name.startswith(("safer", "bolder"))}
    assert names <= {"plain int8", "calibrated", "trained 1"}
    assert sum(report.details.samples.values()) == 700
    trained = [moment for moment in report.details.trail if moment.what == "trained 1"]
    assert trained or kind in (
        "lstm",
        "gru",
    )  # whose recurrent layers are left alone: little else may be there to train
    if report.details.macs is not None:
        before, after = report.details.macs
        assert after <= before


def with_training(net: Any) -> dict[str, Any]:
    return {"x": net.x[:200], "y": net.y[:200], "x_train": net.x[200:700], "y_train": net.y[200:700]}


def test_a_broken_rung_is_caught_and_what_was_good_before_it_is_the_result(
    small_net: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.ladder.steps", lambda at, *_: 0 if at else 8)
    real = learn.fit

    def broken(*arguments: Any, **named: Any) -> Any:
        trained = real(*arguments, **named)
        (head,) = (node.input[1] for node in trained.model.graph.node if node.op_type == "Gemm")
        for item in trained.model.graph.initializer:
            if item.name == head:
                item.CopyFrom(graph.tensor(item.name, -graph.array(item)))
        return dataclasses.replace(trained, codes={})

    monkeypatch.setattr(learn, "fit", broken)
    net = small_net("plain")
    (tmp_path / "model.onnx").write_bytes(net.model.SerializeToString())
    report = run(tmp_path / "model.onnx", with_training(net), tmp_path / "out", device="x86-avx2", max_drop=3.0)
    (chosen,) = [point for point in report.details.pareto if point.chosen]
    assert not chosen.name.startswith("trained")
    assert report.verdict != "not_reached"
    assert any(moment.what == "trained 1" and (moment.drop_select or 0) > 20 for moment in report.details.trail)


def test_a_rung_that_its_runtime_does_not_take_is_left_out_and_said(
    small_net: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.ladder.steps", lambda at, *_: 0 if at else 8)
    real = judge.write

    def refused(name: str, *arguments: Any) -> Any:
        if name == "trained 1":
            raise SkerryError("the runtime left Conv 'c' in float")
        return real(name, *arguments)

    monkeypatch.setattr(judge, "write", refused)
    net = small_net("plain")
    (tmp_path / "model.onnx").write_bytes(net.model.SerializeToString())
    report = run(tmp_path / "model.onnx", with_training(net), tmp_path / "out", device="x86-avx2", max_drop=5.0)
    assert "'trained 1' was left out: the runtime left Conv 'c' in float." in report.details.warnings
    assert not any(point.name.startswith("trained") for point in report.details.pareto)


def test_no_row_is_in_two_parts_of_a_run_with_training(
    small_net: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.ladder.steps", lambda at, *_: 0 if at else 8)
    learned: list[Any] = []
    real = learn.fit

    def watched(student: Any, views: Any, labels: Any, *arguments: Any, **named: Any) -> Any:
        learned.append(views.x)
        return real(student, views, labels, *arguments, **named)

    monkeypatch.setattr(learn, "fit", watched)
    net = small_net("plain")
    data = with_training(net)
    (tmp_path / "model.onnx").write_bytes(net.model.SerializeToString())
    run(tmp_path / "model.onnx", data, tmp_path / "out", device="x86-avx2", max_drop=3.0)
    splits = split(Data(**data), 0)
    assert splits.train is not None
    parts = {name: {row.tobytes() for row in part.x} for name, part in splits.parts().items()}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 700
    assert {row.tobytes() for row in learned[0]} == parts["train"]
