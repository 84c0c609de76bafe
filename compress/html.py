"""`report.html`: one page, self-contained, for the person who decides whether to ship the model."""

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

from compress import charts, layer_chart, words
from compress.lineage import Lineage
from compress.recipe import Recipe
from compress.report import LayerRow, NpuEstimate, Point, Report
from compress.svg import key, piece_colour, width_colour
from skills.units import duration, readable

SHOWN = 3  # names of layers before "and … more"
OPEN = 12  # tables with more rows are folded
KINDS = {"proven": "", "within_budget_unproven": " unproven", "not_reached": " missed"}


def page(report: Report, recipe: Recipe | None = None, lineage: Lineage | None = None) -> str:
    """Return the whole page; it needs no network and follows the reader's light or dark setting."""
    details = report.details
    sections = [_head(report), _warnings(report), _table(report)]
    if details.pareto:
        sections.append(_tradeoff(report))
    if len(details.trail) > 1:
        sections.append(_progress(report))
    if details.pieces_after:
        sections.append(_pieces(report))
    if details.layers:
        sections.append(_layers(report))
    if details.layers or details.kernels:
        sections.append(_audit(report))
    if details.npu is not None:
        sections.append(_npu(details.npu))
    sections.append(_story(report))
    if recipe is not None or lineage is not None:
        sections.append(_origin(recipe, lineage))
    style = (resources.files("compress") / "report.css").read_text()
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(details.model)}: compressed</title><style>{style}</style></head><body><main>"
        f"{''.join(sections)}</main></body></html>\n"
    )


def _section(title: str, *parts: str, kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{title}</h2>{"".join(parts)}</section>'


def _cells(row: Sequence[str], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in row) + "</tr>"


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Return a table; its cells are HTML already."""
    body = "".join(_cells(row) for row in rows)
    return f'<div class="wide"><table class="{kind}">{_cells(head, "th")}{body}</table></div>'


def _folded(summary: str, inner: str, *, open_: bool) -> str:
    return f"<details{' open' if open_ else ''}><summary>{summary}</summary>{inner}</details>"


def _head(report: Report) -> str:
    details = report.details
    word = words.title(report)
    level, on = words.LEVELS[details.data_level], details.timed_on
    tiles = (
        (f"{report.ratio_file:.1f}×", "smaller file"),
        (f"{report.ratio_package:.1f}×", "smaller package (zstd)"),
        (f"{report.speedup:.2f}×", f"as fast, {_threads(report)}{f' on {escape(on)}' if on else ''}"),
        (words.metric_value(report, report.result.metric), escape(words.metric_words(report))),
    )
    boxes = "".join(f'<div class="tile"><b>{value}</b><span>{said}</span></div>' for value, said in tiles)
    return (
        f'<header><p class="soft">compressed for {escape(report.device)}, at most {escape(words.points(report, details.max_drop))} '
        f"of drop, in {duration(report.seconds)}</p>"
        f'<h1>{escape(details.model)} <span class="verdict{_kind(report)}">{word}</span></h1>'
        f'<p class="lead">{escape(words.headline(report))}</p><p>{escape(words.meaning(report))}'
        f'{" " + escape(level) if level else ""}</p></header><div class="tiles">{boxes}</div>'
    )


def _kind(report: Report) -> str:
    return KINDS["within_budget_unproven" if words.title(report) == words.MADE_UP else report.verdict]


def _threads(report: Report) -> str:
    return "one thread" if report.threads == 1 else f"{report.threads} threads"


def _warnings(report: Report) -> str:
    if not report.details.warnings:
        return ""
    items = "".join(f"<li>{escape(said)}</li>" for said in report.details.warnings)
    return _section("Please read", f"<ul>{items}</ul>", kind="warn")


def _table(report: Report) -> str:
    before, after, details = report.baseline, report.result, report.details
    rows = [
        (
            escape(words.metric_words(report).capitalize()),
            words.metric_value(report, before.metric), words.metric_value(report, after.metric), words.lost(report),
        ),
        ("File", readable(before.bytes_file), readable(after.bytes_file), f"{report.ratio_file:.1f}× smaller"),
    ]  # fmt: skip
    if details.bytes_plain:
        plain = f"{before.bytes_file / details.bytes_plain:.1f}× smaller"
        rows.append(("The same as plain int8", "", readable(details.bytes_plain), plain))
    rows.append(
        ("Package (zstd 19)", readable(before.bytes_package), readable(after.bytes_package), f"{report.ratio_package:.1f}× smaller than the file before")
    )  # fmt: skip
    for name, pair in (("Weights", details.weights), ("Multiplications for one input", details.macs)):
        if pair:
            left = "all kept" if pair[1] == pair[0] else f"{pair[1] / max(1, pair[0]):.0%} kept"
            rows.append((name, f"{pair[0]:,}", f"{pair[1]:,}", left))
    slower = before.latency_ms_p90 / max(after.latency_ms_p90, 1e-9)
    rows += [
        ("Time, middle", _ms(before.latency_ms_p50), _ms(after.latency_ms_p50), f"{report.speedup:.2f}×"),
        ("Time, 9 of 10", _ms(before.latency_ms_p90), _ms(after.latency_ms_p90), f"{slower:.2f}×"),
        ("Load", _ms(before.load_ms), _ms(after.load_ms), ""),
    ]
    needs = f" It needs {escape(details.least_runtime)} or newer." if details.least_runtime else ""
    return _section(
        "Before and after",
        _rows(("", "before", "after", ""), rows),
        f'<p class="soft below">Timed side by side on the real runtime: {escape(words.timed(report))}. What was given '
        f"had {readable(before.bytes_input)}; metadata and dead weights are not counted.{needs}</p>",
    )


def _tradeoff(report: Report) -> str:
    points, details = report.details.pareto, report.details
    rows = [
        (
            f"<b>{at}</b>" if point.chosen else str(at),
            _name(report, point),
            readable(point.bytes_file), readable(point.bytes_package), f"{point.drop:+.2f}",
            f"{point.drop_ci95[0]:+.2f} … {point.drop_ci95[1]:+.2f}",
            "" if point.latency_ms_p50 is None else _ms(point.latency_ms_p50),
            f"<code>{escape(point.file)}</code>" if point.file else "",
        )
        for at, point in enumerate(points, 1)
    ]  # fmt: skip
    head = ("", "model", "file", "package", "drop", "95 % interval", "time", "kept as")
    kept = any(point.file for point in points)
    timed = any(point.latency_ms_p50 is not None for point in points)
    columns = [at for at in range(len(head)) if (at != 6 or timed) and (at != 7 or kept)]
    said = (
        "The result, and every model that no other one beats in both. The bars are 95 % intervals on the report part."
    )
    if any(point.over is not None for point in points):
        said += " A dashed ring keeps the budget there, but not on all parts of the data together: it was not taken."
    named = words.names(report)
    return _section(
        "Smaller against better",
        f'<p class="soft">{said}</p>',
        charts.tradeoff(points, details.max_drop, details.unit),
        _rows([head[at] for at in columns], [[row[at] for at in columns] for row in rows], "second"),
        f'<p class="soft below">{escape(named[0].upper() + named[1:])}.</p>' if named else "",
    )


def _name(report: Report, point: Point) -> str:
    if point.chosen:
        return f"<b>{escape(point.name)}</b> (this result)"
    return escape(point.name if point.over is None else f"{point.name}, {words.passed_over(report, point.over)}")


def _progress(report: Report) -> str:
    trail, details = report.details.trail, report.details
    budget = None if details.time_budget is None else details.time_budget / 60
    last = trail[-1]
    steps = [
        (f"{moment.minutes:.1f} min", f"{moment.ratio_file:.1f}×",
         "" if moment.drop_select is None else f"{moment.drop_select:+.2f}", escape(moment.what))
        for moment in trail
    ]  # fmt: skip
    return _section(
        "What the time bought",
        f'<p class="soft">Each candidate when it was found. The last one came after {duration(60 * last.minutes)} of '
        f"{duration(report.seconds)}: {escape(last.what)}.</p>",
        charts.progress(trail, report.seconds / 60, budget),
        _folded(
            "Step by step",
            _rows(("after", "file", "drop on select", "what it was"), steps, "last"),
            open_=len(steps) <= OPEN,
        ),
    )


def _pieces(report: Report) -> str:
    before, after = report.details.pieces_before, report.details.pieces_after
    rows = [(name, parts) for name, parts in (("before", before), ("after", after)) if parts]
    names = sorted(dict.fromkeys((*before, *after)), key=_piece_order)
    keys = "".join(key(piece_colour(name), name) for name in names)
    table = [(escape(name), *(readable(parts[name]) if name in parts else "" for _, parts in rows)) for name in names]
    return _section(
        "Where the bytes went",
        f'<p class="keys">{keys}</p>',
        charts.stacks(rows),
        _rows(("", *(name for name, _ in rows)), table, "small"),
    )


def _piece_order(name: str) -> float:
    """Weights from wide to narrow, then scales, then the graph."""
    words_of = name.split()
    return -float(words_of[2]) if words_of[0] == "weights" else float(words_of[0] == "graph")


def _layers(report: Report) -> str:
    layers = report.details.layers
    widths = sorted({la.bits for la in layers} | {bits for la in layers for bits in la.harm})
    counts = {bits: sum(la.bits == bits for la in layers) for bits in widths}
    keys = "".join(
        key(width_colour(bits), f"{bits:g} bits: {_layer_count(count) if count else 'tried'}")
        for bits, count in counts.items()
    )
    dots = " A filled dot is the width that is stored." if any(la.harm for la in layers) else ""
    pale = " Pale: computes in float." if any(la.compute != "int8" for la in layers) else ""
    rows = [
        (
            str(at), f"<code>{escape(la.name)}</code>", escape(la.op), f"{la.bits:g}", f"{la.weights:,}",
            readable(la.bytes_before), readable(la.bytes_after), escape(la.kernel or la.compute), escape(la.reason),
        )
        for at, la in enumerate(layers, 1)
    ]  # fmt: skip
    head = ("", "layer", "operator", "bits", "weights", "before", "after", "kernel", "in float because")
    columns = range(9 if any(la.reason for la in layers) else 8)
    return _section(
        "Layer by layer",
        f'<p class="keys">{keys}<span class="soft">{pale}{dots} Point at a bar for its layer.</span></p>',
        layer_chart.layers(layers),
        _folded(
            f"All {len(layers)} layers" if len(layers) > 1 else "The one layer",
            _rows([head[at] for at in columns], [[row[at] for at in columns] for row in rows], "second third"),
            open_=len(layers) <= OPEN,
        ),
    )


def _layer_count(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _audit(report: Report) -> str:
    layers, title = report.details.layers, "What the runtime made of it"
    if not report.details.kernels:
        return _section(title, "<p>LiteRT runs the graph as written: every layer listed as int8 is int8.</p>")
    kernels = ", ".join(f"{count} {escape(name)}" for name, count in report.details.kernels.items())
    inside = sum(la.compute == "int8" for la in layers)
    return _section(
        title,
        f"<p>{inside} of {_layer_count(len(layers))} {'run' if len(layers) > 1 else 'runs'} in int8 kernels, read back from the graph that onnxruntime really runs.</p>",
        _in_float(layers),
        f'<p class="soft below">All operators: {kernels}</p>',
    )


def _npu(found: NpuEstimate) -> str:
    rows = [
        ("Time for one input", _ms(found.time_ms)), ("Cycles", f"{found.cycles:,}"),
        ("SRAM", f"{found.sram_kib:.0f} KiB"), ("Flash", f"{found.flash_kib:.0f} KiB"),
        ("Operators on the NPU", f"{found.on_npu} of {found.on_npu + found.on_cpu} ({found.share:.0%})"),
    ]  # fmt: skip
    left = f"<p>On the CPU beside it: {escape(', '.join(found.left_on_cpu))}.</p>" if found.left_on_cpu else ""
    return _section(
        f"On {escape(found.accelerator)}",
        '<p class="soft">What Arm\'s compiler Vela expects; nothing here was measured on a chip. <code>model_vela.tflite</code> is '
        "for it, <code>model.tflite</code> runs anywhere.</p>",
        _rows(("", ""), rows, "headless"),
        left,
        f'<p class="soft below">System {escape(found.system_config)}, memory mode {escape(found.memory_mode)}.</p>',
    )


def _in_float(layers: Sequence[LayerRow]) -> str:
    groups: dict[tuple[str, str, str], list[str]] = {}
    for la in layers:
        if la.compute != "int8":
            groups.setdefault((la.op, la.kernel or "merged with others", la.reason), []).append(la.name)
    rows = [(_some(names), escape(op), escape(kernel), escape(why)) for (op, kernel, why), names in groups.items()]
    return _rows(("in float", "operator", "kernel", "why"), rows, "words") if rows else ""


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"<code>{escape(name)}</code>" for name in names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


def _story(report: Report) -> str:
    items = [escape(said) for said in report.details.notes]
    counts = ", ".join(f"{count:,} to {name}" for name, count in report.details.samples.items())
    if counts:
        items.append(f"Samples: {counts}; no sample is in two parts.")
    if not items:
        return ""
    return _section("How it came about", "<ul>" + "".join(f"<li>{said}</li>" for said in items) + "</ul>")


def _origin(recipe: Recipe | None, lineage: Lineage | None) -> str:
    parts = []
    if recipe is not None:
        parts.append(_recipe(recipe))
    if lineage is not None:
        made = [(f"<code>{lineage.model_sha256[:16]}…</code>", "the model that came out")]
        made += [(f"<code>{digest[:16]}…</code>", escape(name)) for name, digest in lineage.parents.items()]
        tools = ", ".join(f"{escape(name)} {escape(version)}" for name, version in lineage.tools.items())
        parts.append(_folded("From what it was made", _rows(("sha256", "of"), made, "words"), open_=False))
        trained = f", trained on {escape(lineage.trained_on)}" if lineage.trained_on else ""
        parts.append(f'<p class="soft below">Made with {tools}{trained}.</p>')
    return _section("Do it again", *parts)


def _recipe(recipe: Recipe) -> str:
    rows = [("target", f"{escape(recipe.profile.name)}, goal {recipe.goal}, seed {recipe.seed}"),
            ("passes", escape(" → ".join(recipe.passes)))]  # fmt: skip
    if recipe.choices:
        rows.append(("settled on", escape(", ".join(f"{name}: {option}" for name, option in recipe.choices.items()))))
    for stage in recipe.training:
        gone = f", {len(stage.branches)} residual branches removed" if stage.branches else ""
        smaller = f"{escape(stage.stage)}: {len(stage.groups)} groups of channels made smaller{gone}; "
        rows.append(("training", f"{smaller}{stage.steps:,} steps of {stage.batch}, rate {stage.rate:g}"))
    return (
        "<p><code>skerry compress MODEL --data DATA -o OUT --recipe recipe.yaml</code> gives the same bytes again without a "
        f"search.</p>{_rows(('', ''), rows, 'words headless')}"
    )


def _ms(value: float) -> str:
    return f"{value:.3f} ms" if value < 1 else f"{value:.2f} ms" if value < 100 else f"{value:.0f} ms"
