"""The split report: bars that differ, what is refused and why in sight, figures as people read them."""

import dataclasses
import io
import re
from typing import Any

from rich.console import Console

from cloud.cli import findings
from cloud.split.report import audit_rows, doubts, privacy, render_html
from skills.coding import Coding, Live
from skills.network import Link
from skills.split_plan import Cut, Leak, Millis, Plan, Segment, Verdict

AUDIT = {"threshold": 0.3, "floor": 0.0, "measure": "explained variance", "inputs": 240, "control": 0.9}
TIMES = {"chain_ms_here": {"p50": 0.04}, "whole_ms_here": {"p50": 0.02}, "max_abs_difference": 0.0}


def make_plan(value: float, *, private: bool = True) -> Plan:
    x, mid, out = (Live(name, "FP32", (-1, 8)) for name in ("x", "b1", "out"))
    small, large = (
        Coding(name, scales=(0.1,), zeros=(0,), bytes_p50=size, bytes_p95=size, drop=drop, admitted=drop <= 1)
        for name, size, drop in (("u4", 28, 2.0), ("u8", 28_000, 0.5))
    )
    leak = Leak("private" if value <= 0.3 else "recoverable", "explained variance", value, 240, flat=True)
    cuts = (
        Cut(
            "input",
            0,
            Millis(0, 0),
            Millis(1, 1),
            (x,),
            (Coding("native", bytes_p50=90_000, bytes_p95=90_000),),
            raw=True,
        ),
        Cut("c1", 1, Millis(0.2, 0.2), Millis(1, 1), (mid,), (small, large), leak=leak),
        Cut("local", 2, Millis(0.4, 0.4), Millis(0, 0)),
    )
    segments = tuple(
        Segment(f"segments/{at}.onnx", str(at) * 64, 9, (one,), (two,))
        for at, (one, two) in enumerate((("x", "b1"), ("b1", "out")))
    )
    link = Link(5, 30)
    verdict = Verdict(link, "local", "", 0.4, "stay local")
    return Plan("a" * 64, (x,), (out,), segments, cuts, private=private, samples=100, verdicts=(verdict,))


def bars(page: str) -> list[float]:
    return [float(width) for width in re.findall(r'<rect x="\d+" y="\d+" width="([\d.]+)"', page)]


def rows(page: str) -> list[list[str]]:
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr class.*?</tr>", page)]


def test_bars_end_where_their_time_does_though_the_device_is_far_faster() -> None:
    found = bars(render_html(make_plan(0.9, private=False), TIMES))
    assert len(found) == len(set(found)) == 3
    assert found[-1] > 2 * found[-2] > 50 * found[0]


def test_status_and_drop_stand_before_the_measurements_and_say_why_a_row_is_refused() -> None:
    page = render_html(make_plan(0.9), TIMES | {"privacy_audit": AUDIT})
    assert [row[:4] for row in rows(page)] == [
        ["input", "native", "refused: may not leave", "0.0"],
        ["c1", "u4", "recoverable", "2.0"],
        ["c1", "u8", "recoverable", "0.5"],
        ["local", "", "admitted", ""],
    ]
    page = render_html(make_plan(0.1), TIMES | {"privacy_audit": AUDIT})
    assert [row[2] for row in rows(page)[1:3]] == ["refused: over the budget", "admitted, private"]


def test_a_cut_that_was_never_audited_is_called_so() -> None:
    plan = make_plan(0.1)
    bare = dataclasses.replace(plan, cuts=tuple(dataclasses.replace(cut, leak=None) for cut in plan.cuts))
    assert rows(render_html(bare, TIMES))[2][2] == "admitted, not audited"


def test_a_few_bytes_one_point_and_no_difference_are_said_as_such() -> None:
    page = render_html(make_plan(0.1), TIMES)
    assert "28 B" in page
    assert " 0.0 kB" not in page
    assert "more than 1 point is refused" in page
    assert "by at most 0, and take 0.04 ms here against 0.02 ms" in page
    assert "takes 0.4 ms there" in page


def test_an_audit_gives_its_value_and_limit_and_a_narrow_pass_looks_like_one() -> None:
    facts = {"privacy_audit": AUDIT}
    narrow, wide = privacy(make_plan(0.29), facts), privacy(make_plan(0.05), facts)
    assert (
        "kept private, but just under the limit: the decoder reached 0.29 explained variance, the limit is 0.30"
        in narrow
    )
    assert "kept private: the decoder reached 0.05 explained variance, the limit is 0.30" in wide
    assert "the decoder reached 0.90 explained variance, the limit is 0.30" in privacy(make_plan(0.9), facts)


def considered(*found: tuple[bool, float, str]) -> dict[str, Any]:
    """Return the details of an audit of three cuts or so: whether each was kept, what was rebuilt, the verdict."""
    leaks = [
        {"verdict": verdict, "measure": "ssim", "value": value, "inputs": 240, "flat": True}
        for _, value, verdict in found
    ]
    rows = [
        {"tensors": [f"t{at}"], "work_before": at / 10, "kept": kept, "leak": leak}
        for at, ((kept, _, _), leak) in enumerate(zip(found, leaks, strict=True))
    ]
    return {"privacy_audit": AUDIT | {"measure": "ssim"}, "considered": rows}


def test_every_audited_cut_is_shown_also_those_that_were_dropped() -> None:
    details = TIMES | considered((False, 0.8, "recoverable"), (True, 0.1, "private"), (False, 0.05, "private"))
    assert audit_rows(details) == [
        ("–", "0%", "0.80", "recoverable", "t0"),
        ("c1", "10%", "0.10", "private", "t1"),
        ("–", "20%", "0.05", "private", "t2"),
    ]
    page, out = render_html(make_plan(0.1), details), io.StringIO()
    Console(file=out, width=80).print(findings.split_table(make_plan(0.1), [Link(5, 30)], details))
    for row in audit_rows(details):
        assert (
            "".join(f'<td class="l">{cell}</td>' for cell in row[:-1]) + f'<td class="l where">{row[-1]}</td>' in page
        )
        assert any(line.split() == list(row) for line in out.getvalue().splitlines())


def test_where_no_audit_ran_nothing_is_said_to_have_been_measured_and_it_is_said_why() -> None:
    facts = {key: value for key, value in AUDIT.items() if key != "control"} | {
        "why": "only 60 inputs, an audit needs 200"
    }
    details = TIMES | considered((True, 0.0, "inconclusive")) | {"privacy_audit": facts}
    said = privacy(make_plan(0.9), details)
    assert "No cut was audited: only 60 inputs, an audit needs 200; so none of them counts as private." in said
    assert not re.search("decoder|reached|declared minimum", said)
    assert audit_rows(details) == []
    assert any("only 60 inputs, an audit needs 200" in text for text in doubts(make_plan(0.9), details))
    declared = dataclasses.replace(make_plan(0.9), min_cut="c1")
    assert "no cut before the declared minimum (c1) is used" in privacy(declared, details)


def test_a_drop_just_over_the_budget_shows_the_digits_that_make_it_so_and_local_has_no_tail() -> None:
    plan = make_plan(0.1)
    (small, large), c1 = plan.cuts[1].codings, plan.cuts[1]
    codings = (dataclasses.replace(small, drop=1.01), large)
    cuts = (plan.cuts[0], dataclasses.replace(c1, codings=codings), plan.cuts[2])
    page = render_html(dataclasses.replace(plan, cuts=cuts), TIMES)
    assert [row[3] for row in rows(page)[:3]] == ["0.0", "1.01", "0.5"]
    assert rows(page)[3][5:7] == ["0.4", ""]


def test_the_name_of_a_tensor_may_break_and_stands_outside_the_table_of_measurements() -> None:
    page = render_html(make_plan(0.1), TIMES)
    assert '<td class="l where">b1</td>' in page
    assert not any("b1" in row for row in rows(page))
