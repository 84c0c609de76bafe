"""What people see: sizes, ages, rollouts; and the two streams."""

import io
import json
import re

import pytest
from rich.console import Console

from cloud.cli import tables
from cloud.cli.screen import Manner, Screen
from cloud.cli.workshop import short
from cloud.demo.claims import Claims
from cloud.demo.facts import Times
from cloud.views import DeviceView, MemberView, RolloutView
from skills.errors import NotReached
from skills.units import readable


def text(view: object, width: int = 120) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(view)
    return out.getvalue()


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (71_692, "71.7 kB"), (999_999, "1.0 MB"), (18_600_000, "18.6 MB")],
)
def test_bytes_read_well(count: int, said: str) -> None:
    assert readable(count) == said


@pytest.mark.parametrize(
    ("gone", "said"), [(0, "0 s ago"), (119, "119 s ago"), (121, "2 min ago"), (7200, "2 h ago"), (200_000, "2 d ago")]
)
def test_ages_read_well(gone: float, said: str) -> None:
    assert tables.ago(1000.0, 1000.0 + gone) == said


def test_a_rollout_shows_canary_progress_bytes_and_reasons() -> None:
    fetching = MemberView("dock", "1.1.0", None, True, "assigned", "", True, "fetching", {}, 0.42, 65_000, 2_000)
    refused = MemberView("buoy", "1.1.0", None, False, "refused", "needs 24 MiB", True, "refused", {}, 0.0, 0, 0)
    away = MemberView("far", "1.1.0", None, False, "waiting", "", False, None, {}, 0.0, 0, 0)
    shown = text(
        tables.rollout(
            RolloutView(
                1, "digits", "1.1.0", "push", "all", 1, "running", False, "", 0.0, {}, (fetching, refused, away)
            )
        )
    )
    assert "dock canary" in shown
    assert "fetching 42%" in shown
    assert "65.0 kB" in shown
    assert "needs 24 MiB" in shown
    assert "offline" in shown


def test_a_rollout_says_its_own_state_and_reason_and_a_long_one_of_a_device_below_the_table() -> None:
    reason = "the probe differs: " + "word " * 60 + "end"
    member = MemberView("dock", "1.1.0", None, True, "failed", reason, True, "failed", {}, 0.0, 0, 0)
    view = RolloutView(3, "digits", "1.1.0", "push", "all", 1, "halted", False, reason, 0.0, {}, (member,))
    shown = text(tables.rollout_whole(view), 500)
    assert f"rollout 3: halted: {reason}" in shown
    assert f"dock: {reason}" in shown
    assert shown.count("end") == 2
    assert "end" not in text(tables.rollouts([view], now=1.0), 500)
    assert len(tables.short(reason)) <= tables.REASON_CHARACTERS
    assert tables.short("short") == "short"


def test_text_from_a_device_is_never_taken_for_markup() -> None:
    evil = DeviceView("x", {"a": "[red]b"}, "[/bold]", True, None, 0.0, None, {}, ())
    assert "[/bold]" in text(tables.devices([evil], now=1.0))


def test_json_goes_to_stdout_alone_and_quiet_says_nothing_beside() -> None:
    out, err = io.StringIO(), io.StringIO()
    screen = Screen(Manner(json=True), out, err)
    screen.say("remark")
    with screen.progress("working") as step:
        step("half", 0.5)
    screen.result({"a": (1, 2)}, lambda: pytest.fail("no view is made for JSON"))
    assert json.loads(out.getvalue()) == {"a": [1, 2]}
    assert err.getvalue() == ""
    quiet = Screen(Manner(quiet=True), out, err)
    quiet.say("remark")
    assert err.getvalue() == ""


def test_quiet_silences_remarks_and_no_warnings() -> None:
    out, err = io.StringIO(), io.StringIO()
    quiet, structured = Screen(Manner(quiet=True), out, err), Screen(Manner(json=True), out, io.StringIO())
    quiet.say("by the way")
    quiet.warn("the probe fails [here]")
    structured.warn("it is in the document")
    assert err.getvalue() == "warning: the probe fails [here]\n"
    assert out.getvalue() == ""
    assert structured._err.getvalue() == ""  # type: ignore[attr-defined]  # its own stream


def test_where_no_terminal_is_nothing_moves() -> None:
    out, err = io.StringIO(), io.StringIO()
    screen = Screen(Manner(), out, err)
    with screen.progress("working") as step, screen.live("table") as show:
        step("half", 0.5)
        show("changed")
    screen.say("[bold]remark[/bold]")
    screen.result(None, "done [/x]")
    screen.say("a path with [/x] in it")
    assert (out.getvalue(), err.getvalue()) == ("done [/x]\n", "remark\na path with [/x] in it\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [80, 120])
def test_the_progress_line_keeps_its_numbers_and_its_width_whatever_is_said(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    err = Terminal()
    with Screen(Manner(), io.StringIO(), err).progress("compressing") as step:
        step(f"{short('3.9x smaller, +0.00 points on select')} · training: {'weighing ' * 20}", 0.45)
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err.getvalue())
    lines = [line.strip() for line in re.split(r"[\r\n]", said) if line.strip()]
    assert lines
    assert all(len(line) <= columns for line in lines)
    assert " 45 % " in lines[-1]
    assert "0:00:0" in lines[-1]
    assert "best 3.9x, +0.00 · training" in lines[-1]


def test_the_clock_of_the_progress_line_goes_on_after_a_step_is_done_and_without_a_word_of_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    now = [1000.0]
    monkeypatch.setattr("rich.console.monotonic", lambda: now[0])
    err = Terminal()
    with Screen(Manner(), io.StringIO(), err).progress("splitting") as step:
        step("reading the graph", 1.0)
        now[0] += 3.0
        step("auditing what leaves", 0.0)
        now[0] += 72.0
    assert "0:01:15" in err.getvalue()


def test_a_claim_that_does_not_hold_ends_the_story_with_it() -> None:
    claims = Claims()
    claims.check("water is wet", True)
    claims.judge()
    claims.check("at least 6× smaller", False, "5.9×")
    with pytest.raises(
        NotReached, match="1 of 2 claims do not hold on this machine; the first: at least 6× smaller \\(5.9×\\)"
    ):
        claims.judge()


def test_times_are_median_ninth_decile_and_worst() -> None:
    assert Times.of([3.0, 1.0, 2.0, 10.0]) == Times(3.0, 10.0, 10.0, 4)
    assert Times.of([]) == Times(0.0, 0.0, 0.0, 0)
