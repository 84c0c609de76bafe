"""`report.html`: one page, self-contained, for the person who decides whether to ship the model."""

from collections.abc import Sequence
from html import escape
from importlib import resources

from compress.lineage import Lineage
from compress.recipe import Recipe
from compress.report import LayerRow, Report
from skills.units import readable

SHOWN = 3  # names of layers before "and … more"
VERDICTS = {
    "proven": ("", "Proven", "even the worse end of the 95 % interval is inside the budget."),
    "within_budget_unproven": (
        " unproven", "Within the budget, not proven",
        "the measured drop is inside the budget; with this many samples the interval reaches beyond it.",
    ),
    "not_reached": (" missed", "Not reached", "the best model found loses more than the budget allows."),
}  # fmt: skip
METRICS = {
    "top1": "Right answers", "agreement": "Same answer as the original", "cosine": "Likeness to the original's output"
}  # fmt: skip
COLOURS = {
    1.6: "color-mix(in srgb, var(--sea) 40%, var(--deep))", 2: "color-mix(in srgb, var(--sea) 55%, var(--deep))",
    3: "color-mix(in srgb, var(--sea) 75%, var(--deep))", 4: "var(--sea)", 8: "var(--sand)", 32: "var(--soft)",
}  # fmt: skip


def page(report: Report, recipe: Recipe | None = None, lineage: Lineage | None = None) -> str:
    """Return the whole page; it needs no network and follows the reader's light or dark setting."""
    sections = [_head(report), _tiles(report), _warnings(report), _table(report)]
    if report.details.layers:
        sections += [_bits(report.details.layers), _bytes(report), _audit(report)]
    sections.append(_notes(report))
    style = (resources.files("compress") / "report.css").read_text()
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(report.details.model)}: compressed</title><style>{style}</style></head><body><main>"
        f"{''.join(sections)}</main></body></html>\n"
    )


def _head(report: Report) -> str:
    kind, word, sense = VERDICTS[report.verdict]
    low, high = report.drop_ci95
    return (
        f"<h1>{escape(report.details.model)}</h1>"
        f'<p class="soft">compressed for <b>{escape(report.device)}</b>, at most {report.details.max_drop:g} points of drop, '
        f"in {report.seconds:.0f} s</p>"
        f'<p><span class="verdict{kind}">{word}</span>&ensp;{_points(report.drop)} (95 % interval {low:+.2f} to {high:+.2f}, '
        f"{report.n_report:,} samples set aside for this): {sense}</p>"
    )


def _points(drop: float) -> str:
    return f"{drop:.2f} points lost" if drop >= 0 else f"{-drop:.2f} points won"


def _tiles(report: Report) -> str:
    tiles = (
        (f"{report.ratio_file:.1f}×", "smaller file"),
        (f"{report.ratio_package:.1f}×", "smaller on the wire (zstd)"),
        (f"{report.speedup:.2f}×", "as fast, one thread"),
        (f"{report.result.metric:.2%}", METRICS[report.metric_name].lower()),
    )
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{a}</b><span>{b}</span></div>' for a, b in tiles)
        + "</div>"
    )


def _warnings(report: Report) -> str:
    if not report.details.warnings:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in report.details.warnings)
    return f'<section class="warn"><h2>Please read</h2><ul>{items}</ul></section>'


def _table(report: Report) -> str:
    before, after = report.baseline, report.result
    rows = (
        (METRICS[report.metric_name], f"{before.metric:.2%}", f"{after.metric:.2%}", f"{-report.drop + 0.0:+.2f} points"),
        ("File", readable(before.bytes_file), readable(after.bytes_file), f"{report.ratio_file:.1f}× smaller"),
        ("Package (zstd 19)", readable(before.bytes_package), readable(after.bytes_package), f"{report.ratio_package:.1f}× smaller than the file before"),
        ("Time, middle", _ms(before.latency_ms_p50), _ms(after.latency_ms_p50), f"{report.speedup:.2f}×"),
        ("Time, 9 of 10", _ms(before.latency_ms_p90), _ms(after.latency_ms_p90), f"{before.latency_ms_p90 / after.latency_ms_p90:.2f}×"),
        ("Load", _ms(before.load_ms), _ms(after.load_ms), ""),
    )  # fmt: skip
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        '<section><h2>Before and after</h2><div class="wide"><table><tr><th></th><th>before</th><th>after</th><th></th></tr>'
        f'{body}</table></div><p class="soft" style="margin-top:10px">Timed side by side on the real runtime, {report.threads} thread, '
        f"batch {report.batch}. What was given had {readable(before.bytes_input)}; metadata and dead weights are not counted.</p></section>"
    )


def _bits(layers: Sequence[LayerRow]) -> str:
    """Draw one bar a layer: as high as its stored bits, as wide as its share of the weights (with a least width)."""
    width, height, gap = 900.0, 130.0, 2.0
    least = min(10.0, (width / len(layers)) * 0.6)
    free = width - len(layers) * (least + gap)
    total = sum(layer.weights for layer in layers) or 1
    bars, x = [], 30.0
    for layer in layers:
        wide = least + max(0.0, free - 30) * layer.weights / total
        tall = height * min(layer.bits, 8) / 8
        title = (
            f"{layer.name}: {layer.op}, {layer.weights:,} weights in {layer.bits:g} bits, computes in {layer.compute}"
        )
        if 4 in layer.harm:
            title += f"; 4 bits alone move the answers by {layer.harm[4]:.3g}"
        bars.append(
            f'<rect x="{x:.1f}" y="{150 - tall:.1f}" width="{wide:.1f}" height="{tall:.1f}" rx="2" '
            f'fill="{COLOURS[layer.bits]}" opacity="{1 if layer.compute == "int8" else 0.55}"><title>{escape(title)}</title></rect>'
        )
        x += wide + gap
    lines = "".join(
        f'<line x1="28" x2="{width}" y1="{150 - height * b / 8}" y2="{150 - height * b / 8}" stroke="var(--line)"/>'
        f'<text class="soft" x="2" y="{154 - height * b / 8}">{b}</text>'
        for b in (0, 4, 8)
    )
    keys = "".join(
        f'<i class="key" style="background:{COLOURS[b]}"></i>{b:g} bits: {sum(la.bits == b for la in layers)} layers'
        for b in COLOURS
        if any(la.bits == b for la in layers)
    )
    return (
        '<section><h2>Stored bits, layer by layer</h2><p class="soft">Width: the layer\'s share of all weights. Pale: computes in '
        f'float. Point at a bar for its name.{keys}</p><svg viewBox="0 0 900 160" role="img" aria-label="stored bits of each layer">'
        f"{lines}{''.join(bars)}</svg></section>"
    )


def _bytes(report: Report) -> str:
    layers = report.details.layers
    before, after = report.baseline.bytes_file, report.result.bytes_file
    rest_before = max(0, before - sum(la.bytes_before for la in layers))
    rest_after = max(0, after - sum(la.bytes_after for la in layers))
    split_after = {bits: sum(la.bytes_after for la in layers if la.bits == bits) for bits in COLOURS}

    def row(y: int, label: str, parts: Sequence[tuple[int, str, str]]) -> str:
        x, drawn = 70.0, []
        for size, colour, title in parts:
            wide = 720 * size / before
            drawn.append(
                f'<rect x="{x:.1f}" y="{y}" width="{max(wide, 0.5 if size else 0):.1f}" height="26" rx="2" fill="{colour}"><title>{title}</title></rect>'
            )
            x += wide
        return f'<text x="2" y="{y + 17}">{label}</text>{"".join(drawn)}<text x="{x + 8:.1f}" y="{y + 17}">{readable(sum(p[0] for p in parts))}</text>'

    top = row(
        6,
        "before",
        (
            (before - rest_before, "var(--soft)", f"weights in float: {readable(before - rest_before)}"),
            (rest_before, "var(--deep)", f"graph, biases: {readable(rest_before)}"),
        ),
    )
    low = row(
        44, "after",
        [(size, COLOURS[bits], f"weights in {bits:g} bits: {readable(size)}") for bits, size in split_after.items()]
        + [(rest_after, "var(--deep)", f"graph, scales of activations, biases: {readable(rest_after)}")],
    )  # fmt: skip
    biggest = sorted(layers, key=lambda la: la.bytes_after, reverse=True)[:5]
    rows = "".join(
        f"<tr><td><code>{escape(la.name)}</code></td><td>{readable(la.bytes_before)}</td><td>{readable(la.bytes_after)}</td><td>{la.bits:g} bits</td></tr>"
        for la in biggest
    )
    return (
        '<section><h2>Where the bytes went</h2><p class="soft"><i class="key" style="background:var(--deep);margin-left:0"></i>graph, '
        'biases and scales of activations; the other colours are weights</p><svg viewBox="0 0 900 78" role="img" aria-label="bytes before and after">'
        f'{top}{low}</svg><div class="wide" style="margin-top:14px"><table><tr><th>largest layers now</th><th>before</th><th>after</th><th>stored in</th></tr>{rows}</table></div></section>'
    )


def _audit(report: Report) -> str:
    layers = report.details.layers
    if not report.details.kernels:
        return "<section><h2>What the runtime made of it</h2><p>LiteRT runs the graph as written: every layer listed as int8 is int8.</p></section>"
    inside = sum(la.compute == "int8" for la in layers)
    groups: dict[tuple[str, str, str], list[str]] = {}
    for la in layers:
        if la.compute != "int8":
            groups.setdefault((la.op, la.kernel or "merged with others", la.reason), []).append(la.name)
    rows = "".join(
        f"<tr><td>{_some(names)}</td><td>{escape(op)}</td><td>{escape(kernel)}</td><td>{escape(reason)}</td></tr>"
        for (op, kernel, reason), names in groups.items()
    )
    table = (
        f'<div class="wide"><table><tr><th>in float</th><th>operator</th><th>kernel</th><th>why</th></tr>{rows}</table></div>'
        if rows
        else ""
    )
    kernels = ", ".join(f"{count} {escape(name)}" for name, count in report.details.kernels.items())
    return (
        f"<section><h2>What the runtime made of it</h2><p>{inside} of {len(layers)} layers run in int8 kernels, read back from the graph "
        f'that onnxruntime really runs.</p>{table}<p class="soft">All operators: {kernels}</p></section>'
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"<code>{escape(name)}</code>" for name in names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


def _notes(report: Report) -> str:
    counts = ", ".join(f"{count:,} to {name}" for name, count in report.details.samples.items())
    items = "".join(f"<li>{escape(line)}</li>" for line in report.details.notes)
    return f"<section><h2>How it came about</h2><ul>{items}<li>Samples: {counts}; no sample is in two parts.</li></ul></section>"


def _ms(value: float) -> str:
    return f"{value:.3f} ms" if value < 10 else f"{value:.1f} ms"
