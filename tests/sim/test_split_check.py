"""A plan that a person edited: what may be edited is honoured, and every fault is one sentence."""

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from cloud.split.check import check_plan
from cloud.split.export import commented
from cloud.split.verdict import LINKS, judge
from skills.files import sha256_file, sha256_hex
from skills.split import Estimate, choose_cut
from skills.split_plan import load_plan


@pytest.fixture
def edited(planned_net: Any, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the plan in which some text was replaced."""

    def make(*changes: tuple[str, str]) -> Path:
        folder = tmp_path / "plan"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(planned_net.folder, folder)
        text = (folder / "split.yaml").read_text()
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new, 1)
        (folder / "split.yaml").write_text(text)
        return folder

    return make


def test_a_plan_as_it_was_made_is_in_order_with_its_model(planned_net: Any, tmp_path: Path) -> None:
    model = tmp_path / "net.onnx"
    model.write_bytes(planned_net.model)
    found = check_plan(planned_net.folder, model)
    assert (found.faults, found.remarks) == ((), ())
    assert check_plan(planned_net.folder / "split.yaml").faults == ()


def test_comments_say_what_may_be_edited_and_change_nothing(planned_net: Any) -> None:
    text = (planned_net.folder / "split.yaml").read_text()
    plan = load_plan(text)
    assert load_plan(commented(plan)) == plan
    assert text.index("\npolicy:") < text.index("\nsegments:")
    assert "  pin: null  # always use this cut while the tail answers" in text
    assert "# From here on the two sides must agree" in text


@pytest.mark.parametrize("cut", ["input", "c1", "local"])
def test_a_cut_that_a_person_pins_is_the_one_that_the_device_takes(cut: str, edited: Any) -> None:
    folder = edited(("  pin: null", f"  pin: {cut}"))
    assert check_plan(folder).faults == ()
    plan = load_plan((folder / "split.yaml").read_text())
    for mbit in (0.1, 10, 1000):
        assert choose_cut(plan, Estimate(mbit, 30)).cut.name == cut
    assert choose_cut(plan, Estimate(10, 30, up=False)).cut.name == "local"


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ([("pin: null", "pin: c77")], [r"policy.pin is c77, the cuts are"]),
        ([("pin: null", "pins: null")], [r"line \d+: unknown key 'pins', did you mean 'pin'"]),
        ([("minimize: latency", "minimize: bytes")], ["without policy.slo_ms"]),
        ([("pin: null", "pin: input"), ("private: false", "private: true")], ["the input itself leaves there"]),
        ([("pin: null", "pin: c77"), ("dwell_s: 1.0", "dwell_s: -3"), ("mbit: 20", "mbit: 0")], ["dwell_s", "mbit"]),
        ([("pin: null", "pin: c77"), ("slo_ms: null", "slo_ms: fast"), ("\nprivate: false", "\nprivat: false\nmin_cut: c8"),
          ("\nmin_cut: null", "")],
         ["policy.pin is c77", "policy.slo_ms", "unknown key 'privat', did you mean 'private'", "min_cut is c8, the cuts are"]),
        ([("file: segments/0.onnx", "file: segments/9.onnx")], [r"segments/9.onnx is missing from"]),
        ([("\nmemory_mb: null", "\nmemory_mb: 4"), ("pin: null", "pin: c1")],
         [r"needs \d+(\.\d+)? MiB, and the device has 4"]),
    ],
)  # fmt: skip
def test_every_fault_is_named(changes: list[tuple[str, str]], sentences: list[str], edited: Any) -> None:
    faults = check_plan(edited(*changes)).faults
    assert len(faults) >= len(sentences)
    for sentence in sentences:
        assert any(re.search(sentence, fault) for fault in faults), faults


def test_a_private_plan_that_was_never_audited_is_remarked_and_a_pin_on_such_a_cut_is_a_fault(edited: Any) -> None:
    private = ("\nprivate: false", "\nprivate: true")
    found = check_plan(edited(private))
    assert found.faults == ()
    assert any("c1" in text and "never audited: run skerry split --private" in text for text in found.remarks)
    (fault,) = check_plan(edited(private, ("  pin: null", "  pin: c1"))).faults
    assert "policy.pin is c1, but the plan is private and c1 was never audited" in fault


def test_a_declared_minimum_cut_is_a_persons_own_word_and_remarked_as_such(edited: Any) -> None:
    changes = ("\nprivate: false", "\nprivate: true"), ("\nmin_cut: null", "\nmin_cut: c1"), ("pin: null", "pin: c1")
    found = check_plan(edited(*changes))
    assert found.faults == ()
    assert any("the word of min_cut alone" in text for text in found.remarks)


def test_a_limit_that_nothing_keeps_on_the_assumed_network_is_remarked(edited: Any) -> None:
    changes = ("minimize: latency", "minimize: bytes"), ("slo_ms: null", "slo_ms: 0.001")
    found = check_plan(edited(*changes))
    assert found.faults == ()
    assert any(text.startswith("nothing keeps policy.slo_ms of 0.001 ms on 20mbit/30ms") for text in found.remarks)
    assert not any("slo_ms" in text for text in check_plan(edited(changes[0], ("slo_ms: null", "slo_ms: 1e5"))).remarks)


def test_a_rival_that_is_far_sooner_than_a_pinned_cut_is_no_tie(edited: Any) -> None:
    plan = load_plan((edited(("  pin: null", "  pin: c1")) / "split.yaml").read_text())
    said = [judge(plan, link).text for link in LINKS]
    beside = [found for text in said for found in re.findall(r"staying local takes \S+ ms (\(.*?\))", text)]
    assert beside
    assert all(re.fullmatch(r"\(\d+ ms sooner\)", one) for one in beside), beside


def test_a_tensor_that_the_model_has_not_is_named_with_its_cut(edited: Any) -> None:
    folder = edited()
    plan = load_plan((folder / "split.yaml").read_text())
    name = plan.cut("c1").tensors[0].name
    text = (folder / "split.yaml").read_text()
    at = text.index("- name: c1")
    (folder / "split.yaml").write_text(text[:at] + text[at:].replace(f"name: {name}", "name: nonsense", 1))
    faults = check_plan(folder).faults
    assert any("cut c1 names the tensor 'nonsense', which no segment before it gives" in fault for fault in faults)
    assert any(f"cut c1 lacks the tensor {name!r}" in fault for fault in faults)
    assert any("a segment, tensor or coding was edited" in fault for fault in faults)


def test_an_answer_that_no_message_holds_is_remarked_and_a_pin_is_a_fault(edited: Any) -> None:
    plan = load_plan((edited() / "split.yaml").read_text())
    large = (f"\nreply_bytes: {plan.reply_bytes}", "\nreply_bytes: 17000000")
    found = check_plan(edited(large))
    assert found.faults == ()
    sentence = (
        "is never used, for an answer of 17,000,000 bytes is larger than a message and it has no reply that is not"
    )
    assert any(text.startswith("cut c1: the coding u8") and text.endswith(sentence) for text in found.remarks)
    (fault,) = check_plan(edited(large, ("  pin: null", "  pin: c1"))).faults
    assert fault == "policy.pin is c1, but an answer of 17,000,000 bytes is larger than a message"


def test_a_coding_that_was_added_by_hand_was_never_measured(edited: Any) -> None:
    folder = edited()
    text = (folder / "split.yaml").read_text()
    at = text.index("codings:\n", text.index("- name: input"))
    indent = text[:at].rsplit("\n", 1)[1]
    (folder / "split.yaml").write_text(
        text[:at] + f"codings:\n{indent}- kind: native\n" + text[at + len("codings:\n") :]
    )
    faults = check_plan(folder).faults
    assert any("the coding native was never measured (its bytes_p50 is 0)" in fault for fault in faults)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("reply: u8", "reply: u9", "has the reply 'u9', the plan's replies are u8"),
        ("reply: u8", "reply: 7", "reply"),
        ("\nreplies:\n- kind: u8", "\nreplies:\n- kind: u7", "replies[0].kind"),
        ("\nreplies:\n- kind: u8", "\nreplies:\n- kind: png", "the replies are png: each name once, and none is for pictures"),
    ],
)  # fmt: skip
def test_a_reply_that_cannot_be_is_one_sentence(
    old: str, new: str, sentence: str, planned_detector: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "plan"
    shutil.copytree(planned_detector.folder, folder)
    text = (folder / "split.yaml").read_text()
    assert check_plan(folder).faults == ()
    assert "# Ways to write the answer for its way back" in text
    assert old in text
    (folder / "split.yaml").write_text(text.replace(old, new, 1))
    faults = check_plan(folder).faults
    assert len(faults) == 1
    assert sentence in faults[0]


def test_a_reply_of_other_codes_is_another_plan(planned_detector: Any, tmp_path: Path) -> None:
    folder = tmp_path / "plan"
    shutil.copytree(planned_detector.folder, folder)
    plan = load_plan((folder / "split.yaml").read_text())
    (reply,) = plan.replies
    other = dataclasses.replace(reply, scales=(0.5, 0.5), bytes_p50=0)
    (folder / "split.yaml").write_text(commented(dataclasses.replace(plan, replies=(other,))))
    faults = check_plan(folder).faults
    assert any("a segment, tensor or coding was edited" in fault for fault in faults)
    assert any("the reply u8 was never measured (its bytes_p50 is 0)" in fault for fault in faults)


def test_another_model_and_a_damaged_segment_are_named(edited: Any, planned_net: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(planned_net.model + b"\n")
    found = check_plan(edited(), other)
    assert found.stale
    assert any("other.onnx has" in fault for fault in found.faults)
    assert not check_plan(edited(("  pin: null", "  pinn: c1"))).stale
    folder = edited()
    (folder / "segments/1.onnx").write_bytes(b"rubbish")
    assert any("segments/1.onnx has sha256" in fault for fault in check_plan(folder).faults)


def test_a_model_whose_functions_are_inlined_finds_its_weights_and_one_that_lost_them_is_told_apart(
    edited: Any, planned_net: Any, tmp_path: Path
) -> None:
    made = onnx.load_model_from_string(planned_net.model)
    opset = onnx.helper.make_opsetid("", 17)
    same = onnx.helper.make_node("Identity", ["a"], ["b"])
    made.functions.append(onnx.helper.make_function("own", "Same", ["a"], ["b"], [same], [opset]))
    made.opset_import.append(onnx.helper.make_opsetid("own", 1))
    model = tmp_path / "net.onnx"
    onnx.save_model(made, model, save_as_external_data=True, location="weights.bin", size_threshold=0)
    folder = edited((sha256_hex(planned_net.model), sha256_file(model)))
    assert check_plan(folder, model).faults == ()
    (tmp_path / "weights.bin").unlink()
    (fault,) = check_plan(folder, model).faults
    assert fault.startswith("net.onnx does not run, so the segments' answers cannot be held against its own: ")


def test_a_stock_plan_is_judged_by_the_whole_tensors_that_it_sends(edited: Any) -> None:
    folder = edited()
    plan = load_plan((folder / "split.yaml").read_text())
    refused = tuple(
        dataclasses.replace(cut, codings=tuple(dataclasses.replace(one, admitted=False) for one in cut.codings))
        for cut in plan.cuts
    )
    plan = dataclasses.replace(plan, cuts=refused, policy=dataclasses.replace(plan.policy, pin="c1"))
    (folder / "split.yaml").write_text(commented(plan))
    assert any("none of its codings is admitted" in fault for fault in check_plan(folder).faults)
    stock = dataclasses.replace(plan, policy=dataclasses.replace(plan.policy, tail="stock"))
    (folder / "split.yaml").write_text(commented(stock))
    found = check_plan(folder)
    assert found.faults == ()  # whole tensors lose nothing, so the pin can be kept to
    assert found.remarks
    assert all(
        re.search(r"it is now c1 \(native\), \S+ ms; the verdict in the file is ", said) for said in found.remarks
    )


def test_edited_costs_are_honoured_and_the_new_verdict_is_remarked(edited: Any) -> None:
    folder = edited()
    plan = load_plan((folder / "split.yaml").read_text())
    slow = plan.cut("local").device_ms
    text = (folder / "split.yaml").read_text()
    at = text.index("- name: local")
    text = text[:at] + text[at:].replace(f"p50: {slow.p50}", "p50: 90000.0", 1)
    (folder / "split.yaml").write_text(text)
    found = check_plan(folder)
    assert found.faults == ()
    assert any("it is now " in remark for remark in found.remarks) or all(v.cut != "local" for v in plan.verdicts)
