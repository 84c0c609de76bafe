"""The table of cuts: what a person reads of a plan."""

import dataclasses
import io

from rich.console import Console

from cloud.cli import findings
from skills.coding import Coding, Live
from skills.network import Link
from skills.split_plan import Cut, Millis, Plan, Segment


def shown(plan: Plan, *links: Link, width: int = 160) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(findings.split_table(plan, links))
    return out.getvalue()


def row(text: str, *words: str) -> str:
    return next(line for line in text.splitlines() if all(word in line.split() for word in words))


def make_plan() -> Plan:
    x, out = (Live(name, "FP32", (-1, 8)) for name in ("x", "out"))
    codings = (
        Coding("native", bytes_p50=30_000, drop=-1.6, drop_ci95=(-4.0, 0.9)),
        Coding("u8", scales=(0.1,), zeros=(0,), bytes_p50=9_000, encode_ms=15, drop=0.4, drop_ci95=(-0.5, 1.3)),
    )
    cuts = (
        Cut("input", 0, Millis(0, 0), Millis(10, 10), (x,), codings, raw=True),
        Cut("local", 1, Millis(100, 100), Millis(0, 0)),
    )
    segments = (Segment("segments/0.onnx", "0" * 64, 9, ("x",), ("out",)),)
    return Plan("a" * 64, (x,), (out,), segments, cuts, metric="accuracy", samples=250, whole=0.92)


def test_with_labels_the_table_shows_the_accuracy_itself_and_never_more_than_all() -> None:
    text = shown(make_plan(), Link(100, 1))
    assert "93.6 %" in row(text, "input", "native")
    assert "92.0 %" in row(text, "local")
    assert "100.0 %" not in text


def test_agreement_with_the_whole_model_is_full_where_it_stays_local() -> None:
    text = shown(dataclasses.replace(make_plan(), metric="agreement", whole=1.0), Link(1, 1))
    assert "100.0 %" in row(text, "local")
    assert "99.6 %" in row(text, "input", "u8")


def test_every_coding_that_a_verdict_names_has_its_row() -> None:
    text = shown(make_plan(), Link(5, 1), Link(100, 1))
    assert "send the input (u8)" in text
    assert "send the input (native)" in text
    assert row(text, "input", "u8")
    assert row(text, "input", "native")


def test_a_plan_of_before_that_does_not_tell_the_whole_shows_the_drop() -> None:
    assert "drop -1.6" in row(shown(dataclasses.replace(make_plan(), whole=None), Link(100, 1)), "input")


def test_a_budget_that_the_inputs_cannot_prove_is_called_unproven_with_what_one_input_weighs() -> None:
    text = " ".join(shown(make_plan(), Link(5, 1)).split())
    assert "for 1 of 2 codings the budget of 1 point is unproven on 250 inputs (one input is 0.4 points)" in text
    assert "warning" not in text


def test_fewer_than_twenty_inputs_are_warned_of() -> None:
    text = " ".join(shown(dataclasses.replace(make_plan(), samples=8), Link(5, 1)).split())
    assert "warning: only 8 inputs" in text


def test_a_budget_whose_interval_is_inside_it_is_called_proven() -> None:
    assert "is proven on them" in " ".join(shown(dataclasses.replace(make_plan(), max_drop=2.0), Link(5, 1)).split())


def test_on_eighty_columns_nothing_is_broken_and_links_of_one_rate_have_heads_of_their_own() -> None:
    large = Coding("u8", scales=(0.1,), zeros=(0,), bytes_p50=150_000, drop=9.0, admitted=False)
    plan = make_plan()
    cuts = (
        plan.cuts[0],
        Cut("c1", 1, Millis(0.38, 0.4), Millis(0.12, 0.2), plan.inputs, (large,)),
        dataclasses.replace(plan.cuts[1], after=2),
    )
    segments = (plan.segments[0], dataclasses.replace(plan.segments[0], file="segments/1.onnx"))
    plan = dataclasses.replace(plan, cuts=cuts, segments=segments, metric="agreement")
    links = [Link(20, 10), Link(20, 100), Link(1000, 0.5), Link(1, 30), Link(5, 1000)]
    lines = [line.rstrip() for line in shown(plan, *links, width=80).splitlines()]
    heads = next(at for at, line in enumerate(lines) if "agreement" in line)
    assert "".join(lines).count("…") == 0
    assert lines[heads].split()[6:] == ["10", "ms", "100", "ms", "0.5", "ms"]
    assert any(line.split()[:6] == ["c1", "refused", "150.0", "kB", "–", "0.38"] for line in lines)
    assert "refused, over the budget: c1" in lines
    assert any(line.split() == ["cut", "coding", "30", "ms", "1000", "ms"] for line in lines)  # a table of their own
