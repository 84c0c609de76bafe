"""The plan for people: report.json and a self-contained report.html."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloud.split.live import doubt
from cloud.split.verdict import answers, describe, options, proof, warning
from skills.split import Choice, Plan, moved_bytes, plan_hash
from skills.wire import encode_json, to_plain

RULE = "private: raw or compressed input never leaves the device, and no cut before the declared minimum is used. "
UNAUDITED = (
    "This is no proof against reconstruction: what leaves are activations, and whether the input can be rebuilt from "
    "them was not audited."
)
OPEN = "the compressed input may leave the device"


def privacy(plan: Plan, details: Mapping[str, Any]) -> str:
    """Say in words what may leave, and what an audit found about it."""
    if not plan.private:
        return OPEN
    facts, seen = details.get("privacy_audit"), [cut for cut in plan.cuts if cut.leak is not None]
    if facts is None:
        return RULE + UNAUDITED
    words = {
        "private": "kept private: the decoder learnt next to nothing",
        "recoverable": "recoverable: the decoder rebuilt inputs that it had never seen",
        "inconclusive": "inconclusive, and so not used",
    }
    said = [
        f"cut {cut.name} is {words[cut.leak.verdict]} ({cut.leak.value:.2f} {facts['measure']})"
        for cut in seen
        if cut.leak
    ]
    control = f"; the control on the shallowest tensor reached {facts['control']:.2f}" if "control" in facts else ""
    why = f" {_sentence(facts['why'])}" if "why" in facts else ""
    return (
        f"{RULE}For each cut a decoder was trained on three quarters of {facts['inputs']} inputs to rebuild the others; above "
        f"{max(facts['threshold'], facts['floor'] + 0.05):.2f} {facts['measure']} an input counts as recoverable{control}."
        f"{why} {_sentence('; '.join(said)) if said else 'There is no cut to audit.'} This is a measure of risk, no guarantee: "
        "somebody with more data may rebuild more."
    )


def report_json(plan: Plan, details: Mapping[str, Any]) -> bytes:
    """Return the whole report as canonical JSON."""
    body = {
        "format": "split-report/v1",
        "plan": plan_hash(plan),
        "device": {
            "slowdown": plan.slowdown,
            "measured": measured_on(plan),
            "memory_mb": plan.memory_mb,
            **{key: value for key, value in (details.get("live") or {}).items() if key != "name"},
        },
        "privacy": privacy(plan, details),
        "metric_name": plan.metric,
        "samples": plan.samples,
        "proof": proof(plan),
        "warnings": doubts(plan, details),
        "verdicts": [to_plain(verdict) for verdict in plan.verdicts],
        "candidates": [to_plain(cut) for cut in plan.cuts],
        "links": [
            {
                "link": str(verdict.link),
                "options": [_option(plan, one) for one in options(plan, verdict.link, every=True)],
            }
            for verdict in plan.verdicts
        ],
        **{key: value for key, value in details.items() if key != "live"},
    }
    return encode_json(body)


def doubts(plan: Plan, details: Mapping[str, Any]) -> list[str]:
    """Return what makes the figures less sure, one sentence each."""
    return [text for text in (warning(plan), doubt(details.get("live"))) if text]


def measured_on(plan: Plan) -> str:
    """Say which of the two was used: a live device, or this machine slowed down as a profile declares."""
    if plan.device:
        return f"the enrolled device {plan.device}, by its own agent"
    return "this machine, every device time multiplied: no live device was used"


def render_html(plan: Plan, details: Mapping[str, Any]) -> str:
    """Return the report as one HTML page without anything from outside."""
    say, style = html.escape, (Path(__file__).parent / "report.css").read_text()
    verdicts = "".join(
        f'<div class="verdict {_group(verdict.cut)}"><b>{say(str(verdict.link))}</b> {say(verdict.text)}</div>'
        for verdict in plan.verdicts
    )
    local = plan.cut("local").device_ms.p50
    charts = "".join(f"<h2>{say(str(verdict.link))}</h2>{_chart(plan, verdict.link)}" for verdict in plan.verdicts)
    facts = (
        f"{say(_device(plan, details.get('live')))} Staying local takes {local:.0f} ms there{_memory(plan)}. "
        f"{say(_sentence(proof(plan)))} "
        f"A coding that loses more than {plan.max_drop:g} points is refused. {_answers(plan)}The segments in a row differ "
        f"from the whole by at most {details.get('max_abs_difference', 0):.1e}, and take "
        f"{details['chain_ms_here']['p50']:.1f} ms here against "
        f"{details['whole_ms_here']['p50']:.1f} ms for the whole."
    )
    warned = "".join(f"<p><b>Warning.</b> {say(_sentence(text))}</p>" for text in doubts(plan, details))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Split report {plan_hash(plan)}</title>
<style>{style}</style></head><body>
<h1>Split report</h1><p class="soft">plan {plan_hash(plan)} · model {plan.model_sha256[:12]}…</p>
<h2>What to do on each link</h2>{verdicts}{warned}<p>{facts}</p><p><b>Privacy.</b> {say(_sentence(privacy(plan, details)))}</p>
<p class="key soft"><span style="background:var(--split)"></span>split<span style="background:var(--input)"></span>compressed
input<span style="background:var(--local)"></span>local<span style="background:var(--refused)"></span>refused: over the budget,
or input that may not leave (» a bar that is cut off)</p>
{charts}
<h2>Every candidate, as measured</h2><div class="wide">{_table(plan, details)}</div>
<p class="soft">Device and tail times are medians of {details.get("rounds", "?")} interleaved warm runs of whole heads and tails.
Predicted time = device + coding + round trip + bytes / rate + tail. docs/splitting.md has the formulas.</p>
</body></html>
"""


def _chart(plan: Plan, link: Any) -> str:
    allowed = set(map(_key, options(plan, link)))
    shown = _best_of_each(options(plan, link, every=True))
    longest = min(max(one.ms for one in shown), 4 * plan.cut("local").device_ms.p50)
    rows = []
    for at, one in enumerate(shown):
        y, width = at * 24, max(2.0, min(one.ms, longest) / longest * 520)
        colour = _group(one.cut.name) if _key(one) in allowed else "refused"
        note = f"{one.ms:.0f} ms" + (" »" if one.ms > longest else "") + _size(plan, one)
        rows.append(
            f'<text x="150" y="{y + 16}" text-anchor="end">{html.escape(_label(one))}</text>'
            f'<rect x="158" y="{y + 4}" width="{width:.1f}" height="16" rx="2" fill="var(--{colour})"/>'
            f'<text x="{166 + width:.1f}" y="{y + 16}" class="soft">{note}</text>'
        )
    return f'<svg viewBox="0 0 900 {len(shown) * 24 + 4}" role="img" aria-label="time per option">{"".join(rows)}</svg>'


def _best_of_each(ranked: tuple[Choice, ...]) -> list[Choice]:
    """Return the fastest coding of each cut (within the budget, if any is), every coding of the input, fastest first."""
    found: dict[object, Choice] = {}
    for one in sorted(ranked, key=lambda one: (one.coding is not None and not one.coding.admitted, one.ms)):
        found.setdefault(_key(one) if one.cut.name == "input" else one.cut.name, one)
    return sorted(found.values(), key=lambda one: one.ms)


def _table(plan: Plan, details: Mapping[str, Any]) -> str:
    rows = []
    for cut in plan.cuts:
        share = details.get("shares", {}).get(cut.name)
        for coding in cut.codings or (None,):
            costs = f"<td>{cut.device_ms.p50:.1f}</td><td>{cut.tail_ms.p50:.1f}</td>"
            where = html.escape(", ".join(tensor.name for tensor in cut.tensors))
            if coding is None:
                rows.append(
                    f'<tr><td>{cut.name}</td><td class="l"></td><td></td><td class="l"></td>{costs}{"<td></td>" * 7}</tr>'
                )
                continue
            interval = f"{coding.drop_ci95[0]:.1f} … {coding.drop_ci95[1]:.1f}" if coding.drop_ci95 else ""
            rows.append(
                f'<tr class="{"" if coding.admitted else "no"}"><td>{cut.name}</td><td class="l">{where}</td>'
                f"<td>{'' if share is None else f'{share:.0%}'}</td>"
                f'<td class="l">{coding.name}</td>{costs}<td>{coding.bytes_p50:,}</td><td>{coding.bytes_p95:,}</td>'
                f"<td>{coding.encode_ms:.1f}</td><td>{coding.decode_ms:.1f}</td>"
                f'<td class="l">{coding.reply or "raw"}</td><td>{coding.drop:.1f}</td><td>{interval}</td></tr>'
            )
    head = (
        '<tr><th>cut</th><th class="l">tensor</th><th>work before</th><th class="l">coding</th><th>device ms</th>'
        f"<th>tail ms</th><th>bytes p50</th><th>p95</th><th>encode ms</th><th>decode ms</th>"
        f'<th class="l">answer</th><th>drop ({html.escape(plan.metric)}, pt)</th><th>95 %</th></tr>'
    )
    return f"<table>{head}{''.join(rows)}</table>"


def _device(plan: Plan, live: Mapping[str, Any] | None) -> str:
    if plan.device:
        cores = "" if live is None else f" ({live['machine']}, {live['cores']} cores, {live['runtime']})"
        return (
            f"The device's times were measured on {plan.device}{cores}, by its own agent: it takes {plan.slowdown:g} times "
            "as long as this machine."
        )
    return f"The device was taken to be {plan.slowdown:g} times slower than this machine; no live device was used."


def _answers(plan: Plan) -> str:
    return f"{html.escape(_sentence(answers(plan)))} " if plan.replies else ""


def _memory(plan: Plan) -> str:
    need = plan.cut("local").memory_mb
    if not need:
        return ""
    return f" and {need:.0f} MiB" + (f" of its {plan.memory_mb:g}" if plan.memory_mb is not None else "")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}" + ("" if text.endswith(".") else ".")


def _option(plan: Plan, one: Choice) -> dict[str, object]:
    coding = one.coding
    return {
        "cut": one.cut.name, "coding": coding.name if coding else "", "ms": round(one.ms, 2),
        "bytes": coding.bytes_p50 if coding else 0, "moved_bytes": moved_bytes(plan, one),
        "reply": one.reply.name if one.reply else "", "admitted": coding.admitted if coding else True, "words": describe(one),
    }  # fmt: skip


def _key(one: Choice) -> tuple[str, str]:
    return one.cut.name, one.coding.name if one.coding else ""


def _label(one: Choice) -> str:
    return one.cut.name if one.coding is None else f"{one.cut.name} {one.coding.name}"


def _size(plan: Plan, one: Choice) -> str:
    if one.coding is None:
        return ""
    there, both = one.coding.bytes_p50 / 1000, moved_bytes(plan, one) / 1000
    return f", {there:.1f} kB there, {both - there:.1f} kB back"


def _group(cut: str) -> str:
    return cut if cut in ("local", "input") else "split"
