"""What the workshop found, for people: the table of a compression and the table of cuts. Pure."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cloud.cli.tables import table
from skills.units import readable, readable_ms

if TYPE_CHECKING:
    from cloud.split import SplitReport
    from compress.report import Report
    from skills.network import Link
    from skills.split import Choice
    from skills.split_plan import Plan

LINKS_WIDTH = 28  # so many characters of times fit beside the facts of a cut on 80 columns
REFUSED = "refused"
VERDICT_COLOURS = {"proven": "green", "within_budget_unproven": "yellow", "not_reached": "red"}


def compressed(report: "Report") -> Group:
    """Return before and after, with the interval of what was lost."""
    from compress import words

    before, after = report.baseline, report.result
    made = table("", "before", "after", "", right=("before", "after"))
    made.add_row(
        "file",
        readable(before.bytes_file),
        readable(after.bytes_file),
        Text(f"{report.ratio_file:.1f}× smaller", "green"),
    )
    made.add_row(
        "package (zstd)",
        readable(before.bytes_package),
        readable(after.bytes_package),
        f"{report.ratio_package:.1f}× smaller than the file before",
    )
    plain = report.details.bytes_plain
    if plain is not None:
        ratio = f"{before.bytes_file / plain:.1f}× smaller; 8 bits a weight, for comparison"
        made.add_row("as plain int8", "", readable(plain), ratio)
    low, high = report.drop_ci95
    interval = f"drop {report.drop:+.2f}, 95 % interval {low:+.2f} … {high:+.2f} {report.details.unit}"
    made.add_row(
        words.metric_words(report),
        words.metric_value(report, before.metric),
        words.metric_value(report, after.metric),
        f"{interval}, on {report.n_report:,} {'made-up ' if report.inputs_made_up else ''}inputs",
    )
    quicker = (
        "as fast"
        if 0.98 <= report.speedup < 1.005
        else f"{report.speedup:.2f}× faster"
        if report.speedup >= 1
        else f"{1 / report.speedup:.2f}× SLOWER"
    )
    made.add_row(
        "latency p50",
        f"{before.latency_ms_p50:.3f} ms",
        f"{after.latency_ms_p50:.3f} ms",
        Text(quicker, "green" if report.speedup >= 1 else "red"),
    )
    made.add_row(
        "latency p90",
        f"{before.latency_ms_p90:.3f} ms",
        f"{after.latency_ms_p90:.3f} ms",
        words.timed(report),
    )
    made.add_row("load", f"{before.load_ms:.0f} ms", f"{after.load_ms:.0f} ms", "")
    level = words.LEVELS[report.details.data_level]
    unknown = words.title(report) == words.MADE_UP
    colour = VERDICT_COLOURS["within_budget_unproven" if unknown else report.verdict]
    return Group(
        made,
        Text(words.headline(report), "bold"),
        Text(f"{words.title(report)}: {words.sense(report)}.{words.proof(report)}", colour),
        *([Text(level, "dim")] if level else []),
        *(Text(f"warning: {text}", "yellow") for text in report.details.warnings),
    )


def split_json(report: "SplitReport") -> dict[str, Any]:
    """Return the verdicts, what makes them less sure, and where the plan lies."""
    from cloud.split.report import doubts

    return {
        "plan_hash": report.plan_hash,
        "out": str(report.out),
        "metric": report.plan.metric,
        "private": report.plan.private,
        "slowdown": report.plan.slowdown,
        "device": report.plan.device or None,
        "warnings": doubts(report.plan, report.details),
        "verdicts": [
            {
                "link": str(one.link),
                "cut": one.cut,
                "coding": one.coding,
                "reply": one.reply,
                "ms": one.ms,
                "text": one.text,
            }
            for one in report.verdicts
        ],
    }


def split_table(plan: "Plan", links: "Sequence[Link]", details: "Mapping[str, Any] | None" = None) -> Group:
    """Return milliseconds from input to answer of every cut in each coding that is its best over some link, and the verdicts.

    `details` of a plan just made add what its audit found of every cut, kept or not.
    """
    from cloud.split.report import doubts
    from cloud.split.verdict import answers, judge, options, proof, refusal

    ranked = {link: options(plan, link) for link in links}
    best = {link: ranked[link][0] for link in links}
    rows: list[tuple[tuple[str, ...], list[Text]]] = []
    refused: dict[str, list[str]] = {}
    for cut in sorted(plan.cuts, key=lambda cut: cut.after):
        mine = {link: [one for one in ranked[link] if one.cut.name == cut.name] for link in links}
        offered = list(dict.fromkeys(found[0].coding for found in mine.values() if found))
        if not offered:
            refused.setdefault(refusal(plan, cut) or "over the budget", []).append(cut.name)
            rows.append((_refused(plan, cut.name), [Text("–") for _ in links]))
        for coding in offered:
            there = [next(one for one in mine[link] if one.coding == coding) for link in links]
            rows.append((_facts(plan, there[0]), list(map(_milliseconds, there, best.values()))))
    parts = [_part(plan, rows, links, across) for across in _across(links)]
    sentences = []
    for link in links:
        verdict = judge(plan, link)
        line = Text(f"{link.mbit:g} Mbit/s, {link.rtt_ms:g} ms: ", "bold")
        sentences.append(line.append(verdict.text, "not bold"))
    device = f"device times measured on {plan.device}, which is" if plan.device else "device"
    why = ["refused, " + "; ".join(f"{word}: {', '.join(names)}" for word, names in refused.items())] if refused else []
    note = f"all times in ms, on each link to the answer; {device} {plan.slowdown:g}× slower than here; {proof(plan)}"
    note += f"; {answers(plan)}" if plan.replies else ""
    warned = [Text(f"warning: {text}", "yellow") for text in doubts(plan, details or {})]
    return Group(
        *parts, *(Text(one, "dim") for one in (*why, note)), *_audits(details or {}), *warned, Text(), *sentences
    )


def _across(links: "Sequence[Link]") -> list[range]:
    """Return which links stand side by side."""
    found, first, wide = [], 0, 0
    for at, link in enumerate(links):
        mine = max(len(f"{link.rtt_ms:g} ms"), len(f"{link.mbit:g}"), 4) + 2
        if at > first and wide + mine > LINKS_WIDTH:
            found.append(range(first, at))
            first, wide = at, 0
        wide += mine
    return [*found, range(first, len(links))]


def _part(
    plan: "Plan", rows: "Sequence[tuple[tuple[str, ...], list[Text]]]", links: "Sequence[Link]", across: range
) -> Table:
    """Return the table of the links at `across`, narrow enough for 80 columns; the first one also has the facts of a cut."""
    facts = ("cut", "coding", *(("sent", plan.metric, "device", "tail") if across.start == 0 else ()))
    made = table(*facts, right=facts[2:])
    for at in across:
        made.add_column(f"{links[at].mbit:g}\nMbit\n{links[at].rtt_ms:g} ms", justify="right")
    for column in made.columns:
        column.no_wrap = True
    made.padding = (0, 1, 0, 0)
    for mine, times in rows:
        made.add_row(*mine[: len(facts)], *times[across.start : across.stop], style="dim" if mine[1] == REFUSED else "")
    return made


def _audits(details: "Mapping[str, Any]") -> "list[RenderableType]":
    from cloud.split.report import audit_heads, audit_rows

    if not (rows := audit_rows(details)):
        return []
    heads = audit_heads(details)
    made = table(*heads, right=heads[1:3])
    for row in rows:
        made.add_row(*row, style="" if row[0] != "–" else "dim")
    return [
        Text(),
        made,
        Text("what a decoder rebuilt of the input from each cut, in order of depth; – was not kept", "dim"),
    ]


def _facts(plan: "Plan", choice: "Choice") -> tuple[str, ...]:
    cut, coding = choice.cut, choice.coding
    if coding is None:
        return cut.name, "–", "0 B", _kept(plan, 0.0), _ms(cut.device_ms.p50), "–"
    return (
        cut.name,
        coding.name,
        readable(coding.bytes_p50),
        _kept(plan, coding.drop),
        _ms(cut.device_ms.p50),
        _ms(cut.tail_ms.p50),
    )


def _kept(plan: "Plan", drop: float) -> str:
    """Return the metric's own value after a loss of `drop` points; of an old plan that does not tell it, the drop."""
    return f"drop {drop + 0:+.1f}" if plan.whole is None else f"{100 * plan.whole - drop:.1f} %"


def _refused(plan: "Plan", name: str) -> tuple[str, ...]:
    cut = plan.cut(name)
    least = min((coding.bytes_p50 for coding in cut.codings), default=0)
    return (
        name,
        REFUSED,
        readable(least),
        "–",
        _ms(cut.device_ms.p50),
        _ms(cut.tail_ms.p50) if cut.codings else "–",
    )


def _ms(ms: float) -> str:
    return readable_ms(ms).removesuffix(" ms")


def _milliseconds(choice: "Choice", best: "Choice") -> Text:
    return Text(_ms(choice.ms), "bold green" if choice == best else "")
