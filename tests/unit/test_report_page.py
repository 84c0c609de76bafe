"""`report.json` keeps its keys; `report.html` is one page that needs nothing else and says what the verdict means."""

import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cloud.cli import findings
from compress import charts, layer_chart, words
from compress.html import page
from compress.lineage import Lineage
from compress.recipe import Recipe, RecipeGroup, RecipeLayer, RecipeTraining, load_recipe
from compress.report import Baseline, Details, LayerRow, Moment, Point, Report, Result
from compress.svg import ticks
from skills.errors import FormatError
from skills.profile import Profile

PROFILE = Profile("board", "onnxruntime", "x86_64")


def layer_rows(count: int) -> tuple[LayerRow, ...]:
    widths = (8, 4, 3, 2, 1.6, 32)
    return tuple(
        LayerRow(
            f"/layer{at}/<conv>", "Conv", "float" if at % 7 == 6 else "int8", widths[at % 6], 500 * at, 2000 * at, 300 * at,
            "Conv" if at % 7 == 6 else "QLinearConv", "depthwise & slower" if at % 7 == 6 else "",
            {4: 0.001 * at, 2: 0.1, 1.6: -0.1} if at else {},
        )
        for at in range(count)
    )  # fmt: skip


def details(**more: Any) -> Details:
    base = Details("net.onnx", "model.onnx", 1.0, "both", 0, (), {}, (), (), {})
    return dataclasses.replace(base, **more)


def report(verdict: str = "proven", metric: str = "top1", **more: Any) -> Report:
    return Report(
        metric, verdict, 0.6, (0.1, 0.9), 5000, Baseline(0.878, 1_120_000, 1_093_434, 1_010_000, 0.9, 1.0, 12),  # type: ignore[arg-type]
        Result(0.872, 90_000, 68_000, 0.3, 0.33, 15), 12.1, 16.1, 3.0, "x86-vnni", 1, 1, 1800.0, details(**more),
    )  # fmt: skip


def full(count: int) -> Report:
    points = tuple(
        Point(f"point {at}", 40_000 * (at + 1), 30_000, at - 1.0, (at - 2.0, at + 90.0), None, None, chosen=at == 1)
        for at in range(4)
    )
    trail = tuple(Moment(float(at), 3.0 + at, None, f"step {at}") for at in range(3))
    pieces = {"weights in 4 bits": 50_000, "scales and biases": 20_000, "graph": 20_000}
    return report(
        layers=layer_rows(count), kernels={"QLinearConv": 9}, notes=("noted <b>",), warnings=("warned",),
        samples={"report": 5000}, pareto=points, trail=trail, time_budget=1800.0, pieces_after=pieces,
        pieces_before={"weights in 32 bits": 1_000_000, "graph": 93_434}, bytes_plain=300_000, weights=(9, 5), macs=(8, 4),
        least_runtime="onnxruntime 1.21", data_level="training",
    )  # fmt: skip


STAGE = RecipeTraining(
    "rung 1", 900, 128, 0.002, bits={"a": 1.6}, groups=(RecipeGroup(2, (0, 3, 4)),), branches=("add_1",)
)
RECIPE = Recipe(
    PROFILE, 1.0, "both", 3, ("canonicalise", "train"), (RecipeLayer("a", "int8", 1.6), RecipeLayer("b", "float", 32)),
    {"bias": "sequential"}, (STAGE,), "top1", inputs={"model": "a" * 64},
)  # fmt: skip
TRACE = Lineage("b" * 64, {"model": "a" * 64}, {"onnx": "1"}, 3, "board", {"report": 5000}, {"report": "c" * 64})


class Page(HTMLParser):
    """Every tag closed in order, every attribute seen."""

    VOID = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_json_has_exactly_the_documented_keys() -> None:
    written = json.loads(json.dumps(full(5).to_json()))
    assert list(written) == [
        "metric_name", "verdict", "drop", "drop_ci95", "n_report", "baseline", "result", "ratio_file", "ratio_package",
        "speedup", "device", "threads", "batch", "seconds", "inputs_made_up", "warnings",
    ]  # fmt: skip
    assert (written["inputs_made_up"], written["warnings"]) == (False, ["warned"])
    sizes = ["bytes_file", "bytes_package", "latency_ms_p50", "latency_ms_p90", "load_ms"]
    assert list(written["baseline"]) == ["metric", "bytes_input", *sizes]
    assert list(written["result"]) == ["metric", *sizes]


@pytest.mark.parametrize("count", [0, 1, 5, 60, 400])
def test_the_page_is_whole_and_refers_to_nothing_outside(count: int) -> None:
    text = page(full(count), RECIPE, TRACE)
    seen = Page(text).attributes
    assert not [
        item for item in seen if item[1] in ("src", "href", "srcset", "data", "action") or item[1].startswith("on")
    ]
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link|<iframe", text)
    assert "nan" not in re.sub(r"<style>.*</style>", "", text).lower()
    assert "<conv>" not in text
    numbers = [
        float(value or 0) for _, name, value in seen if name in ("x", "y", "width", "height", "cx", "cy", "x1", "y2")
    ]
    assert all(-1 <= number <= 1500 for number in numbers if number)


@pytest.mark.parametrize("verdict", ["proven", "within_budget_unproven", "not_reached"])
@pytest.mark.parametrize(
    ("metric", "level", "unit"),
    [
        ("top1", "training", "percentage points"), ("agreement", "unlabelled", "percentage points"),
        ("cosine", "none", "percentage points"), ("mse", "calibration", "per cent"), ("my <metric>", "training", "per cent"),
    ],
)  # fmt: skip
def test_the_page_comes_out_for_every_verdict_metric_and_level_of_data(
    verdict: str, metric: str, level: str, unit: str
) -> None:
    text = page(report(verdict, metric, data_level=level, unit=unit))
    Page(text)
    assert (words.MADE_UP if level == "none" and verdict != "not_reached" else words.VERDICTS[verdict][0]) in text
    assert words.LEVELS[level] in text  # type: ignore[index]
    assert "<metric>" not in text


@pytest.mark.parametrize("metric", ["top1", "macro_f1", "psnr", "my [metric]"])
def test_the_terminal_says_the_same_as_the_page(metric: str) -> None:
    out = io.StringIO()
    unproven = report(
        "within_budget_unproven", metric, data_level="unlabelled", samples_for_proof=8_312, warnings=("slow",)
    )
    Console(file=out, width=160).print(findings.compressed(unproven), markup=False)
    said = " ".join(out.getvalue().split())
    for part in (words.headline(unproven), "about 8,400 samples", words.LEVELS["unlabelled"], "warning: slow"):
        assert part in said
    assert words.metric_words(unproven) in said


@pytest.mark.parametrize(
    ("on", "said"), [("", "batch 1, x86-vnni"), ("aarch64", "on this aarch64 machine, not on x86-vnni")]
)
def test_times_of_another_architecture_than_the_target_say_where_they_were_taken(on: str, said: str) -> None:
    out = io.StringIO()
    told = report(timed_on=on)
    Console(file=out, width=160).print(findings.compressed(told), markup=False)
    for shown in (page(told), " ".join(out.getvalue().split())):
        assert said in shown


@pytest.mark.parametrize("verdict", ["proven", "within_budget_unproven"])
@pytest.mark.parametrize("drop", [0.0, 0.6])
def test_without_data_nothing_is_said_of_accuracy_but_that_it_is_not_known(verdict: str, drop: float) -> None:
    blind = dataclasses.replace(report(verdict, "agreement", data_level="none", samples_for_proof=1200), drop=drop)
    out = io.StringIO()
    Console(file=out, width=160).print(findings.compressed(blind), markup=False)
    for said in (page(blind), " ".join(out.getvalue().split())):
        assert not [
            wrong for wrong in ("nothing lost", "would be", "points lost", "Proven", "not proven") if wrong in said
        ]
        assert said.lower().count("no data was given") == 1
        assert words.headline(blind).endswith("3.0 times as fast.")
        assert words.MADE_UP in said
    assert blind.to_json()["inputs_made_up"] is True
    assert blind.to_json()["verdict"] == verdict


def test_an_unproven_result_says_how_many_samples_a_proof_would_need() -> None:
    assert "about 8,400 samples" in words.meaning(report("within_budget_unproven", samples_for_proof=8_312))
    assert "no number of samples" in words.meaning(report("within_budget_unproven", samples_for_proof=None))
    assert "would" not in words.meaning(report("proven", samples_for_proof=3))


def test_a_result_behind_an_unproven_one_says_so() -> None:
    late = dataclasses.replace(report("within_budget_unproven", samples_for_proof=8_312), drop_ci95=(-0.4, 0.4))
    assert "a less compressed model looked at before" in words.meaning(late)
    assert "about 8,400 samples" in words.meaning(late)


def test_the_headline_says_what_came_in_what_came_out_and_what_was_lost() -> None:
    assert words.headline(report()) == (
        "1.1 MB came in, 90.0 kB came out: 12.1 times smaller and 3.0 times as fast, 0.60 points lost."
    )
    won = dataclasses.replace(report(), drop=-0.5, speedup=0.9)
    assert words.headline(won).endswith("0.90 times as fast, 0.50 points won.")


def test_the_picture_of_drops_holds_every_interval_and_its_words_lie_over_none() -> None:
    spans = ((-2.72, -0.85), (-2.55, -0.58), (-0.3, 40.0))
    points = tuple(
        Point(f"bolder {at}", 50_000 - 9_000 * at, 9, sum(span) / 2, span, chosen=not at)
        for at, span in enumerate(spans)
    )
    drawn = charts.tradeoff(points, 1.0, "percentage points")
    axis = {
        float(said): float(y) - 4 for y, said in re.findall(r'y="([\d.]+)" text-anchor="end">(-?[\d.]+)</text>', drawn)
    }
    (low, bottom), (high, top) = min(axis.items()), max(axis.items())
    bars = re.findall(r'<g><line x1="[\d.]+" y1="([\d.]+)" x2="[\d.]+" y2="([\d.]+)"', drawn)
    ends = sorted(
        tuple(round(low + (bottom - float(y)) * (high - low) / (bottom - top), 1) for y in pair) for pair in bars
    )
    assert ends == [tuple(round(end, 1) for end in span) for span in sorted(spans)]
    (label,) = re.findall(r'y="([\d.]+)"[^>]*>dashed line: the budget, 1<', drawn)
    assert float(label) < min(float(y) for pair in bars for y in pair)


def test_a_value_that_the_axis_of_sensitivity_does_not_reach_is_drawn_below_it() -> None:
    row = LayerRow("a", "Conv", "int8", 4, 500, 2000, 300, harm={4: 0.02, 3: 10.0, 2: 1e-9, 1.6: 0.0})
    drawn = layer_chart.layers((row,))
    dots = {said: float(y) for y, said in re.findall(r'<circle [^>]*cy="([\d.]+)"[^>]*><title>(.*?)</title>', drawn)}
    (floor,) = (float(y) - 4 for y in re.findall(r'y="([\d.]+)" text-anchor="end">0.0001</text>', drawn))
    assert {said for said, y in dots.items() if y > floor} == {
        "1 a in 2 bits: 1e-09, below the axis", "1 a in 1.6 bits: 0, below the axis",
    }  # fmt: skip
    assert "&lt; 0.0001</text>" in drawn


def test_each_layer_of_known_sensitivity_has_one_filled_dot_in_8_bits_too() -> None:
    rows = [
        LayerRow(f"{bits:g}", "Conv", "int8", bits, 500, 2000, 300, harm={4: 0.02, 2: 0.1}) for bits in (8.0, 4.0, 2.0)
    ]
    dots = re.findall(r'<circle [^>]*fill="([^"]+)"[^>]*><title>\d (\d) in (\d) bits', layer_chart.layers(rows))
    assert sorted((name, bits) for fill, name, bits in dots if fill != "var(--paper)") == [
        ("2", "2"), ("4", "4"), ("8", "8"),
    ]  # fmt: skip


def test_one_layer_is_one_layer() -> None:
    text = page(report(layers=layer_rows(2)[1:], kernels={"QLinearConv": 1}))
    assert "1 layers" not in text
    assert "1 of 1 layer runs in int8 kernels" in text


def test_a_model_that_was_passed_over_says_why_in_the_list_in_the_picture_and_in_words() -> None:
    point = Point("bolder 1", 40_000, 30_000, 0.4, (0.1, 0.9), over=1.234)
    chosen = Point("calibrated", 50_000, 30_000, 0.4, (0.1, 0.9), chosen=True)
    text = page(report(pareto=(chosen, point)))
    assert "bolder 1, not taken: over the budget on all parts of the data together (1.23 points)" in text
    assert "A dashed ring keeps the budget there" in text
    assert "Bolder: " not in text
    assert "Calibrated: made without training" in text
    assert text.count('stroke-dasharray="3 2.5"') == 1
    taken = page(report(pareto=(chosen, dataclasses.replace(point, over=None))))
    assert "not taken" not in taken
    assert 'stroke-dasharray="3 2.5"' not in taken


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(3, 12))
def test_ticks_are_inside_evenly_spaced_and_few(low: float, span: float, most: int) -> None:
    high = low + span
    found = ticks(low, high, most)
    assert len(found) <= most
    slack = 1e-6 * max(abs(low), span, 1.0)
    assert all(low - slack <= tick <= high + slack for tick in found)


def test_a_recipe_comes_back_as_it_was_written() -> None:
    assert load_recipe(RECIPE.encode().decode(), "recipe.yaml") == RECIPE


@pytest.mark.parametrize(
    ("was", "wrong", "sentence"),
    [
        ("seed: 3", "sead: 3", r"line \d+: unknown key 'sead', did you mean 'seed'"),
        ("compute: int8", "compute: int9", r"line \d+: 'layers\[0\].compute' is 'int9', expected one of"),
        ("bits: 1.6", "bits: 1.5", r"'layers\[0\].bits' is 1.5, expected one of 32, 8, 4"),
        ("steps: 900", "steps: many", r"line \d+: .*steps' is 'many', expected a whole number"),
        ("a" * 64, "abc", "expected 64 hexadecimal digits"),
    ],
)
def test_a_wrong_recipe_names_the_line_and_the_right_key(was: str, wrong: str, sentence: str) -> None:
    text = RECIPE.encode().decode()
    assert was in text
    with pytest.raises(FormatError, match=sentence):
        load_recipe(text.replace(was, wrong, 1), "recipe.yaml")
