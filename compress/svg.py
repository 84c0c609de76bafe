"""What the pictures of `report.html` are made of: shapes as SVG in text, colours of the page, round numbers for axes."""

import math
from collections.abc import Callable, Iterable
from html import escape

WIDTH = 900.0
LEFT, RIGHT = 56.0, 12.0

Place = Callable[[float], float]


def width_colour(bits: float) -> str:
    """Return the colour of weights stored in so many bits."""
    return f"var(--b{f'{bits:g}'.replace('.', '')})" if bits in (1.6, 2, 3, 4, 8) else "var(--b32)"


def piece_colour(name: str) -> str:
    """Return the colour of a piece of a file (`pieces.pieces`)."""
    words = name.split()
    if words[0] == "weights":
        return width_colour(float(words[2]))
    return "var(--scales)" if words[0] == "scales" else "var(--graph)"


def key(colour: str, text: str) -> str:
    """Return one entry of a legend."""
    return f'<span class="key"><i style="background:{colour}"></i>{escape(text)}</span>'


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers from `low` to `high`, at most `most`; their steps are 1, 2 or 5 times a power of ten."""
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * many for many in (1, 2, 5, 10, 20) if span / (power * many) <= most - 1)
    return [round(at * step, 10) for at in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def svg(height: float, label: str, parts: Iterable[str]) -> str:
    """Return a picture that is as wide as the page."""
    return (
        f'<div class="wide"><svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg></div>"
    )


def text(x: float, y: float, said: str, kind: str = "soft", anchor: str = "start") -> str:
    """Return a piece of text."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(said)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str = "var(--line)", more: str = "") -> str:
    """Return a straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" {more}/>'


def rect(x: float, y: float, wide: float, tall: float, colour: str, title: str = "", more: str = "") -> str:
    """Return a filled rectangle with a title that shows when it is pointed at."""
    inner = f"<title>{escape(title)}</title>" if title else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}" fill="{colour}" {more}>{inner}</rect>'


def circle(x: float, y: float, radius: float, fill: str, edge: str, title: str = "", *, dashed: bool = False) -> str:
    """Return a circle with a rim and a title that shows when it is pointed at."""
    inner = f"<title>{escape(title)}</title>" if title else ""
    rim = f'stroke="{edge}" stroke-width="1.8"' + (' stroke-dasharray="3 2.5"' if dashed else "")
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{fill}" {rim}>{inner}</circle>'


def axis_bytes(count: float) -> str:
    """Return a round number of bytes, as an axis has it."""
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:g} {unit}"
    return f"{count:g} B" if count else "0"


def size_ticks(low: float, high: float) -> list[float]:
    """Return round numbers around an interval of sizes."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    return [many * 10.0**power for power in powers for many in (1, 1.5, 2, 3, 4, 5, 7)]
