"""The plan file, its hash, and which cut a request takes."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skills.coding import Coding, Live
from skills.errors import FormatError, UsageError
from skills.network import Link, parse_link, slow_start_ms
from skills.oip import MAX_MESSAGE_BYTES
from skills.split import (
    CALL_BYTES,
    CODED_REPLY_BYTES,
    Choice,
    Estimate,
    Held,
    admitted,
    choose_cut,
    moved_bytes,
    predict,
    predict_ms,
    settle,
)
from skills.split_plan import Cut, Millis, Plan, Policy, Segment, load_plan, plan_hash
from skills.wire import encode_yaml


def ms(value: float) -> Millis:
    return Millis(value, value)


def make_plan(**changes: object) -> Plan:
    x, mid, out = (Live(name, "FP32", (-1, 8)) for name in ("x", "mid", "out"))
    cuts = (
        Cut("input", 0, ms(0), ms(10), (x,), (Coding("native", bytes_p50=30_000),), raw=True),
        Cut("c1", 1, ms(20), ms(8), (mid,), (Coding("u8", scales=(0.1,), zeros=(0,), bytes_p50=20_000),)),
        Cut("c2", 2, ms(60), ms(4), (mid,), (Coding("u4", scales=(0.1,), zeros=(0,), bytes_p50=2_000),)),
        Cut("local", 3, ms(100), ms(0)),
    )
    segments = (
        Segment("segments/0.onnx", "0" * 64, 9, ("x",), ("mid",)),
        Segment("segments/1.onnx", "1" * 64, 9, ("mid",), ("mid2",)),
        Segment("segments/2.onnx", "2" * 64, 9, ("mid2",), ("out",)),
    )
    plan = Plan("a" * 64, (x,), (out,), segments, cuts)
    return dataclasses.replace(plan, **changes)  # type: ignore[arg-type]


def test_a_plan_reads_back_as_it_was_written() -> None:
    plan = make_plan(private=True, min_cut="c2", policy=Policy(minimize="bytes", slo_ms=80.0))
    assert load_plan(encode_yaml(plan, "a comment")) == plan


U8_REPLY = Coding("u8", scales=(0.1,), zeros=(0,), bytes_p50=19_000, encode_ms=0.3, decode_ms=3.0)


def detecting_plan(**changes: object) -> Plan:
    """A plan whose answer has 106 kB raw and 19 kB coded, which the coding of the input and that of c1 may use."""
    plan = make_plan()
    cuts = tuple(
        dataclasses.replace(cut, codings=tuple(dataclasses.replace(one, reply="u8") for one in cut.codings))
        if cut.name != "c2" else cut
        for cut in plan.cuts
    )  # fmt: skip
    made = {"cuts": cuts, "reply_bytes": 106_080, "replies": (U8_REPLY,)} | changes
    return dataclasses.replace(plan, **made)  # type: ignore[arg-type]


def test_a_reply_is_coded_where_that_is_sooner_and_its_real_bytes_count() -> None:
    plan = detecting_plan()
    cut, coding = plan.cut("input"), plan.cut("input").codings[0]
    for mbit, kind in ((1.0, "u8"), (20.0, "u8"), (1000.0, None)):
        found = predict(plan, cut, coding, Estimate(mbit, 5))
        assert (found.reply.name if found.reply else None) == kind
        back = (19_042 if kind else 106_080) * 8 / (mbit * 1000) + (3.3 if kind else 0)
        assert found.ms == pytest.approx(10 + 5 + (30_000 + CALL_BYTES) * 8 / (mbit * 1000) + 3 + back)
    hot = predict(plan, cut, coding, Estimate(100.0, 5), alpha=5.0)
    assert hot.reply is None  # the device decodes too slowly now
    assert (
        predict(plan, plan.cut("c2"), plan.cut("c2").codings[0], Estimate(1, 5)).reply is None
    )  # no reply was gated with it


def test_a_coded_reply_makes_a_slow_link_worth_asking_over() -> None:
    plan, slow = detecting_plan(), Estimate(8, 5)
    assert choose_cut(dataclasses.replace(plan, cuts=make_plan().cuts, replies=()), slow).cut.name == "local"
    chosen = choose_cut(plan, slow)
    assert (chosen.cut.name, chosen.reply) == ("input", U8_REPLY)
    assert moved_bytes(plan, chosen) == 49_000


def test_where_bytes_are_billed_those_of_the_reply_count_too() -> None:
    plan = detecting_plan(policy=Policy(minimize="bytes", slo_ms=60))
    chosen = choose_cut(plan, Estimate(100, 5))
    assert (chosen.cut.name, chosen.reply) == ("c1", U8_REPLY)  # 39 kB; the input would move 49, and c2 108


def test_an_answer_that_no_message_holds_raw_comes_back_coded_or_is_never_asked_for() -> None:
    fast = Estimate(1e6, 0.1)  # raw is the fastest
    plan = detecting_plan(reply_bytes=MAX_MESSAGE_BYTES - CALL_BYTES)
    assert {cut.name for cut, _ in admitted(plan)} == {"local", "input", "c1", "c2"}
    assert (choose_cut(plan, fast).cut.name, choose_cut(plan, fast).reply) == ("input", None)
    large = dataclasses.replace(plan, reply_bytes=MAX_MESSAGE_BYTES - CALL_BYTES + 1)
    assert {cut.name for cut, _ in admitted(large)} == {"local", "input", "c1"}  # c2 has no reply
    assert (choose_cut(large, fast).cut.name, choose_cut(large, fast).reply) == ("input", U8_REPLY)
    assert choose_cut(dataclasses.replace(large, policy=Policy(pin="c2")), fast).cut.name == "local"
    no_smaller = dataclasses.replace(U8_REPLY, bytes_p95=MAX_MESSAGE_BYTES)
    assert choose_cut(dataclasses.replace(large, replies=(no_smaller,)), fast).cut.name == "local"


def test_a_plan_of_before_keeps_its_hash_and_its_raw_replies() -> None:
    assert plan_hash(make_plan()) == "dbe9576d87093a76"
    assert "repl" not in encode_yaml(make_plan())
    other = dataclasses.replace(U8_REPLY, scales=(0.2,))
    assert len({plan_hash(detecting_plan()), plan_hash(detecting_plan(replies=(other,))), plan_hash(make_plan())}) == 3


@pytest.mark.parametrize("scale", [".nan", ".inf", "0.0", "-0.1", "1e-40"])
def test_a_reply_whose_scale_is_no_positive_number_is_refused(scale: str) -> None:
    head, key, replies = encode_yaml(detecting_plan()).partition("\nreplies:")
    assert "[0.1]" in replies
    assert load_plan(head + key + replies) == detecting_plan()
    with pytest.raises(FormatError, match="scales"):
        load_plan(head + key + replies.replace("[0.1]", f"[{scale}]", 1))


def test_what_names_a_replys_coding_takes_the_bytes_that_the_cost_model_counts() -> None:
    from skills import oip

    plain, coded = oip.messages().ModelInferRequest(), oip.messages().ModelInferRequest()
    coded.parameters["split.reply"].string_param = "u8"
    assert 2 * (coded.ByteSize() - plain.ByteSize()) == CODED_REPLY_BYTES


def test_a_misspelt_key_names_its_line_and_the_right_key() -> None:
    text = encode_yaml(make_plan()).replace("bytes_p50", "byte_p50", 1)
    line = next(at for at, row in enumerate(text.splitlines(), 1) if "byte_p50" in row)
    with pytest.raises(FormatError, match=rf"split.yaml line {line}: unknown key 'byte_p50', did you mean 'bytes_p50'"):
        load_plan(text)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda plan: dataclasses.replace(plan, cuts=plan.cuts[1:]), "'local' and 'input' must be among them"),
        (lambda plan: dataclasses.replace(plan, min_cut="c9"), "min_cut is c9, the cuts are input, c1, c2, local"),
        (lambda plan: dataclasses.replace(plan, segments=(*plan.segments[1:], plan.segments[0])), "needs 'mid', which nothing"),
        (lambda plan: dataclasses.replace(plan.cuts[1], tensors=()), "0 tensors, its coding u8 1 scales"),
        (lambda plan: dataclasses.replace(plan, policy=Policy(pin="c7")), "policy.pin is c7"),
        (lambda plan: detecting_plan(replies=()), "cut input: the coding native has the reply 'u8', the plan's replies are none"),
        (lambda plan: detecting_plan(replies=(U8_REPLY, U8_REPLY)), "the replies are u8, u8: each name once"),
        (lambda plan: dataclasses.replace(plan, replies=(Coding("png"),)), "none is for pictures"),
        (lambda plan: dataclasses.replace(plan, replies=(Coding("u16"),)), "1 outputs, the reply u16 0 scales"),
    ],
)  # fmt: skip
def test_a_plan_that_contradicts_itself_is_refused(change: object, sentence: str) -> None:
    with pytest.raises(FormatError, match=sentence):
        change(make_plan())  # type: ignore[operator]


def test_a_scale_that_is_no_number_is_refused() -> None:
    with pytest.raises(FormatError, match=r"scales\[0\]"):
        load_plan(encode_yaml(make_plan()).replace("[0.1]", "[.nan]", 1))


def test_the_hash_covers_what_both_sides_must_agree_on_and_nothing_else() -> None:
    plan = make_plan()
    edited = dataclasses.replace(plan, policy=Policy(pin="c1"), private=True, slowdown=3.0, network=Link(1, 1))
    assert plan_hash(edited) == plan_hash(plan)
    other_scale = dataclasses.replace(plan.cuts[1], codings=(Coding("u8", scales=(0.2,), zeros=(0,)),))
    assert plan_hash(dataclasses.replace(plan, cuts=(plan.cuts[0], other_scale, *plan.cuts[2:]))) != plan_hash(plan)


@pytest.mark.parametrize(
    ("text", "link"), [("20mbit/30ms", Link(20, 30)), ("500kbit/5ms", Link(0.5, 5)), ("1.5Mbit/s/10 ms", Link(1.5, 10))]
)
def test_a_link_is_read_as_people_write_it(text: str, link: Link) -> None:
    assert parse_link(text) == link


@pytest.mark.parametrize("text", ["", "20", "20mbit", "0mbit/5ms", "fast/5ms", "20mbit/30s"])
def test_another_spelling_of_a_link_is_one_sentence(text: str) -> None:
    with pytest.raises(UsageError, match="20mbit/30ms|out of range"):
        parse_link(text)


def test_slow_start_costs_what_was_measured_on_a_cold_link() -> None:
    # Measured on a shaped link of 20 Mbit/s and 50 ms: 16 kB 103 ms, 64 kB 158 ms from request to answer.
    for size, measured in ((16_000, 103), (64_000, 158)):
        assert 50 + size * 8 / 20_000 + slow_start_ms(size, 20, 50) == pytest.approx(measured, abs=3)


def test_the_cut_follows_the_link() -> None:
    plan = make_plan()
    taken = [choose_cut(plan, Estimate(mbit, 5)).cut.name for mbit in (200.0, 10.0, 3.0, 0.2)]
    assert taken == ["input", "input", "c2", "local"]


def test_a_link_that_is_down_means_local() -> None:
    assert choose_cut(make_plan(), Estimate(1000, 0.1, up=False)).cut.name == "local"


def test_a_cold_link_favours_small_payloads() -> None:
    warm, cold = (choose_cut(make_plan(), Estimate(20, 45, cold=cold)).cut.name for cold in (False, True))
    assert (warm, cold) == ("input", "local")


def test_a_pinned_cut_is_used_while_the_link_is_up() -> None:
    plan = make_plan(policy=Policy(pin="c2"))
    assert choose_cut(plan, Estimate(1000, 1)).cut.name == "c2"
    assert choose_cut(plan, Estimate(1000, 1, up=False)).cut.name == "local"


def test_with_bytes_as_the_objective_the_fewest_bytes_in_time_win() -> None:
    for slo_ms, cut in ((90, "c2"), (30, "input"), (500, "local"), (5, "input")):
        plan = make_plan(policy=Policy(minimize="bytes", slo_ms=slo_ms))
        assert choose_cut(plan, Estimate(100, 5)).cut.name == cut


def test_a_coding_over_the_budget_is_never_chosen() -> None:
    plan = make_plan()
    refused = dataclasses.replace(plan.cuts[0], codings=(dataclasses.replace(plan.cuts[0].codings[0], admitted=False),))
    plan = dataclasses.replace(plan, cuts=(refused, *plan.cuts[1:]))
    assert choose_cut(plan, Estimate(1000, 1)).cut.name == "c1"


rates = st.floats(0.01, 10_000)
trips = st.floats(0, 2000)


@given(
    mbit=rates,
    rtt=trips,
    alpha=st.floats(0.1, 10),
    cold=st.booleans(),
    least=st.sampled_from([None, "c1", "c2", "local"]),
)
def test_a_private_plan_never_sends_the_input_nor_anything_before_its_least_cut(
    mbit: float, rtt: float, alpha: float, cold: bool, least: str | None
) -> None:
    plan = make_plan(private=True, min_cut=least)
    choice = choose_cut(plan, Estimate(mbit, rtt, cold=cold), alpha=alpha)
    assert not choice.cut.raw
    assert choice.cut.after >= (plan.cut(least).after if least else 1)


@given(mbit=rates, rtt=trips, alpha=st.floats(0.1, 10))
def test_the_choice_is_never_slower_than_any_other_allowed_option(mbit: float, rtt: float, alpha: float) -> None:
    plan, estimate = make_plan(), Estimate(mbit, rtt)
    choice = choose_cut(plan, estimate, alpha=alpha)
    for cut in plan.cuts:
        for coding in cut.codings or (None,):
            assert choice.ms <= predict_ms(plan, cut, coding, estimate, alpha)


def test_a_small_gain_switches_only_after_several_in_a_row() -> None:
    plan = make_plan()
    slow, fast = Estimate(3, 5), Estimate(4.8, 5)
    held = settle(plan, None, choose_cut(plan, slow), slow, 0.0)
    assert held.choice.cut.name == "c2"
    taken = []
    for at in range(4):
        held = settle(plan, held, choose_cut(plan, fast), fast, 10.0 + at)
        taken.append(held.choice.cut.name)
    assert taken == ["c2", "c2", "input", "input"]


def test_a_large_gain_switches_at_once_but_not_within_the_dwell() -> None:
    plan, fast = make_plan(), Estimate(500, 5)
    held = Held(Choice(plan.cut("local"), None, 100.0), since_s=0.0)
    assert settle(plan, held, choose_cut(plan, fast), fast, 0.5).choice.cut.name == "local"
    assert settle(plan, held, choose_cut(plan, fast), fast, 1.5).choice.cut.name == "input"


def test_with_bytes_as_the_objective_fewer_bytes_within_the_limit_are_the_gain_though_they_come_later() -> None:
    plan, link = make_plan(policy=Policy(minimize="bytes", slo_ms=90)), Estimate(100, 5)
    held = Held(predict(plan, plan.cut("input"), plan.cut("input").codings[0], link), since_s=0.0)
    best = choose_cut(plan, link)
    assert (best.cut.name, best.ms > held.choice.ms) == ("c2", True)
    assert settle(plan, held, best, link, 0.5).choice.cut.name == "input"  # not within the dwell
    assert settle(plan, held, best, link, 1.5).choice.cut.name == "c2"


def test_with_bytes_as_the_objective_a_few_bytes_less_switch_only_after_several_in_a_row() -> None:
    fewer = dataclasses.replace(make_plan().cut("c1"), codings=(Coding("native", bytes_p50=27_000),))
    cuts = tuple(fewer if cut.name == "c1" else cut for cut in make_plan().cuts if cut.name != "c2")
    plan, link = make_plan(policy=Policy(minimize="bytes", slo_ms=90), cuts=cuts), Estimate(100, 5)
    held = Held(predict(plan, plan.cut("input"), plan.cut("input").codings[0], link), since_s=0.0)
    taken = []
    for at in range(4):
        held = settle(plan, held, choose_cut(plan, link), link, 10.0 + at)
        taken.append(held.choice.cut.name)
    assert taken == ["input", "input", "c1", "c1"]


def test_with_bytes_as_the_objective_a_choice_that_became_too_late_is_left_for_more_bytes_in_time() -> None:
    plan = make_plan(policy=Policy(minimize="bytes", slo_ms=60))
    before, link = Estimate(100, 5), Estimate(7, 5)  # the input would now take 55 ms, c1 59.2
    held = Held(predict(plan, plan.cut("c2"), plan.cut("c2").codings[0], before), since_s=0.0)
    best = choose_cut(plan, link)
    assert best.ms <= 60 < predict_ms(plan, held.choice.cut, held.choice.coding, link)
    assert moved_bytes(plan, best) > moved_bytes(plan, held.choice)
    assert settle(plan, held, best, link, 1.5).choice.cut.name == best.cut.name


def test_a_link_that_goes_down_is_left_at_once() -> None:
    plan, up, down = make_plan(), Estimate(500, 5), Estimate(500, 5, up=False)
    held = settle(plan, None, choose_cut(plan, up), up, 0.0)
    assert settle(plan, held, choose_cut(plan, down), down, 0.01).choice.cut.name == "local"


@given(st.text(max_size=400))
def test_any_text_is_a_plan_or_a_format_error(text: str) -> None:
    with pytest.raises(FormatError):
        load_plan(text)
