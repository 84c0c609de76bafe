"""The pictures of whole models on `report.html`: size against accuracy, ratio against time, where the bytes went."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from compress.report import Moment, Point
from compress.svg import (
    LEFT,
    RIGHT,
    WIDTH,
    Place,
    axis_bytes,
    circle,
    line,
    piece_colour,
    rect,
    size_ticks,
    svg,
    text,
    ticks,
)
from skills.units import readable

PALE = ("weights in 4 bits", "weights in 8 bits", "weights in 32 bits")  # colours that want dark letters


def tradeoff(points: Sequence[Point], max_drop: float, unit: str) -> str:
    """Draw size against drop, each point with its interval and number, the chosen one filled, the budget as a line."""
    top, floor, height = 24.0, 290.0, 336.0
    low = min(0.0, *(min(point.drop, *point.drop_ci95) for point in points))
    high = max(1.15 * max_drop, *(max(point.drop, *point.drop_ci95) for point in points)) or 1.0
    low, high = low - 0.06 * (high - low), high + 0.04 * (high - low)
    sizes = [point.bytes_file for point in points]
    stretched = max(sizes) > 3 * min(sizes)
    near, far = (math.log(v) for v in (0.85 * min(sizes), 1.15 * max(sizes))) if stretched else (0.0, 1.08 * max(sizes))

    def x(size: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((math.log(size) if stretched else size) - near) / (far - near)

    def y(drop: float) -> float:
        return floor - (floor - top) * (drop - low) / (high - low)

    parts = [rect(LEFT, top, WIDTH - LEFT - RIGHT, max(0.0, y(max_drop) - top), "var(--over)")]
    for tick in ticks(low, high, 8):
        parts += [line(LEFT, y(tick), WIDTH - RIGHT, y(tick)), text(LEFT - 8, y(tick) + 4, f"{tick:g}", anchor="end")]
    for size in size_ticks(min(sizes), max(sizes)) if stretched else ticks(0, far):
        if size and near <= (math.log(size) if stretched else size) <= far:
            parts += [
                line(x(size), floor, x(size), floor + 4),
                text(x(size), floor + 18, axis_bytes(size), anchor="middle"),
            ]
    parts.append(
        line(LEFT, y(max_drop), WIDTH - RIGHT, y(max_drop), "var(--brick)", 'stroke-width="1.5" stroke-dasharray="6 4"')
    )
    parts.append(
        text(WIDTH - RIGHT, 14, f"dashed line: the budget, {max_drop:g}", "brick", "end")
    )  # no bar is up there
    parts += [text(4, 14, f"drop, {unit}"), text(WIDTH - RIGHT, floor + 38, "bytes of the file", anchor="end")]
    for at, point in sorted(enumerate(points, 1), key=lambda pair: pair[1].chosen):
        parts.append(_point(at, point, x(point.bytes_file), y))
    return svg(height, "size of the file against drop", parts)


def _point(at: int, point: Point, x: float, y: Place) -> str:
    low, high = point.drop_ci95
    title = f"{point.name}: {readable(point.bytes_file)}, drop {point.drop:+.2f} ({low:+.2f} to {high:+.2f})"
    if point.over is not None:
        title += f", {point.over:+.2f} on all parts of the data together: not taken"
    edge = "var(--sea)" if point.chosen else "var(--soft)"
    bar = line(x, y(low), x, y(high), edge, f'stroke-width="{2.5 if point.chosen else 1.5}"')
    ends = "".join(line(x - 4, y(end), x + 4, y(end), edge) for end in (low, high))
    fill, ink = ("var(--sea)", "inside") if point.chosen else ("var(--paper)", "soft")
    radius = 11 if point.chosen else 9
    return (
        f"<g>{bar}{ends}{circle(x, y(point.drop), radius, fill, edge, dashed=point.over is not None)}"
        f"{text(x, y(point.drop) + 4, str(at), ink, 'middle')}<title>{escape(title)}</title></g>"
    )


def progress(trail: Sequence[Moment], minutes: float, budget: float | None) -> str:
    """Draw the ratio of what was found last against minutes, as steps; `budget` is the time that was allowed, in minutes."""
    top, floor, height = 24.0, 190.0, 232.0
    until = max(minutes, budget or 0.0, trail[-1].minutes) or 1.0
    high = 1.12 * max(moment.ratio_file for moment in trail)

    def x(minute: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT - 40) * minute / until

    def y(ratio: float) -> float:
        return floor - (floor - top) * ratio / high

    parts = []
    for tick in ticks(0, high, 5):
        parts += [line(LEFT, y(tick), WIDTH - RIGHT, y(tick)), text(LEFT - 8, y(tick) + 4, f"{tick:g}×", anchor="end")]
    for tick in ticks(0, until, 8):
        parts += [line(x(tick), floor, x(tick), floor + 4), text(x(tick), floor + 18, f"{tick:g}", anchor="middle")]
    path, last = f"M{x(trail[0].minutes):.1f} {y(trail[0].ratio_file):.1f}", trail[0]
    for moment in trail[1:]:
        path += f"H{x(moment.minutes):.1f}V{y(moment.ratio_file):.1f}"
        last = moment
    path += f"H{x(max(minutes, last.minutes)):.1f}"
    parts.append(f'<path d="{path}" fill="none" stroke="var(--sea)" stroke-width="2.5" stroke-linejoin="round"/>')
    for moment in trail:
        said = f"{moment.minutes:.1f} min: {moment.ratio_file:.1f}× {moment.what}"
        parts.append(circle(x(moment.minutes), y(moment.ratio_file), 4.5, "var(--paper)", "var(--sea)", said))
    parts.append(text(x(max(minutes, last.minutes)) + 8, y(last.ratio_file) + 4, f"{last.ratio_file:.1f}×", "strong"))
    if budget is not None:
        parts += [
            line(x(budget), top, x(budget), floor, "var(--brick)", 'stroke-width="1.5" stroke-dasharray="6 4"'),
            text(x(budget) - 6, top + 10, "time budget", "brick", "end"),
        ]
    parts += [text(4, 14, "times smaller (file)"), text(WIDTH - RIGHT, floor + 36, "minutes", anchor="end")]
    return svg(height, "ratio of what was found against minutes", parts)


def stacks(rows: Sequence[tuple[str, Mapping[str, int]]]) -> str:
    """Draw files as stacked bars on one scale, and the last one once more as wide as the first."""
    left, free, tall, pitch = 130.0, WIDTH - 130.0 - 90.0, 28.0, 46.0
    largest = max(sum(parts.values()) for _, parts in rows)
    drawn, bars = [], [(label, parts, largest) for label, parts in rows]
    label, parts = rows[-1]
    if sum(parts.values()) < 0.7 * largest:
        bars.append((f"{label}, enlarged", parts, sum(parts.values())))
    for at, (label, parts, whole) in enumerate(bars):
        x, y = left, 6 + at * pitch
        drawn.append(text(left - 10, y + 19, label, "", "end"))
        for name, size in parts.items():
            wide = free * size / whole
            drawn.append(
                rect(
                    x, y, max(0.6, wide - (1 if wide > 4 else 0)), tall, piece_colour(name), f"{name}: {readable(size)}"
                )
            )
            share = f"{size / sum(parts.values()):.0%}"
            if wide > 46 and whole != largest:
                pale = "inside pale" if name in PALE else "inside"
                drawn.append(text(x + wide / 2, y + 19, share, pale, "middle"))
            x += wide
        if whole == largest:
            drawn.append(text(x + 8, y + 19, readable(sum(parts.values())), "strong"))
    return svg(6 + len(bars) * pitch - 12, "bytes of the files by what they hold", drawn)
