"""The picture of the layers on `report.html`: stored bits, bytes and sensitivity, one below the other."""

import math
from collections.abc import Sequence

from compress.report import LayerRow
from compress.svg import LEFT, RIGHT, WIDTH, Place, axis_bytes, circle, line, rect, svg, text, ticks, width_colour
from skills.units import readable

NUMBERED = 30  # with more layers only every fifth is numbered
BAR = 44.0  # widest bar of one layer
BELOW = 16.0  # how far under the axis the marks lie whose values it does not reach


def layers(rows: Sequence[LayerRow]) -> str:
    """Draw for each layer, one below the other: stored bits, bytes, and how far each width alone moves the answers."""
    pitch = (WIDTH - LEFT - RIGHT) / len(rows)
    wide = min(BAR, max(1.0, 0.78 * pitch))
    parts: list[str] = []

    def x(at: float) -> float:
        return LEFT + (at + 0.5) * pitch

    floor = _bits_panel(parts, rows, x, wide)
    floor = _bytes_panel(parts, rows, x, wide, floor)
    if any(row.harm for row in rows):
        floor = _harm_panel(parts, rows, x, wide, floor)
    every = 1 if len(rows) <= NUMBERED else 5 if len(rows) <= 150 else 20
    numbered = [at for at in range(len(rows)) if (at + 1) % every == 0 or at == 0]
    parts += [text(x(at), floor + 20, str(at + 1), anchor="middle") for at in numbered]
    parts.append(text(LEFT - 8, floor + 20, "layer", anchor="end"))
    return svg(floor + 30, "stored bits, bytes and sensitivity of each layer", parts)


def _bits_panel(parts: list[str], rows: Sequence[LayerRow], x: Place, wide: float) -> float:
    top, floor = 24.0, 124.0
    parts.append(text(4, 12, "bits a weight, as stored"))
    for bits in (0, 2, 4, 8):
        at = floor - (floor - top) * bits / 8
        parts += [line(LEFT, at, WIDTH - RIGHT, at), text(LEFT - 8, at + 4, f"{bits}", anchor="end")]
    for at, row in enumerate(rows):
        tall = (floor - top) * min(row.bits, 8.0) / 8
        style = "" if row.compute == "int8" else f'fill-opacity="0.3" stroke="{width_colour(row.bits)}"'
        parts.append(rect(x(at) - wide / 2, floor - tall, wide, tall, width_colour(row.bits), _title(at, row), style))
        if row.bits > 8 and wide > 14:
            parts.append(text(x(at), floor - tall - 4, f"{row.bits:g}", anchor="middle"))
    return floor


def _bytes_panel(parts: list[str], rows: Sequence[LayerRow], x: Place, wide: float, above: float) -> float:
    top, floor = above + 42, above + 132
    parts.append(text(4, top - 16, "bytes of its weights, as stored"))
    most = max(row.bytes_after for row in rows) or 1
    for tick in ticks(0, most, 5):
        at = floor - (floor - top) * tick / most
        parts += [line(LEFT, at, WIDTH - RIGHT, at), text(LEFT - 8, at + 4, axis_bytes(tick), anchor="end")]
    for at, row in enumerate(rows):
        tall = max(0.8, (floor - top) * row.bytes_after / most)
        parts.append(rect(x(at) - wide / 2, floor - tall, wide, tall, width_colour(row.bits), _title(at, row)))
    return floor


def _harm_panel(parts: list[str], rows: Sequence[LayerRow], x: Place, wide: float, above: float) -> float:
    top, floor = above + 46, above + 156
    said = "how much farther the answers move when this layer alone is stored so, and not in 8 bits (KL divergence, logarithmic)"
    parts.append(text(4, top - 20, said))
    found = [value for row in rows for value in row.harm.values() if value > 0]
    high = math.ceil(math.log10(max(found, default=1.0)))
    low = max(math.floor(math.log10(min(found, default=0.1))), high - 5)
    high = max(high, low + 1)

    def y(value: float) -> float:
        if value < 10.0**low:
            return floor + BELOW
        return floor - (floor - top) * (math.log10(value) - low) / (high - low)

    for power in range(low, high + 1):
        parts += [
            line(LEFT, y(10.0**power), WIDTH - RIGHT, y(10.0**power)),
            text(LEFT - 8, y(10.0**power) + 4, f"{10.0**power:g}", anchor="end"),
        ]
    radius = min(5.0, max(1.5, wide / 2.4))
    lowest = floor
    for at, row in enumerate(rows):
        harm = (
            {8.0: 0.0, **row.harm} if row.harm and row.bits == 8 else row.harm
        )  # 8 bits are what the others are held against
        if len(harm) > 1:
            ends = [y(value) for value in harm.values()]
            parts.append(line(x(at), min(ends), x(at), max(ends), "var(--soft)", 'stroke-opacity="0.5"'))
        for bits, value in sorted(harm.items(), key=lambda pair: pair[0] == row.bits):
            colour = width_colour(bits)
            fill = colour if bits == row.bits else "var(--paper)"
            below = y(value) > floor
            lowest = floor + BELOW if below else lowest
            named = f"{at + 1} {row.name} in {bits:g} bits: {value:.3g}{', below the axis' if below else ''}"
            parts.append(circle(x(at), y(value), radius, fill, colour, named))
    if lowest > floor:
        parts.append(text(LEFT - 8, lowest + 4, f"< {10.0**low:g}", anchor="end"))
    return lowest


def _title(at: int, row: LayerRow) -> str:
    return (
        f"{at + 1} {row.name}: {row.op}, {row.weights:,} weights in {row.bits:g} bits, {readable(row.bytes_before)} before, "
        f"{readable(row.bytes_after)} now, computes in {row.compute}" + (f" ({row.reason})" if row.reason else "")
    )
