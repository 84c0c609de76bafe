"""The split report: bars that differ, what is refused and why in sight, figures as people read them."""

import dataclasses
import re

from cloud.split.report import privacy, render_html
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
