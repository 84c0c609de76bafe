"""The verdict in words."""

import dataclasses
from typing import Any

from cloud.split.verdict import answers, ever_best, judge, refusal, worth_cutting
from skills.coding import Coding, Live
from skills.network import Link
from skills.split_plan import Cut, Leak, Millis, Plan, Policy, Segment


def make_plan(*, private: bool = False, drop: float = 0.0) -> Plan:
    x, mid, out = (Live(name, "FP32", (-1, 8)) for name in ("x", "b1", "out"))
    cuts = (
        Cut("input", 0, Millis(0, 0), Millis(10, 10), (x,), (Coding("native", bytes_p50=16_000),), raw=True),
        Cut(
            "c1",
            1,
            Millis(50, 50),
            Millis(6, 6),
            (mid,),
            (Coding("u4", scales=(0.1,), zeros=(0,), bytes_p50=9_000, admitted=drop <= 1),),
        ),
        Cut("local", 2, Millis(150, 150), Millis(0, 0)),
    )
    segments = (
        Segment("segments/0.onnx", "0" * 64, 9, ("x",), ("b1",)),
        Segment("segments/1.onnx", "1" * 64, 9, ("b1",), ("out",)),
    )
    return Plan("a" * 64, (x,), (out,), segments, cuts, private=private)


def test_when_the_compressed_input_is_faster_the_verdict_says_so_and_by_how_much() -> None:
    verdict = judge(make_plan(), Link(5, 5))
    assert verdict.cut == "input"
    assert (
        verdict.text
        == "send the input (native): 45 ms; staying local takes 150 ms, the best split (c1, u4) needs 79 ms"
    )


def test_a_private_plan_splits_and_says_what_the_input_would_take() -> None:
    verdict = judge(make_plan(private=True), Link(5, 5))
    assert verdict.text.startswith("split at c1 (b1; u4): 79 ms; staying local takes 150 ms")
    assert verdict.text.endswith("the compressed input would take 45 ms but may not leave")


def test_a_poor_link_means_local_and_splits_over_the_budget_are_named_as_such() -> None:
    verdict = judge(make_plan(private=True, drop=9.0), Link(0.05, 100))
    assert verdict.text == "stay local: 150 ms; no split keeps within the budget"


def test_a_cut_that_no_link_could_want_is_not_cut_for_good() -> None:
    plan = make_plan()
    worse = dataclasses.replace(plan.cuts[1], name="c2", device_ms=Millis(60, 60))
    assert ever_best([plan.cuts[1], worse]) == {"c1"}
    assert ever_best([plan.cuts[1], worse], {"c2"}) == {"c1", "c2"}


def test_the_verdict_says_in_what_coding_the_answer_comes_back_and_counts_its_bytes() -> None:
    plan = make_plan()
    reply = Coding("u8", scales=(0.1,), zeros=(0,), bytes_p50=5_000, encode_ms=0.5, decode_ms=1.5)
    named = tuple(
        dataclasses.replace(cut, codings=tuple(dataclasses.replace(one, reply="u8") for one in cut.codings))
        for cut in plan.cuts
    )
    plan = dataclasses.replace(plan, cuts=named, reply_bytes=30_000, replies=(reply,))
    verdict = judge(plan, Link(5, 5))
    assert (verdict.cut, verdict.reply) == ("input", "u8")
    assert verdict.text.startswith("send the input (native), the answer comes back as u8: 55 ms; ")
    billed = dataclasses.replace(plan, policy=Policy(minimize="bytes", slo_ms=140))
    assert ", the answer comes back as u8: 89 ms, 14,000 bytes" in judge(billed, Link(5, 5)).text
    fast = judge(plan, Link(1_000, 5))
    assert fast.reply == ""
    assert "comes back" not in fast.text
    assert answers(plan) == "an answer comes back in 30,000 bytes raw or 5,000 as u8, whichever is sooner"


def test_an_answer_that_no_message_holds_is_why_nothing_is_split() -> None:
    plan = dataclasses.replace(make_plan(), reply_bytes=17_000_000)
    assert judge(plan, Link(1000, 1)).text == (
        "stay local: 150 ms; an answer of 17,000,000 bytes is larger than a message"
    )
    c1 = plan.cut("c1")
    assert refusal(plan, c1) == refusal(plan, c1, c1.codings[0]) == "answer too large"
    assert refusal(plan, plan.cut("local")) is None


def cut(name: str, device_ms: float, tail_ms: float, size: int, verdict: Any, memory_mb: float = 0.0) -> Cut:
    coding = Coding("u8", scales=(0.1,), zeros=(0,), bytes_p50=size)
    tensor = Live(name, "FP32", (-1, 8))
    leak = Leak(verdict, "ssim", 0.1, 300)
    times = Millis(device_ms, device_ms), Millis(tail_ms, tail_ms)
    return Cut(name, int(name[1:]), *times, (tensor,), (coding,), memory_mb=memory_mb, leak=leak)


THREE = (
    cut("c1", 30, 9, 60_000, "recoverable"),
    cut("c2", 110, 3, 26_000, "private"),
    cut("c3", 140, 1, 1_500, "private"),
)


def test_what_is_best_among_the_private_cuts_is_cut_though_a_refused_one_is_better() -> None:
    assert ever_best(THREE) == {"c1", "c3"}
    assert worth_cutting(THREE) == {"c1", "c3"}
    assert worth_cutting(THREE, private=True) == {"c2", "c3"}


def test_what_a_device_has_no_room_for_drives_out_nothing_that_fits() -> None:
    heavy = tuple(dataclasses.replace(one, memory_mb=10.0 * one.after) for one in (*THREE[1:], THREE[0]))
    assert worth_cutting(heavy, private=True, memory_mb=25) == {"c2"}
    assert worth_cutting(heavy, memory_mb=15) == {"c1"}


def test_where_no_cut_may_be_used_the_best_are_there_to_show_why_and_a_declared_one_always_is() -> None:
    refused = tuple(dataclasses.replace(one, leak=THREE[0].leak) for one in THREE)
    assert worth_cutting(refused, private=True) == {"c1", "c3"}
    assert worth_cutting(refused, private=True, least="c2") == {"c1", "c2", "c3"}
    bare = tuple(dataclasses.replace(one, leak=None) for one in THREE)
    assert worth_cutting(bare, private=True, least="c2") == {"c2", "c3"}


def test_a_cut_that_takes_the_device_as_long_as_staying_local_is_the_best_on_no_link() -> None:
    local = Cut("local", 4, Millis(120, 120), Millis(0, 0), memory_mb=40)
    assert worth_cutting((*THREE, local)) == {"c1", "c2"}
    assert worth_cutting((*THREE, local), private=True) == {"c2"}
    assert worth_cutting((*THREE, local), memory_mb=20) == {"c1", "c3"}  # local does not fit, so it beats nothing
    quick = dataclasses.replace(local, device_ms=Millis(20, 20))
    assert worth_cutting((*THREE, quick), private=True) == {"c2", "c3"}  # none is sooner: there to be pinned
    assert worth_cutting((*THREE, local), private=True, least="c3") == {"c3"}  # declared


def test_a_split_that_takes_as_long_as_staying_local_is_never_called_the_best() -> None:
    plan = make_plan()
    cuts = tuple(dataclasses.replace(one, device_ms=Millis(160, 160)) if one.name == "c1" else one for one in plan.cuts)
    text = judge(dataclasses.replace(plan, cuts=cuts), Link(5, 5)).text
    assert "best split" not in text
    assert text.endswith("staying local takes 150 ms, every split takes the device as long as staying local")
