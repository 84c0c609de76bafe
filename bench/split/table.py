"""The bench's numbers as Markdown. Pure."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cold
import switching
import throughput
import trace_run
from arms import AUTO_SPLIT, DADS, OUR_CHOICE
from figures import Cell, Judged, geomean, json_ratio, json_slower, judge, middle_ms, share_at
from wire import Checked

FIXED = (("stay local", lambda name: name == "local"), ("raw pixels", lambda name: name == "input pixels"),
         ("PNG", lambda name: name == "input png"), ("JPEG q75", lambda name: name == "input jpeg q75"),
         ("JPEG q90", lambda name: name == "input jpeg q90"))  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """All that was measured; what is None or empty was not."""

    about: str
    wire: str
    checks: Sequence[Checked]
    cells: Sequence[Cell]
    bbr: Sequence[Cell]
    cold: Sequence[Mapping[str, Any]]
    trace: Mapping[str, Any] | None
    switch: Mapping[str, Any] | None
    tail: Mapping[str, Any] | None
    missing: Sequence[str]


def page(found: Found) -> str:
    """Return everything as one section of bench/RESULTS.md, without its heading."""
    lines = [found.about, "", *_summary(found), ""]
    if found.missing:
        lines += ["Not measured: " + "; ".join(found.missing) + ".", ""]
    lines += [f"Link: {found.wire}. {_checked(found.checks)}", ""]
    if found.cells:
        lines += _cells([judge(cell) for cell in found.cells])
        lines += _rivals(found.cells)
    if found.bbr:
        lines += _beside(found.cells, found.bbr)
    for one in found.cold:
        lines += _cold(one)
    if found.trace:
        lines += _trace(found.trace)
    if found.tail:
        lines += _tail(found.tail)
    return "\n".join(lines)


def _summary(found: Found) -> list[str]:
    lines = ["| figure | asked | measured |", "|---|---|---|"]
    judged = [judge(cell) for cell in found.cells]
    if judged:
        regrets, noise = [one.regret for one in judged], [one.noise for one in judged]
        lines += [
            (
                f"| regret against the measured oracle, {len(judged)} cells | median ≤ 3 %, p95 ≤ 10 % | "
                f"**{statistics.median(regrets):.1%}**, **{share_at(regrets, 0.95):.1%}**, worst {max(regrets):.1%} |"
            ),
            (
                f"| the same option twice (A/A noise) | – | median {statistics.median(noise):.1%}, "
                f"p95 {share_at(noise, 0.95):.1%} |"
            ),
            f"| against the best of {{local, JPEG}}, worst cell | ≤ 3 % slower | **{_slower(judged)}** |",
        ]
        for label, asked in ((DADS, 1.5), (AUTO_SPLIT, 1.3)):
            known = [one for one in judged if label in one.rivals_ms]
            if known:
                ratios = [one.rivals_ms[label] / one.ours_ms for one in known]
                most = geomean([one.rivals_ms[label] / one.oracle_ms for one in known])
                lines.append(
                    f"| {label} planner, time ÷ ours | ≥ {asked:g}× geometric mean | **{geomean(ratios):.2f}×**, "
                    f"from {min(ratios):.2f}× to {max(ratios):.1f}×; of the measured oracle {most:.2f}× |"
                )
        bytes_ = [ratio for one in judged if (ratio := json_ratio(one.cell)) is not None]
        if bytes_:
            lines.append(
                f"| input as JSON lists (as Sedna sends it), bytes ÷ ours | ≥ 20× | **{geomean(bytes_):.0f}×** "
                f"geometric mean of the {len(bytes_)} cells that send anything |"
            )
        slower = [ratio for one in judged if (ratio := json_slower(one.cell)) is not None]
        if slower:
            lines.append(
                f"| input as JSON lists over HTTP to a tail that parses them, time ÷ ours, {len(slower)} cells | – | "
                f"**{geomean(slower):.1f}×** geometric mean, from {min(slower):.1f}× to {max(slower):.0f}× |"
            )
        learnt = [one.learnt_ms / one.oracle_ms - 1 for one in judged if one.learnt_ms is not None]
        if learnt:
            lines.append(
                f"| regret with the link and speed that the device learnt itself, {len(learnt)} cells | – | "
                f"median {statistics.median(learnt):.1%}, p95 {share_at(learnt, 0.95):.1%} |"
            )
    return lines + _beyond_the_grid(found)


def _beyond_the_grid(found: Found) -> list[str]:
    lines = []
    for one in found.cold:
        if one["control"] == "cubic":
            sizes = [
                f"{size >> 10} kB {ratio:.2f}×" for size, ratio in zip(one["sizes"], cold.ratios(one), strict=True)
            ]
            lines.append(f"| after a silence, plain grpcio ÷ ours, {one['link']} | ≥ 1.8× | **{', '.join(sizes)}** |")
    if found.trace:
        said = trace_run.judge(found.trace)
        lines += [
            f"| trace: share of the per-request oracle | ≥ 92 % | **{said['share']:.1%}** |",
            (
                f"| trace: deadlines missed beyond the control's | ≤ 0.5 points over ≥ 2,000 requests, ≥ 200 in the outage | "
                f"**{said['missed'] - said['missed_control']:+.2f} points** over {said['requests']:,.0f}, "
                f"{said['in_outage']:.0f} in the outage ({said['missed_outage'] - said['missed_outage_control']:+.2f}) |"
            ),
            f"| trace: unanswered, or answered wrongly | 0 | **{said['unanswered']:.0f}** |",
        ]
    if found.switch:
        said = switching.judge(found.switch)
        lines.append(
            f"| what a switch adds on the device, p99 of {said['switches']:.0f} among {found.switch['ways']} ways | < 5 ms | "
            f"**{said['p99_ms']:.2f} ms**, median {said['p50_ms']:.2f} (the next request: {said['usual_p99_ms']:.2f}, "
            f"{said['usual_p50_ms']:.2f}) |"
        )
    if found.tail:
        for key in _keys(found.tail):
            kind, clients = key.rsplit(" ", 1)
            p99 = statistics.median(turn["p99_ms"] for turn in found.tail[key])
            lines.append(
                f"| tail ÷ bare onnxruntime, {kind}, {clients} client{'s' if clients != '1' else ''} | ≥ 90 % | "
                f"**{throughput.share(found.tail, key):.0%}**, p99 {p99:.0f} ms |"
            )
    return lines


def _slower(judged: Sequence[Judged]) -> str:
    worst = max(judged, key=lambda one: one.behind_static)
    over = sum(one.behind_static > 0.03 for one in judged)
    return f"{worst.behind_static:+.1%} ({_where(worst.cell)}); over 3 % in {over} of {len(judged)}"


def _where(cell: Cell) -> str:
    return f"{cell['net']}, {cell['mbit']:g} Mbit/s, {cell['rtt_ms']:g} ms, {cell['slowdown']:g}×"


def _checked(checks: Sequence[Checked]) -> str:
    said = [
        f"{one.link} was {one.mbit:.3g} Mbit/s, {one.rtt_ms:.1f} ms"
        + ("" if one.good else " (**off by more than 5 %**)")
        for one in checks
    ]
    controls = sorted({one.control for one in checks})
    return f"Plain TCP through it ({', '.join(controls)}): " + "; ".join(said) + "." if said else "It was not checked."


def _cells(judged: Sequence[Judged]) -> list[str]:
    lines = [
        "Median ms of each cell; the oracle is the fastest measured option that accuracy admits.",
        "",
        "| net | link | device | planner | ms | oracle | ms | regret | A/A | best of local, JPEG | DADS-like | Auto-Split-like |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in judged:
        cell = one.cell
        rivals = [
            f"{one.rivals_ms[label]:.0f} ({cell['takes'][label]})" if label in one.rivals_ms else "–"
            for label in (DADS, AUTO_SPLIT)
        ]
        lines.append(
            f"| {cell['net']} | {cell['mbit']:g} Mbit/s, {cell['rtt_ms']:g} ms | {cell['slowdown']:g}× | {one.ours} "
            f"| {one.ours_ms:.1f} | {one.oracle} | {one.oracle_ms:.1f} | {one.regret:.1%} | {one.noise:.1%} "
            f"| {one.static_ms:.1f} | {rivals[0]} | {rivals[1]} |"
        )
    return [*lines, ""]


def _rivals(cells: Sequence[Cell]) -> list[str]:
    """Say how much slower it is to do always the same, whatever the link; each fixed cut in its best coding."""
    cuts = sorted({name.split()[0] for cell in cells for name in cell["allowed"] if name.startswith("c")})
    always: list[tuple[str, Callable[[str], bool]]] = list(FIXED)
    always += [(f"cut {cut}", _starting(f"{cut} u")) for cut in cuts]
    said = []
    for title, wanted in always:
        pairs = [(middle_ms(cell, wanted), judge(cell).ours_ms) for cell in cells]
        ratios = [value / ours for value, ours in pairs if value is not None]
        if ratios:
            said.append(f"{title} {geomean(ratios):.2f}× ({len(ratios)})")
    head = "Always the same, time ÷ ours, geometric mean (cells in which it was not hopeless and therefore measured): "
    return [head + ", ".join(said) + ".", ""]


def _starting(text: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(text)


def _beside(cells: Sequence[Cell], bbr: Sequence[Cell]) -> list[str]:
    def key(cell: Cell) -> tuple[object, ...]:
        return cell["net"], cell["mbit"], cell["rtt_ms"], cell["slowdown"]

    cubic = {key(cell): judge(cell).ours_ms for cell in cells}
    lines = [
        "The planner's choice with bbr in place of cubic:",
        "",
        "| net | cubic ÷ bbr, geometric mean | worst | best |",
        "|---|---|---|---|",
    ]
    for net in dict.fromkeys(cell["net"] for cell in bbr):
        ratios = [
            cubic[key(cell)] / statistics.median(cell["ms"][cell["takes"][OUR_CHOICE]])
            for cell in bbr
            if cell["net"] == net and key(cell) in cubic
        ]
        if ratios:
            lines.append(f"| {net} | {geomean(ratios):.2f}× | {min(ratios):.2f}× | {max(ratios):.2f}× |")
    return [*lines, ""]


def _cold(one: Mapping[str, Any]) -> list[str]:
    cells = []
    for size in one["sizes"]:
        ours, plain = (statistics.median(one["ms"][f"{side} {size}"]) for side in ("ours", "plain"))
        cells.append(f"{size >> 10} kB {plain:.0f} → {ours:.0f} ms")
    return [
        f"After {cold.SILENCE_S:g} s of silence, {one['link']}, {one['control']}, plain grpcio → ours: {', '.join(cells)}.",
        "",
    ]


def _trace(found: Mapping[str, Any]) -> list[str]:
    said = trace_run.judge(found)
    best = ", ".join(f"{link}: {name}" for link, name in found["best"].items())
    return [
        (
            f"Trace ({found['net']}, device {found['slowdown']:g}× slower): {said['requests']:,.0f} requests, "
            f"{said['switches']:.0f} switches, {said['continued']:.0f} continued on the device; "
            f"deadline {said['limit_ms']:.0f} ms, missed "
            f"{said['missed']:.2f} % (control {said['missed_control']:.2f} %), in the outage {said['missed_outage']:.2f} % "
            f"(control {said['missed_outage_control']:.2f} %); a decision takes {said['choice_p99_ms']:.2f} ms (p99). "
            f"The oracle: {best}, local in the outage."
        ),
        "",
    ]


def _tail(found: Mapping[str, Any]) -> list[str]:
    lines = [
        (
            f"Tail ({found['net']}, whole model, loopback, tail and clients on any core), requests per second beside bare "
            f"onnxruntime's {statistics.median(found['bare']):.1f}:"
        ),
        "",
        "| sent | clients | per second | share | p50, ms | p99, ms | decode, ms | compute, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key in _keys(found):
        kind, clients = key.rsplit(" ", 1)
        middle = {name: statistics.median(turn[name] for turn in found[key]) for name in found[key][0]}
        lines.append(
            f"| {kind} | {clients} | {middle['per_s']:.1f} | {throughput.share(found, key):.0%} | {middle['p50_ms']:.1f} "
            f"| {middle['p99_ms']:.1f} | {middle['decode_ms']:.2f} | {middle['compute_ms']:.2f} |"
        )
    return [*lines, ""]


def _keys(found: Mapping[str, Any]) -> list[str]:
    return [key for key in found if key.rsplit(" ", 1)[-1].isdigit()]
