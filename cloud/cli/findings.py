"""What the workshop found, for people: the table of a compression and the table of cuts. Pure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from cloud.cli.tables import table
from skills.units import readable, readable_ms

if TYPE_CHECKING:
    from cloud.split import SplitReport
    from compress.report import Report
    from skills.network import Link
    from skills.split import Choice
    from skills.split_plan import Plan

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
        f"{report.threads} thread, batch {report.batch}, {report.device}",
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
    """Return the verdicts and where the plan lies."""
    return {
        "plan_hash": report.plan_hash,
        "out": str(report.out),
        "metric": report.plan.metric,
        "private": report.plan.private,
        "slowdown": report.plan.slowdown,
        "device": report.plan.device or None,
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


def split_table(plan: "Plan", links: "Sequence[Link]") -> Group:
    """Return milliseconds from input to answer of every cut in each coding that is its best over some link, and the verdicts."""
    from cloud.split.verdict import answers, judge, options, proof, warning

    columns = [f"{link.mbit:g} Mbit" for link in links]
    made = table(
        "cut",
        "coding",
        "sent",
        plan.metric,
        "device",
        "tail",
        *columns,
        right=("sent", plan.metric, "device", "tail", *columns),
    )
    ranked = {link: options(plan, link) for link in links}
    best = {link: ranked[link][0] for link in links}
    for cut in sorted(plan.cuts, key=lambda cut: cut.after):
        mine = {link: [one for one in ranked[link] if one.cut.name == cut.name] for link in links}
        offered = list(dict.fromkeys(found[0].coding for found in mine.values() if found))
        if not offered:
            made.add_row(*_refused(plan, cut.name), *("–" for _ in links), style="dim")
        for coding in offered:
            there = [next(one for one in mine[link] if one.coding == coding) for link in links]
            made.add_row(*_facts(plan, there[0]), *map(_milliseconds, there, best.values()))
    sentences = []
    for link in links:
        verdict = judge(plan, link)
        line = Text(f"{link.mbit:g} Mbit/s, {link.rtt_ms:g} ms: ", "bold")
        sentences.append(line.append(verdict.text, "not bold"))
    device = f"device times measured on {plan.device}, which is" if plan.device else "device"
    note = f"ms to the answer on each link; {device} {plan.slowdown:g}× slower than here; {proof(plan)}"
    note += f"; {answers(plan)}" if plan.replies else ""
    doubt = warning(plan)
    warned = [Text(f"warning: {doubt}", "yellow")] if doubt else []
    return Group(made, Text(note, "dim"), *warned, Text(), *sentences)


def _facts(plan: "Plan", choice: "Choice") -> tuple[str, ...]:
    cut, coding = choice.cut, choice.coding
    if coding is None:
        return cut.name, "–", "0 B", _kept(plan, 0.0), readable_ms(cut.device_ms.p50), "–"
    return (
        cut.name,
        coding.name,
        readable(coding.bytes_p50),
        _kept(plan, coding.drop),
        readable_ms(cut.device_ms.p50),
        readable_ms(cut.tail_ms.p50),
    )


def _kept(plan: "Plan", drop: float) -> str:
    """Return the metric's own value after a loss of `drop` points; of an old plan that does not tell it, the change."""
    return f"{0 - drop:+.1f} pt" if plan.whole is None else f"{100 * plan.whole - drop:.1f} %"


def _refused(plan: "Plan", name: str) -> tuple[str, ...]:
    from cloud.split.verdict import refusal

    cut = plan.cut(name)
    why = refusal(plan, cut) or "over the budget"
    least = min((coding.bytes_p50 for coding in cut.codings), default=0)
    return (
        name,
        why,
        readable(least),
        "–",
        readable_ms(cut.device_ms.p50),
        readable_ms(cut.tail_ms.p50),
    )


def _milliseconds(choice: "Choice", best: "Choice") -> Text:
    return Text(readable_ms(choice.ms).removesuffix(" ms"), "bold green" if choice == best else "")
