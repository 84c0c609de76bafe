"""Small nets through the whole workshop, on the real runtime."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from compress import graph, profiles
from compress.judge import check_audit
from compress.passes.canonicalise import canonicalise
from compress.passes.strip import strip
from compress.pipeline import Bench, Pass, State
from compress.recipe import Recipe
from compress.run import PASSES, WEIGHTS_ONLY, run
from compress.scheme import Layer, Scheme
from skills import ort
from skills.errors import NotReached, SkerryError, UsageError
from skills.wire import decode_yaml

KEYS = {
    "metric_name", "verdict", "drop", "drop_ci95", "n_report", "baseline", "result", "ratio_file", "ratio_package",
    "speedup", "device", "threads", "batch", "seconds", "inputs_made_up", "warnings",
}  # fmt: skip
BASELINE = {"metric", "bytes_input", "bytes_file", "bytes_package", "latency_ms_p50", "latency_ms_p90", "load_ms"}
RESULT = BASELINE - {"bytes_input"}


@pytest.mark.parametrize("kind", ["plain", "residual", "depthwise"])
def test_batch_norm_is_folded_and_the_function_kept(kind: str, small_net: Callable[[str], Any]) -> None:
    net = small_net(kind)
    model = canonicalise(net.model)
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert graph.opset(model) == 21
    before, after = (ort.session(m.SerializeToString()).run({"x": net.x})["logits"] for m in (net.model, model))
    assert np.allclose(before, after, atol=1e-3)


def test_stripping_leaves_no_metadata_and_no_dead_weight(small_net: Callable[[str], Any]) -> None:
    model = graph.copy(small_net("plain").model)
    model.graph.node[0].doc_string = "File model.py, line 1"
    model.metadata_props.add(key="who", value="me")
    model.graph.initializer.append(graph.tensor("dead", np.zeros(1000, np.float32)))
    model.graph.input.append(onnx.helper.make_tensor_value_info("head", 1, [32, 4]))  # an initializer declared as input
    stripped = strip(model)
    assert [item.name for item in stripped.graph.input] == ["x"]
    assert "dead" not in graph.arrays(stripped)
    assert not stripped.metadata_props
    assert not stripped.graph.node[0].doc_string
    assert not stripped.producer_name
    assert len(model.graph.input) == 2  # the model that came in is untouched


@pytest.mark.parametrize("kind", ["plain", "residual", "depthwise"])
def test_what_comes_out_is_smaller_within_the_budget_and_whole(
    kind: str, small_net: Callable[[str], Any], tmp_path: Path
) -> None:
    net = small_net(kind)
    (tmp_path / "model.onnx").write_bytes(net.model.SerializeToString())
    report = run(tmp_path / "model.onnx", net.data, tmp_path / "out", device="x86-avx2", max_drop=3.0)
    assert report.baseline.metric > 0.9
    assert report.verdict != "not_reached"
    assert report.result.bytes_file < report.baseline.bytes_file
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(written) == KEYS
    assert set(written["baseline"]) == BASELINE
    assert set(written["result"]) == RESULT
    again = ort.session(tmp_path / "out" / "model.onnx").run({"x": net.x})["logits"]
    assert (again.argmax(1) == net.y).mean() > 0.88
    assert (tmp_path / "out" / "model.onnx").stat().st_size == report.result.bytes_file
    files = {"model.onnx", "report.json", "report.html", "recipe.yaml", "lineage.json", "search.json"}
    beside = {point.file for point in report.details.pareto if not point.chosen}
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == files | beside
    assert all(path.startswith("pareto/") for path in beside)
    recipe = decode_yaml(Recipe, (tmp_path / "out" / "recipe.yaml").read_text(), "recipe.yaml")
    assert len(recipe.layers) == len(report.details.layers) > 2


def test_the_same_inputs_give_the_same_bits(small_net: Callable[[str], Any], tmp_path: Path) -> None:
    net = small_net("plain")
    (tmp_path / "model.onnx").write_bytes(net.model.SerializeToString())
    passes = tuple(step for step in PASSES if step.name != "guard")  # a race may go either way on a busy machine
    files = []
    for name in ("a", "b"):
        run(tmp_path / "model.onnx", net.data, tmp_path / name, device="x86-avx2", max_drop=3.0, passes=passes)
        files.append((tmp_path / name / "model.onnx").read_bytes())
    assert files[0] == files[1]


def test_progress_only_moves_forward(small_net: Callable[[str], Any], tmp_path: Path) -> None:
    net = small_net("plain")
    (tmp_path / "model.onnx").write_bytes(net.model.SerializeToString())
    seen: list[float] = []
    run(
        tmp_path / "model.onnx", net.data, tmp_path / "out", max_drop=3.0, device="x86-avx2",
        progress=lambda _stage, share, _best: seen.append(share),
    )  # fmt: skip
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


@pytest.mark.parametrize(("batch", "trains"), [(4, False), (12, False), (12, True)])
def test_a_model_of_a_fixed_batch_is_run_in_whole_batches(
    batch: int, trains: bool, small_net: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.ladder.steps", lambda at, *_: 0 if at else 8)
    net = small_net("plain")
    model = graph.copy(net.model)
    for item in (*model.graph.input, *model.graph.output):
        item.type.tensor_type.shape.dim[0].dim_value = batch
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    parts = {"x": slice(0, 300), "y": slice(0, 300)} | ({"x_train": slice(300, 900)} if trains else {})
    given = {name: (net.y if name == "y" else net.x)[rows] for name, rows in parts.items()}
    report = run(tmp_path / "model.onnx", given, tmp_path / "out", device="x86-avx2", max_drop=20.0)
    assert report.verdict != "not_reached"
    assert report.batch == batch
    assert [moment.what for moment in report.details.trail][1:] == ["trained 1"] * trains
    shape = onnx.load(tmp_path / "out" / "model.onnx").graph.input[0].type.tensor_type.shape
    assert shape.dim[0].dim_value == batch


def test_a_product_with_a_computed_bias_becomes_int8_too(small_net: Callable[[str], Any], tmp_path: Path) -> None:
    net = small_net("plain")
    model = graph.copy(net.model)
    head = next(node for node in model.graph.node if node.op_type == "Gemm")
    # What torch.addmm(features, features, weight, alpha=0.5, beta=0.5) becomes.
    addmm = onnx.helper.make_node("Gemm", ["features", "same", "features"], ["mixed"], "addmm", alpha=0.5, beta=0.5)
    model.graph.initializer.append(graph.tensor("same", np.eye(32, dtype=np.float32)))
    model.graph.node.insert(len(model.graph.node) - 1, addmm)
    head.input[0] = "mixed"
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    passes = tuple(step for step in PASSES if step.name != "guard")  # a race may go either way on a busy machine
    report = run(tmp_path / "model.onnx", net.data, tmp_path / "out", device="x86-avx2", max_drop=10.0, passes=passes)
    assert report.verdict != "not_reached"
    assert {row.name: row.compute for row in report.details.layers}["addmm"] == "int8"


def test_without_labels_the_metric_is_agreement_and_the_report_says_so(
    small_net: Callable[[str], Any], tmp_path: Path
) -> None:
    net = small_net("plain")
    (tmp_path / "model.onnx").write_bytes(net.model.SerializeToString())
    report = run(tmp_path / "model.onnx", {"x": net.x}, tmp_path / "out", device="x86-avx2", max_drop=5.0)
    assert report.metric_name == "agreement"
    assert report.baseline.metric == 1.0
    assert sum("no labels" in warning for warning in report.details.warnings) == 1
    assert report.baseline.bytes_file <= report.baseline.bytes_input


def test_without_data_the_report_says_that_its_inputs_were_made_up(
    small_net: Callable[[str], Any], tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").write_bytes(small_net("plain").model.SerializeToString())
    report = run(tmp_path / "model.onnx", None, tmp_path / "out", device="x86-avx2", max_drop=5.0)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["inputs_made_up"] is True
    assert written["warnings"] == list(report.details.warnings)
    assert (tmp_path / "out" / "report.html").read_text().lower().count("no data was given") == 1


def test_a_time_that_ends_before_training_or_the_search_does_is_said(
    small_net: Callable[[str], Any], tmp_path: Path
) -> None:
    net = small_net("plain")
    (tmp_path / "model.onnx").write_bytes(net.model.SerializeToString())
    given = {"x": net.x[:200], "y": net.y[:200], "x_train": net.x[200:700]}
    report = run(
        tmp_path / "model.onnx", given, tmp_path / "out", device="x86-avx2", max_drop=5.0, time_budget=0.1,
        teacher=tmp_path / "model.onnx",
    )  # fmt: skip
    (training,) = [said for said in report.details.warnings if "before training began" in said]
    assert "the teacher was not used" in training
    assert any("before the search for stored bits did" in said for said in report.details.warnings)


def test_a_teacher_without_training_inputs_is_said_to_be_unused(
    small_net: Callable[[str], Any], tmp_path: Path
) -> None:
    net = small_net("plain")
    (tmp_path / "model.onnx").write_bytes(net.model.SerializeToString())
    report = run(
        tmp_path / "model.onnx", {"x": net.x, "y": net.y}, tmp_path / "out", device="x86-avx2", max_drop=5.0,
        teacher=tmp_path / "model.onnx",
    )  # fmt: skip
    assert any(said.startswith("The teacher was not used") for said in report.details.warnings)
    assert not any("The time ended" in said for said in report.details.warnings)


def test_a_budget_that_cannot_be_kept_is_not_reached_and_the_best_is_written(
    small_net: Callable[[str], Any], tmp_path: Path
) -> None:
    net = small_net("plain")
    (tmp_path / "model.onnx").write_bytes(net.model.SerializeToString())
    passes = tuple(
        NARROW if step.name == "guard" else step for step in PASSES
    )  # so before the plain 8-bit form is there
    report = run(tmp_path / "model.onnx", net.data, tmp_path / "out", device="x86-avx2", passes=passes)
    assert report.verdict == "not_reached"
    assert (tmp_path / "out" / "model.onnx").is_file()
    with pytest.raises(NotReached, match="the budget is 1"):
        report.reached()


@pytest.mark.parametrize("name", ["thesis.txt", "pareto/mine.txt"])
def test_a_result_with_other_files_beside_it_is_not_replaced(
    name: str, small_net: Callable[[str], Any], tmp_path: Path
) -> None:
    net, out = small_net("plain"), tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / "report.json").write_text("{}")
    (out / name).write_text("mine")
    with pytest.raises(UsageError, match=f"also has {name}"):
        run(net.model, net.data, out, device="x86-avx2")
    assert (out / name).read_text() == "mine"


def test_passes_run_in_their_order_wherever_one_is_added(small_net: Callable[[str], Any], tmp_path: Path) -> None:
    ran: list[str] = []

    def noted(step: Pass) -> Pass:
        def noting(state: State, bench: Bench) -> State:
            ran.append(step.name)
            return step.run(state, bench)

        return dataclasses.replace(step, run=noting)

    passes = (*PASSES, Pass("last", "doing nothing", lambda state, _bench: state))
    run_with(small_net("plain"), tmp_path, tuple(map(noted, passes)))
    assert ran == [step.name for step in passes]


def test_a_pass_that_changes_the_function_is_stopped_by_name(small_net: Callable[[str], Any], tmp_path: Path) -> None:
    def forget(state: State, _bench: Bench) -> State:
        model = graph.copy(state.model)
        weight = next(item for item in model.graph.initializer if item.name.endswith("weight.folded"))
        weight.CopyFrom(graph.tensor(weight.name, graph.array(weight) * np.float32(1.5)))
        return dataclasses.replace(state, model=model)

    with pytest.raises(SkerryError, match="pass 'forgetful' changed what the model answers"):
        run_with(small_net("plain"), tmp_path, (PASSES[0], Pass("forgetful", "forgetting", forget), *PASSES[1:]))
    assert not (tmp_path / "out").exists()


def test_a_pass_that_breaks_the_graph_is_stopped_by_name(small_net: Callable[[str], Any], tmp_path: Path) -> None:
    def cut(state: State, _bench: Bench) -> State:
        model = graph.copy(state.model)
        del model.graph.node[1]
        return dataclasses.replace(state, model=model)

    with pytest.raises(SkerryError, match="pass 'scissors' made an invalid graph"):
        run_with(small_net("plain"), tmp_path, (PASSES[0], Pass("scissors", "cutting", cut)))


def test_a_pass_that_crashes_is_named(small_net: Callable[[str], Any], tmp_path: Path) -> None:
    def crash(_state: State, _bench: Bench) -> State:
        raise KeyError("lost")

    with pytest.raises(SkerryError, match="pass 'clumsy' failed: KeyError: 'lost'"):
        run_with(small_net("plain"), tmp_path, (Pass("clumsy", "stumbling", crash),))


def test_a_layer_that_stayed_float_fails_the_emit_by_name() -> None:
    scheme = Scheme((Layer("stem", "Conv", "w", 0, (8, 4, 3, 3)),), {}, profiles.find("x86-vnni"))
    audit = ort.Audit((ort.AuditRow("L0", "Conv", int8=False, reason="its input is not quantized"),), {"Conv": 1})
    with pytest.raises(SkerryError, match="left Conv 'stem' in float: its input is not quantized"):
        check_audit(audit, scheme)


@pytest.mark.parametrize(("after_ms", "said"), [(2.0, "0.50 times its speed"), (1.0, ""), (0.5, "")])
def test_a_result_slower_than_what_came_in_is_never_silent(
    small_net: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_ms: float, said: str
) -> None:
    def race(runners: Any, *_args: object, **_facts: object) -> dict[str, ort.Timing]:
        return {name: ort.Timing(*[after_ms if name == "after" else 1.0] * 3, 60) for name in runners}

    monkeypatch.setattr("compress.conclude.measure.race", race)
    report = run_with(small_net("plain"), tmp_path, PASSES[:5])
    assert report.speedup == 1 / after_ms
    slower = [warning for warning in report.details.warnings if "slower than what came in" in warning]
    assert slower == ([f"The result is slower than what came in: {said}."] if said else [])


def test_an_s8_profile_of_another_machine_still_answers_right(small_net: Callable[[str], Any], tmp_path: Path) -> None:
    net = small_net("residual")
    (tmp_path / "model.onnx").write_bytes(net.model.SerializeToString())
    report = run(tmp_path / "model.onnx", net.data, tmp_path / "out", device="arm64-onnxruntime", max_drop=3.0)
    assert report.verdict != "not_reached"


def test_every_pass_stands_in_the_table_of_the_documentation() -> None:
    rows = (Path(__file__).parents[2] / "docs" / "compression.md").read_text().splitlines()
    named = {row.split("`")[1] for row in rows if row.startswith("| `")}
    assert {step.name for step in (*PASSES, *WEIGHTS_ONLY)} <= named


def run_with(net: Any, tmp_path: Path, passes: tuple[Pass, ...]) -> Any:
    (tmp_path / "model.onnx").write_bytes(net.model.SerializeToString())
    return run(tmp_path / "model.onnx", net.data, tmp_path / "out", device="x86-avx2", max_drop=3.0, passes=passes)


def _much_too_narrow(state: State, _bench: Bench) -> State:
    """Calibrate on a sixteenth of the real values: the classic preprocessing mistake."""
    scheme = state.planned()
    narrow = {name: type(r)(r.lo / 16, r.hi / 16) for name, r in scheme.ranges.items()}
    return dataclasses.replace(state, scheme=dataclasses.replace(scheme, ranges=narrow))


NARROW = Pass("narrow", "spoiling the ranges", _much_too_narrow)


def test_a_profile_of_an_older_runtime_keeps_every_layer_in_8_bits(
    small_net: Callable[[str], Any], tmp_path: Path
) -> None:
    net = small_net("plain")
    (tmp_path / "model.onnx").write_bytes(net.model.SerializeToString())
    (tmp_path / "old.yaml").write_text(
        "name: old\nruntime: onnxruntime\narch: x86_64\nruntime_min: '1.20'\nweight_bits: 7\n"
    )
    report = run(tmp_path / "model.onnx", net.data, tmp_path / "out", device=str(tmp_path / "old.yaml"), max_drop=3.0)
    assert {row.bits for row in report.details.layers} == {8}
    assert {item.data_type for item in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer} <= {
        1,
        2,
        3,
        6,
        7,
        10,
    }
