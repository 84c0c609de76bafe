"""The bench's numbers as Markdown. Pure."""

import dataclasses
from collections.abc import Sequence

from judge import LEVEL_PRUNED, LEVEL_UNPRUNED, TUNED, Answer, Entry, Interval
from rows import Row


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """Everything that was measured for one row; `answers` are (i), (ii) and (iii)."""

    row: Row
    original: Entry
    samples: int
    ours: Entry | None
    verdict: str
    minutes: float | None
    baselines: tuple[Entry, ...]
    failures: tuple[tuple[str, str], ...]
    answers: tuple[Answer, ...]
    pareto: tuple[tuple[int, Interval], ...]  # bytes of each point that was kept, its drop
    progress: tuple[tuple[float, float, float | None], ...]  # minutes, ratio of the file, drop on select
    about: str


def page(outcomes: Sequence[Outcome]) -> str:
    """Return the whole: one table of the rows, then each row beside its baselines."""
    return "\n".join([_summary(outcomes), *(_row(item) for item in outcomes)])


def _summary(outcomes: Sequence[Outcome]) -> str:
    lines = [
        "| model | training data | file | package | speed | drop, points (95 %) | verdict | minutes | onnxruntime tuned int8 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for item in outcomes:
        goal, least = item.row.wanted.goal, item.row.wanted.least
        tuned = next((entry for entry in item.baselines if entry.name == TUNED), None)
        rival = ", ".join(_ratios(tuned, item.original)) if tuned else "–"
        cells = ["–"] * 6
        if item.ours:
            found = _ratios(item.ours, item.original)
            wanted = [f"of {_times(a)} ({_times(b)})" for a, b in zip(goal, least, strict=True)]
            cells = [*(f"**{a}** {b}" for a, b in zip(found, wanted, strict=True)), _lost(item.ours.lost), item.verdict]
            cells.append("–" if item.minutes is None else f"{item.minutes:.0f}")
        else:
            cells.append("–")
        lines.append(f"| {item.row.title} | {item.row.training} | {' | '.join(cells)} | {rival} |")
    return "\n".join([*lines, "", "After “of”: the goal, and in brackets the least.", ""])


def _row(item: Outcome) -> str:
    original = item.original
    head = f"{original.file:,} B, package {original.package:,} B, top-1 {original.accuracy:.2%} on {item.samples:,} samples"
    if original.p50_ms is not None:
        head += f", {original.p50_ms:.3f} ms, loads in {original.load_ms:.1f} ms"
    lines = [f"### {item.row.title} — training data: {item.row.training}", "", f"Original: {head}.", ""]
    lines += [
        "| | file, B | ratio | package, B | ratio | speed | loads, ms | drop, points (95 %) | against ours (95 %) | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in [*([item.ours] if item.ours else []), *item.baselines]:
        file, package, speed = _ratios(entry, original)
        load = "–" if entry.load_ms is None else f"{entry.load_ms:.1f}"
        beside = "–" if entry.beside_ours is None else _lost(entry.beside_ours)
        lines.append(
            f"| {entry.title} | {entry.file:,} | {file} | {entry.package:,} | {package} | {speed} | {load} | {_lost(entry.lost)} "
            f"| {beside} | {entry.notes} |"
        )
    lines += [f"| {title} | did not run: {reason} |" for title, reason in item.failures]
    lines.append("")
    if item.row.whole_set:
        shown = [original, *([item.ours] if item.ours else []), *item.baselines]
        lines += [
            "On the whole official set: " + ", ".join(f"{entry.title} {entry.whole:.2%}" for entry in shown) + ".",
            "",
        ]
    level = LEVEL_PRUNED if item.row.trains else LEVEL_UNPRUNED
    questions = (
        "smaller than every baseline inside the budget",
        "the Pareto set holds a smaller, not significantly less accurate point for each baseline",
        f"at least {level:g}× the speed of onnxruntime's tuned int8, never below float",
    )
    for question, answer in zip(questions, item.answers, strict=False):
        said = "–" if answer.holds is None else "**yes**" if answer.holds else "**no**"
        lines.append(f"* {question}: {said} ({answer.because})")
    if item.pareto:
        lines.append("* Pareto set: " + ", ".join(f"{size:,} B {_lost(lost)}" for size, lost in item.pareto))
    if item.progress:
        steps = [
            f"{minutes:.1f} min {ratio:.2f}×" + ("" if lost is None else f" ({lost:+.2f})")
            for minutes, ratio, lost in item.progress
        ]
        lines.append(f"* ratio against minutes (drop on select): {' → '.join(steps)}")
    return "\n".join([*lines, f"* timed: {item.about}" if item.about else "", ""])


def _ratios(entry: Entry, original: Entry) -> tuple[str, str, str]:
    speed = "–" if entry.speed is None else f"{entry.speed:.2f}×"
    return f"{original.file / entry.file:.2f}×", f"{original.file / entry.package:.2f}×", speed


def _times(value: float) -> str:
    return f"{value:.4g}×"


def _lost(drop: Interval) -> str:
    return f"{drop.points:+.2f} ({drop.lo:+.2f} … {drop.hi:+.2f})"
