"""The stages of a skill, placed by the planner that cuts models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloud.cli import run
from cloud.split.check import unaudited
from cloud.split.export import commented
from cloud.split.profile import gated, paying_replies, with_reply
from cloud.split.stages import plan_stages
from cloud.tail.guard import remote_cuts
from skills.coding import Coding
from skills.errors import FormatError, NotFound, UsageError
from skills.network import Link
from skills.oip import MAX_MESSAGE_BYTES
from skills.split_plan import load_plan

MANIFEST = """\
name: shapes
version: 1.0.0
inputs: [{name: image, dtype: FP32, shape: [-1, 1, 12, 12]}]
outputs: [{name: logits, dtype: FP32, shape: [-1, 4]}]
models:
  net:
    variants: [{name: float, runtime: onnxruntime, file: net.onnx}]
stages:
  - {name: crop, model: net, code: stages.py}
  - {name: classify, model: net, code: stages.py}
"""
CODE = """\
import numpy as np

def crop(inputs, model):
    kept = np.zeros_like(inputs['image'])
    kept[:, :, 2:10, 2:10] = inputs['image'][:, :, 2:10, 2:10]
    return {'cut': kept, 'count': np.array([[1]], np.int64)}

def classify(inputs, model):
    assert inputs['count'][0, 0] == 1
    return model(x=inputs['cut'])
"""


@pytest.fixture
def skill(small_net: Any, tmp_path: Path) -> Path:
    net, folder = small_net("plain"), tmp_path / "shapes"
    folder.mkdir()
    (folder / "skill.yaml").write_text(MANIFEST)
    (folder / "stages.py").write_text(CODE)
    (folder / "net.onnx").write_bytes(net.model.SerializeToString())
    np.savez(folder / "probe.npz", **{"in.image": net.x[:12], "out.logits": np.zeros((12, 4))})
    return folder


def test_every_contiguous_placement_is_in_the_table_and_the_messages_have_types(skill: Path, tmp_path: Path) -> None:
    out = tmp_path / "placement"
    plan = plan_stages(skill, None, links=(Link(20, 30), Link(1000, 0.1)), rounds=2, max_drop=50, out=out)
    assert [cut.name for cut in plan.cuts] == ["input", "c1", "local"]
    assert [one.name for one in plan.stages] == ["crop", "classify"]
    message = plan.stages[0].message
    assert [(one.name, one.dtype) for one in message] == [("cut", "FP32"), ("count", "INT64")]
    assert [one.kind for one in plan.cut("c1").codings] == ["u8", "u4"]
    assert plan.cut("c1").codings[0].bytes_p50 < plan.cut("input").codings[0].bytes_p50
    assert [verdict.link for verdict in plan.verdicts] == [Link(20, 30), Link(1000, 0.1)]
    assert load_plan((out / "split.yaml").read_text()) == load_plan(commented(plan))


def test_what_no_audit_looked_at_is_not_private_so_stages_stay_on_the_device_and_it_says_so(skill: Path) -> None:
    # Its first stage returns nearly all of the picture.
    plan = plan_stages(skill, None, links=(Link(1000, 0.1),), rounds=1, private=True, slowdown=1000, max_drop=50)
    assert plan.verdicts[0].cut == "local"
    assert "no split was shown to keep the input private" in plan.verdicts[0].text
    assert [one.place for one in plan.stages] == ["device", "device"]
    assert remote_cuts(plan) == frozenset()
    (remark,) = unaudited(plan)
    assert "c1 does not count as private" in remark


def test_a_declared_minimum_cut_lets_the_messages_behind_it_leave(skill: Path) -> None:
    plan = plan_stages(
        skill, None, links=(Link(1000, 0.1),), rounds=1, private=True, min_cut="c1", slowdown=1000, max_drop=50
    )
    assert remote_cuts(plan) == {"c1"}
    (remark,) = unaudited(plan)
    assert "c1 was never audited" in remark
    for private, cut in ((True, "input"), (True, "c2"), (False, "c1")):
        with pytest.raises(UsageError, match="the minimum cut is"):
            plan_stages(skill, None, rounds=1, private=private, min_cut=cut)


@pytest.mark.parametrize(("blank", "kinds"), [(3, ["u8", "u4"]), (7, [])])
def test_samples_without_a_detection_are_finished_here_and_a_message_that_mostly_is_empty_has_no_coding(
    skill: Path, small_net: Any, blank: int, kinds: list[str]
) -> None:
    empty = "    if not inputs['image'].any():\n        kept = kept[:0]\n    return {'cut'"
    none = "    if not len(inputs['cut']):\n        return {'logits': np.zeros((1, 4), np.float32)}\n    return model("
    (skill / "stages.py").write_text(CODE.replace("    return {'cut'", empty).replace("    return model(", none))
    x = np.array(small_net("plain").x[:12])
    x[:blank] = 0
    plan = plan_stages(skill, {"image": x}, rounds=1, max_drop=50)
    assert [(one.kind, one.admitted) for one in plan.cut("c1").codings] == [(kind, True) for kind in kinds]
    assert plan.cut("c1").tensors[0].shape == (-1, 1, 12, 12)


def test_a_coding_whose_frames_no_message_holds_is_not_admitted() -> None:
    for size in (MAX_MESSAGE_BYTES, MAX_MESSAGE_BYTES + 1):
        coding = gated(Coding("native", bytes_p95=size), [1.0, 1.0], [1.0, 1.0], 1.0)
        assert coding.admitted == (size == MAX_MESSAGE_BYTES)


def test_a_coding_is_admitted_only_with_an_answer_that_a_message_holds() -> None:
    same, far = [1.0, 1.0], [1.0, 0.0]
    large = gated(Coding("native"), same, same, 1.0, MAX_MESSAGE_BYTES)
    assert not large.admitted
    u8, u16 = (
        Coding("u8", bytes_p95=9, scales=(1.0,), zeros=(0,)),
        Coding("u16", bytes_p95=18, scales=(1.0,), zeros=(0,)),
    )
    assert paying_replies((u8, u16), MAX_MESSAGE_BYTES, 1e9) == (u8, u16)  # no link is so fast that raw would do
    found = with_reply(large, same, ((u8, far), (u16, same)), 1.0)
    assert (found.admitted, found.reply) == (True, "u16")
    assert not with_reply(large, same, ((u8, far),), 1.0).admitted
    huge = Coding("native", bytes_p95=MAX_MESSAGE_BYTES)
    assert not with_reply(large, same, ((huge, same),), 1.0).admitted
    lossy = gated(Coding("native"), same, far, 1.0)
    assert not with_reply(lossy, same, ((u16, same),), 1.0).admitted


def test_private_stages_keep_the_input_here(skill: Path) -> None:
    plan = plan_stages(skill, None, links=(Link(1000, 0.1),), rounds=1, private=True, slowdown=1000)
    assert plan.verdicts[0].cut in ("c1", "local")
    assert plan.stages[0].place == "device"


def test_the_fewest_bytes_within_a_limit_and_the_budget_are_asked_for_as_of_a_split(
    skill: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["split", "stages", str(skill), "--link", "1000mbit/0.1ms", "--objective", "bytes"]
    assert run(words) == 2
    assert "--slo-ms" in capsys.readouterr().err
    out = tmp_path / "placement"
    assert run([*words, "--slo-ms", "5000", "--max-drop", "50", "-o", str(out)]) == 0
    plan = load_plan((out / "split.yaml").read_text())
    assert (plan.policy.minimize, plan.policy.slo_ms, plan.max_drop) == ("bytes", 5000.0, 50.0)
    assert plan.verdicts[0].cut == "local"  # nothing sends fewer
    assert run(["split", "stages", str(skill), "--max-drop", "101"]) == 2


def test_the_memory_of_a_profile_is_held_against_the_models_of_all_stages(
    skill: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    board, out = tmp_path / "board.yaml", tmp_path / "placement"

    def place(memory_mb: int) -> int:
        lines = ("format: profile/v1", "name: board", "runtime: onnxruntime", "arch: aarch64", "slowdown: 5")
        board.write_text("\n".join((*lines, f"memory_mb: {memory_mb}\n")))
        return run(["split", "stages", str(skill), "--device", str(board), "-o", str(out)])

    asked: list[list[Path]] = []

    def measured(files: Sequence[Path]) -> tuple[float, ...]:
        asked.append(list(files))
        return (60.0,)

    monkeypatch.setattr("cloud.split.stages.measured_mb", measured)
    assert place(59) == 79
    assert "the models of all stages take 60 MiB, and the device has 59" in capsys.readouterr().err
    assert not out.exists()
    assert place(60) == 0
    assert asked == [[skill / "net.onnx"]] * 2  # both stages use it, and it is loaded once
    plan = load_plan((out / "split.yaml").read_text())
    assert (plan.memory_mb, {cut.memory_mb for cut in plan.cuts}) == (60.0, {60.0})
    monkeypatch.setattr("cloud.split.stages.measured_mb", lambda files: ())
    assert place(60) == 79
    assert "cannot be measured here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "kind", "sentence"),
    [
        ("  - {name: crop, model: net, code: stages.py}\n", "", UsageError, "has one stage"),
        ("name: image", "name: picture", FormatError, "needs 'picture'"),
        ("12, 12]}]", "9, 9]}]", FormatError, "takes FP32 \\[-1, 1, 9, 9\\]"),
    ],
)
def test_what_cannot_be_placed_is_one_sentence(skill: Path, old: str, new: str, kind: Any, sentence: str) -> None:
    (skill / "skill.yaml").write_text(MANIFEST.replace(old, new))
    with pytest.raises(kind, match=sentence):
        plan_stages(skill, None, rounds=1)


def test_a_stage_that_returns_no_arrays_is_named(skill: Path, tmp_path: Path) -> None:
    (skill / "stages.py").write_text(
        CODE.replace("return {'cut': kept, 'count': np.array([[1]], np.int64)}", "return 3")
    )
    with pytest.raises(FormatError, match="stage 'crop' returned int"):
        plan_stages(skill, None, rounds=1)
    with pytest.raises(NotFound, match="no data file"):
        plan_stages(skill, tmp_path / "absent.npz", rounds=1)
