"""The planner as a whole: what it writes, what it refuses, and that nothing is left half-written."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cloud.split import plan as planning
from cloud.split import split
from skills import codec, ort
from skills.coding import Image
from skills.errors import FormatError, NotFound, SkerryError, StorageError, UsageError
from skills.files import sha256_file
from skills.network import Link
from skills.split_plan import load_plan, plan_hash


def plan_it(model: bytes | Path, data: Any, out: Path, **options: Any) -> Any:
    return split(model, data, out=out, **{"slowdown": 10, "rounds": 2, "most_samples": 8, "most_gate": 24, **options})


def with_infinity(x: Any) -> Any:
    broken = x.copy()
    broken[1, 0, 0, 0] = np.inf
    return broken


def test_a_plan_holds_local_and_input_and_its_segments_are_the_model(planned_net: Any) -> None:
    plan = load_plan((planned_net.folder / "split.yaml").read_text())
    assert plan.cuts[0].name == "input"
    assert plan.cuts[-1].name == "local"
    assert len(plan.segments) > 1
    for segment in plan.segments:
        assert sha256_file(planned_net.folder / segment.file) == segment.sha256
    chain = ort.chain([planned_net.folder / one.file for one in plan.segments], ["logits"])
    x = planned_net.x[:20]
    right = ort.session(planned_net.model).run({"x": x})["logits"]
    np.testing.assert_allclose(chain.run({"x": x})["logits"], right, atol=1e-5)
    assert plan.metric == "accuracy"


def test_the_report_says_for_every_link_what_to_do_and_what_was_measured(planned_net: Any) -> None:
    report = json.loads((planned_net.folder / "report.json").read_text())
    plan = load_plan((planned_net.folder / "split.yaml").read_text())
    assert report["plan"] == plan_hash(plan)
    assert [one["link"] for one in report["links"]] == ["1mbit/30ms", "5mbit/30ms", "20mbit/30ms", "100mbit/30ms"]
    assert all(one["text"] for one in report["verdicts"])
    assert {"metric_name", "max_abs_difference", "seconds", "versions", "device", "privacy"} <= set(report)
    page = (planned_net.folder / "report.html").read_text()
    assert page.count('class="verdict') == 4
    assert "http" not in page.replace("http-equiv", "")


def test_without_labels_the_figure_is_called_agreement_and_a_private_plan_says_what_it_does_not_prove(
    small_net: Any, tmp_path: Path
) -> None:
    net = small_net("plain")
    report = plan_it(net.model.SerializeToString(), {"x": net.x}, tmp_path / "out", private=True)
    assert report.plan.metric == "agreement"
    assert "accuracy" not in (tmp_path / "out" / "report.html").read_text().lower()
    assert "no proof against reconstruction" in (tmp_path / "out" / "report.json").read_text()
    assert all(verdict.cut != "input" for verdict in report.verdicts)


def test_a_declared_minimum_cut_is_kept_and_nothing_before_it_is_admitted(small_net: Any, tmp_path: Path) -> None:
    net = small_net("residual")
    report = plan_it(net.model.SerializeToString(), {"x": net.x}, tmp_path / "out", private=True, min_cut="summed")
    least = report.plan.cut(str(report.plan.min_cut))
    assert [tensor.name for tensor in least.tensors] == ["summed"]
    for mbit in (0.1, 10, 1000):
        chosen = planning.judge(report.plan, Link(mbit, 1)).cut
        assert report.plan.cut(chosen).after >= least.after


def test_pictures_are_recognised_and_may_travel_as_jpeg(small_net: Any, tmp_path: Path) -> None:
    net = small_net("plain")
    chance = np.random.default_rng(0)
    x = chance.integers(0, 256, (6, 1, 12, 12)).astype(np.float32) / 255
    report = plan_it(net.model.SerializeToString(), {"x": x}, tmp_path / "out")
    assert report.plan.inputs[0].image == Image((0.0,), (255.0,), "NCHW")
    assert [coding.kind for coding in report.plan.cut("input").codings] == ["jpeg", "jpeg", "jpeg", "png", "pixels"]
    noise = plan_it(net.model.SerializeToString(), {"x": net.x}, tmp_path / "other")
    assert noise.plan.inputs[0].image is None


def test_a_plan_is_replaced_whole_and_a_failed_one_leaves_the_old(
    small_net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, out = small_net("plain"), tmp_path / "out"
    first = plan_it(net.model.SerializeToString(), {"x": net.x}, out, slowdown=10)
    second = plan_it(net.model.SerializeToString(), {"x": net.x}, out, slowdown=20)
    assert load_plan((out / "split.yaml").read_text()).slowdown == 20
    assert first.plan.model_sha256 == second.plan.model_sha256

    def full(*_: object, **__: object) -> None:
        raise StorageError("no space left to write report.html: free some, then try again")

    monkeypatch.setattr(planning, "write_atomic", full)
    with pytest.raises(StorageError):
        plan_it(net.model.SerializeToString(), {"x": net.x}, out, slowdown=30)
    assert load_plan((out / "split.yaml").read_text()).slowdown == 20
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == ["out"]


@pytest.mark.parametrize(
    ("name", "folder"), [("skill.yaml", False), ("segments/my.txt", False), ("code", True), (".git", True)]
)
def test_a_folder_that_holds_more_than_a_plan_is_never_replaced(
    small_net: Any, tmp_path: Path, name: str, folder: bool
) -> None:
    net, out = small_net("plain"), tmp_path / "my-skill"
    out.mkdir()
    (out / "split.yaml").write_text("placement of its stages")
    if folder:
        (out / name).mkdir()
        (out / name / "mine.py").write_text("mine")
    else:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(UsageError, match=f"has a split plan and also {name}, which a new plan would remove"):
        plan_it(net.model.SerializeToString(), {"x": net.x}, out)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("label", [-1, 99])
def test_a_label_that_is_no_class_is_one_sentence_and_leaves_no_plan(
    small_net: Any, tmp_path: Path, label: int
) -> None:
    net = small_net("plain")
    y = net.y.copy()
    y[3] = label
    with pytest.raises(FormatError, match=r"labels in y run from .* the model's output has 4 classes \(0 to 3\)"):
        plan_it(net.model.SerializeToString(), {"x": net.x, "y": y}, tmp_path / "plan")
    assert not (tmp_path / "plan").exists()


def test_what_is_put_beside_the_old_plan_while_the_new_one_is_made_is_not_removed(
    small_net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, out = small_net("plain"), tmp_path / "out"
    plan_it(net.model.SerializeToString(), {"x": net.x}, out)
    (out / "small").mkdir()
    for name in ("small/small.onnx", "head.onnx", "tail.onnx", "head_tail.bin"):  # of split joint, and of --head-tail
        (out / name).write_bytes(b"")
    render = planning.render_html

    def late(*given: Any) -> str:
        (out / "skill.yaml").write_text("mine")
        return render(*given)

    monkeypatch.setattr(planning, "render_html", late)
    with pytest.raises(UsageError, match="also skill.yaml,"):
        plan_it(net.model.SerializeToString(), {"x": net.x}, out)
    assert (out / "skill.yaml").read_text() == "mine"
    assert [path.name for path in tmp_path.glob(".*")] == []
    (out / "skill.yaml").unlink()
    monkeypatch.undo()
    plan_it(net.model.SerializeToString(), {"x": net.x}, out)
    assert not (out / "small").exists()


def test_bad_input_is_one_sentence_and_writes_nothing(small_net: Any, tmp_path: Path) -> None:
    net = small_net("plain")
    model, data, out = net.model.SerializeToString(), {"x": net.x}, tmp_path / "out"
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "photo.jpg").write_bytes(b"")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    cases: list[tuple[type[SkerryError], str, dict[str, Any]]] = [
        (NotFound, "there is no model file", {"model": tmp_path / "absent.onnx"}),
        (FormatError, "is no ONNX model", {"model": broken}),
        (NotFound, "there is no data file", {"data": tmp_path / "absent.npz"}),
        (FormatError, "is no .npz with arrays", {"data": broken}),
        (FormatError, "the data has images, the model needs 'x'", {"data": {"images": net.x}}),
        (
            FormatError,
            f"3 labels of dtype .*, expected {len(net.x)} whole-number",
            {"data": {"x": net.x, "y": net.y[:3]}},
        ),
        (
            FormatError,
            r"takes float32 \[N, 1, 12, 12\], x in the data is int64 \[N, 1, 5, 1\]",
            {"data": {"x": net.x[:, :, :5, :1].astype(np.int64)}},
        ),
        (NotFound, "taken has no data.yaml that says how its images become inputs", {"data": taken}),
        (FormatError, "1 of 3 samples in x hold NaN or infinity", {"data": {"x": with_infinity(net.x[:3])}}),
        (UsageError, "exists and is no split plan", {"out": taken}),
        (UsageError, "the slowdown is 0.5", {"slowdown": 0.5}),
        (UsageError, "in percentage points", {"max_drop": -1}),
        (UsageError, "no link was given", {"links": ()}),
        (UsageError, "the model has no tensor 'c99' .* named by a tensor", {"min_cut": "c99", "private": True}),
        (UsageError, "the minimum cut 'summed' counts only for a private plan: give --private", {"min_cut": "summed"}),
    ]
    for kind, sentence, change in cases:
        with pytest.raises(kind, match=sentence):
            plan_it(**{"model": model, "data": data, "out": out, **change})
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


def test_a_model_that_offers_no_cut_still_gets_a_plan(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    report = plan_it(model.SerializeToString(), {"x": np.ones((3, 4), np.float32)}, tmp_path / "out")
    assert [cut.name for cut in report.plan.cuts] == ["input", "local"]
    assert len(report.plan.segments) == 1
    assert report.verdicts[0].cut == "local"


def test_an_int8_model_is_cut_at_its_codes_and_the_chain_is_bit_equal(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper

    chance = np.random.default_rng(0)
    constants = [numpy_helper.from_array(np.float32(0.05), "s"), numpy_helper.from_array(np.uint8(128), "z")]
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q0"])]
    for at in range(3):
        weight = chance.integers(-127, 128, (8, 8, 3, 3)).astype(np.int8)
        constants += [numpy_helper.from_array(weight, f"w{at}"), numpy_helper.from_array(np.float32(0.004), f"ws{at}")]
        nodes += [
            helper.make_node("DequantizeLinear", [f"q{at}", "s", "z"], [f"d{at}"]),
            helper.make_node("DequantizeLinear", [f"w{at}", f"ws{at}"], [f"wd{at}"]),
            helper.make_node("Conv", [f"d{at}", f"wd{at}"], [f"c{at}"], strides=[2, 2], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [f"c{at}"], [f"r{at}"]),
            helper.make_node("QuantizeLinear", [f"r{at}", "s", "z"], [f"q{at + 1}"]),
        ]
    nodes.append(helper.make_node("DequantizeLinear", ["q3", "s", "z"], ["y"]))
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8, 16, 16])]
    outs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8, 2, 2])]
    graph = helper.make_graph(nodes, "g", ends, outs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    x = chance.standard_normal((8, 8, 16, 16)).astype(np.float32)
    report = plan_it(model, {"x": x}, tmp_path / "out", slowdown=100)
    cuts = [cut for cut in report.plan.cuts if cut.name.startswith("c")]
    assert cuts
    for cut in cuts:
        assert [tensor.dtype for tensor in cut.tensors] == ["UINT8"]
        assert [(coding.kind, coding.drop) for coding in cut.codings] == [("native", 0.0)]
    chain = ort.chain([tmp_path / "out" / one.file for one in report.plan.segments], ["y"])
    assert np.array_equal(chain.run({"x": x})["y"], ort.session(model).run({"x": x})["y"])


def test_what_is_cut_at_codes_may_not_differ_at_all_and_sums_only_by_their_last_places() -> None:
    from cloud.split.gap import allowed_gap, largest_gap
    from cloud.split.segment import Pieces
    from skills.coding import Live

    def allowed(kind: str, crossing: str, end: str = "FP32") -> float:
        flow = SimpleNamespace(ops=[SimpleNamespace(kind=kind)])
        x, middle, y = (Live(name, dtype, (-1, 4)) for name, dtype in zip("xmy", ("FP32", crossing, end), strict=True))
        return allowed_gap(flow, Pieces((), None, ((x,), (middle,)), (y,)))  # type: ignore[arg-type]

    assert allowed("QuantizeLinear", "UINT8") == 0.0
    assert allowed("Gather", "INT64") == allowed("QuantizeLinear", "FP32") == allowed("Conv", "FP32") == 1e-5
    assert allowed("Conv", "FP16") == allowed("Conv", "FP32", "FP16") == 1e-4
    truth = {"y": np.array([[3.0, -20.0]])}

    def gap(off: float, share: float) -> float:
        chain = SimpleNamespace(run=lambda _: {"y": truth["y"] + off})
        return largest_gap(chain, [{}], [truth], share)  # type: ignore[arg-type]

    assert gap(0.0, 0.0) == 0.0
    assert gap(1.9e-4, 1e-5) == pytest.approx(1.9e-4)
    for off, share in ((1e-9, 0.0), (2.1e-4, 1e-5)):
        with pytest.raises(FormatError, match="differs from the whole model's by"):
            gap(off, share)


def test_a_detectors_answer_comes_back_coded_within_the_budget(planned_detector: Any) -> None:
    plan = load_plan((planned_detector.folder / "split.yaml").read_text())
    report = json.loads((planned_detector.folder / "report.json").read_text())
    assert plan.reply_bytes == report["reply"]["raw_bytes"] == 1728 * 6 * 4
    assert [one["kind"] for one in report["reply"]["codings"]] == ["u8", "u16", "native"]
    (reply,) = plan.replies
    assert reply.kind == "u8"
    assert 0 < reply.bytes_p50 <= reply.bytes_p95 < plan.reply_bytes / 3
    assert reply.encode_ms > 0
    assert reply.decode_ms > 0
    named = [coding for cut in plan.cuts for coding in cut.codings if coding.admitted]
    assert named
    assert all(coding.reply == "u8" and coding.drop <= plan.max_drop for coding in named)
    assert all(coding.reply == "" for cut in plan.cuts for coding in cut.codings if not coding.admitted)
    slow = next(one for one in report["links"] if one["link"] == "1mbit/30ms")["options"]
    assert {one["reply"] for one in slow if one["admitted"]} == {"u8", ""}  # staying local has none
    asked = [one for one in slow if one["reply"]]
    assert all(one["moved_bytes"] == one["bytes"] + reply.bytes_p50 for one in asked)
    assert {
        cut["name"] for cut in report["candidates"] if any(one.get("reply") == "u8" for one in cut.get("codings", ()))
    } >= {"input"}
    page = (planned_detector.folder / "report.html").read_text()
    assert f"{reply.bytes_p50:,} as u8" in page
    assert f"kB there, {reply.bytes_p50 / 1000:.1f} kB back" in page
    assert '<td class="l">u8</td>' in page


def test_a_budget_that_eight_bits_do_not_keep_takes_more_of_them(detector: bytes, tmp_path: Path) -> None:
    x = np.random.default_rng(4).normal(0, 1, (24, 1, 48, 48)).astype(np.float32)
    kinds = {}
    slow = (Link(0.1, 30),)  # there fewer bytes pay however busy the machine is that measures the codings
    for budget in (8.0, 0.02, 0.0):
        plan = plan_it(detector, {"x": x}, tmp_path / f"{budget}", max_drop=budget, links=slow).plan
        (native,) = [one for one in plan.cut("input").codings if one.kind == "native"]
        assert native.admitted
        kinds[budget] = native.reply
    assert kinds == {8.0: "u8", 0.02: "u16", 0.0: "native"}  # the last one loses nothing


def test_a_few_class_scores_come_back_raw(planned_net: Any) -> None:
    text = (planned_net.folder / "split.yaml").read_text()
    assert load_plan(text).replies == ()
    assert "\nreplies:" not in text
    assert "reply: " not in text


@pytest.mark.parametrize(("classes", "pays"), [(10, False), (1000, True)])
def test_whether_a_reply_is_worth_coding_is_decided_by_the_time_it_takes(classes: int, pays: bool) -> None:
    from cloud.split.profile import measured_replies, paying_replies
    from skills.coding import Live
    from skills.timer import Dilated

    chance = np.random.default_rng(0)
    answers = [{"y": chance.normal(0, 3, (1, classes)).astype(np.float32)} for _ in range(16)]
    found = measured_replies((Live("y", "FP32", (-1, classes)),), answers, Dilated(10))
    assert bool(paying_replies(found, classes * 4, 0.1)) is pays
    assert not paying_replies(found, classes * 4, 10_000.0)  # on such a link nothing is worth an encoder


@pytest.mark.parametrize("answer", [np.zeros((1, 0, 6), np.float32), np.full((1, 9), np.inf, np.float32),
                                    np.array([b"face"], object)])  # fmt: skip
def test_answers_that_no_frame_carries_have_no_reply_coding(answer: Any) -> None:
    from cloud.split.profile import measured_replies
    from skills.coding import Live
    from skills.timer import Local

    kind = "BYTES" if answer.dtype == object else "FP32"
    live = Live("y", kind, (-1,) * answer.ndim)  # type: ignore[arg-type]
    assert measured_replies((live,), [{"y": answer}] * 3, Local()) == ()


def test_the_budget_is_judged_on_more_inputs_than_the_times(small_net: Any, tmp_path: Path) -> None:
    net = small_net("plain")
    model = net.model.SerializeToString()
    report = plan_it(model, {"x": net.x, "y": net.y}, tmp_path / "out")
    assert report.plan.samples == 24
    answers = ort.session(model).run({"x": net.x[:24]})["logits"].argmax(1)
    assert report.plan.whole == pytest.approx((answers == net.y[:24]).mean(), abs=1e-6)
    assert "on 24 inputs" in json.loads((tmp_path / "out" / "report.json").read_text())["proof"]


def test_a_plan_says_what_its_few_inputs_leave_unproven(small_net: Any, tmp_path: Path) -> None:
    net = small_net("plain")
    plan_it(net.model.SerializeToString(), {"x": net.x[:8]}, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "unproven on 8 inputs (one input is 12 points)" in report["proof"]
    assert "only 8 inputs" in report["warnings"][0]
    assert "Only 8 inputs" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("ir", "opset"), [(14, 17), (14, 27)])
def test_a_model_newer_than_what_every_runtime_takes_is_lowered_as_compress_does_it(
    small_net: Any, tmp_path: Path, ir: int, opset: int
) -> None:
    import onnx

    net = small_net("plain")
    newer = onnx.version_converter.convert_version(net.model, opset) if opset != 17 else onnx.ModelProto()
    if opset == 17:
        newer.CopyFrom(net.model)
    newer.ir_version = ir
    path = tmp_path / "newer.onnx"
    path.write_bytes(newer.SerializeToString())
    report = plan_it(path, {"x": net.x}, tmp_path / "out")
    assert report.plan.model_sha256 == sha256_file(path)
    for one in report.plan.segments:
        segment = onnx.load(tmp_path / "out" / one.file, load_external_data=False)
        assert segment.ir_version <= ort.MAX_IR
        assert all(item.version <= ort.MAX_OPSET for item in segment.opset_import if not item.domain)
    chain = ort.chain([tmp_path / "out" / one.file for one in report.plan.segments], ["logits"])
    right = ort.session(net.model.SerializeToString()).run({"x": net.x[:20]})["logits"]
    np.testing.assert_allclose(chain.run({"x": net.x[:20]})["logits"], right, atol=1e-5)


def test_head_and_tail_are_two_plain_models_with_the_ends_that_the_plan_names(planned_net: Any, tmp_path: Path) -> None:
    plan = plan_it(planned_net.model, {"x": planned_net.x}, tmp_path / "out", head_tail=True, max_drop=50).plan
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    cut = plan.cut(report["head_tail"]["cut"])
    head, tail = (ort.session(tmp_path / "out" / name) for name in ("head.onnx", "tail.onnx"))
    assert {port.name for port in tail.inputs} == {live.name for live in cut.tensors}
    assert {port.name for port in tail.outputs} == {live.name for live in plan.outputs}
    for port in (*tail.inputs, *tail.outputs):
        live = next(one for one in (*cut.tensors, *plan.outputs) if one.name == port.name)
        assert (port.dtype, port.shape) == (codec.DTYPES[live.dtype], live.shape)
    x = planned_net.x[:3]
    right = ort.session(planned_net.model).run({"x": x})["logits"]
    np.testing.assert_allclose(tail.run(head.run({"x": x}))["logits"], right, atol=1e-5)
