"""The plan for people: report.json and a self-contained report.html."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloud.split.live import doubt
from cloud.split.verdict import answers, describe, options, points, proof, refusal, unsized, warning
from skills.split import Choice, moved_bytes
from skills.split_plan import Cut, Leak, Plan, plan_hash
from skills.units import readable, readable_ms
from skills.wire import encode_json, to_plain

RULE = "private: raw or compressed input never leaves the device{}. "
LEAST = ", and no cut before the declared minimum ({}) is used"
UNAUDITED = (
    "This is no proof against reconstruction: what leaves are activations, and whether the input can be rebuilt from "
    "them was not audited."
)
CHART_WIDTH = 440
OPEN = "the compressed input may leave the device"


def privacy(plan: Plan, details: Mapping[str, Any]) -> str:
    """Say in words what may leave, and what an audit found about it."""
    if not plan.private:
        return OPEN
    facts, seen = details.get("privacy_audit"), [cut for cut in plan.cuts if cut.leak is not None]
    rule = RULE.format(LEAST.format(plan.min_cut) if plan.min_cut else "")
    if facts is None:
        return rule + UNAUDITED
    if "control" not in facts:
        return f"{rule}{_sentence(str(not_audited(details)))}"
    limit, measure = max(facts["threshold"], facts["floor"] + 0.05), facts["measure"]
    said = [f"cut {cut.name} is {_leaked(cut.leak, limit)}" for cut in seen if cut.leak]
    control = f"; the control on the shallowest tensor reached {facts['control']:.2f}"
    why = f" {_sentence(facts['why'])}" if "why" in facts else ""
    return (
        f"{rule}For each cut a decoder was trained on three quarters of {facts['inputs']} inputs to rebuild the others; above "
        f"{limit:.2f} {measure} an input counts as recoverable{control}."
        f"{why} {_sentence('; '.join(said)) if said else 'There is no cut to audit.'} This is a measure of risk, no guarantee: "
        "somebody with more data may rebuild more."
    )


def not_audited(details: Mapping[str, Any]) -> str | None:
    """Say why the audit shows nothing of any cut; None: it was made, or nobody asked for it."""
    facts = details.get("privacy_audit") or {}
    if "why" not in facts:
        return None
    ran = (
        "no cut was audited"
        if "control" not in facts
        else "the audit says nothing of cuts that it did not rebuild from"
    )
    return f"{ran}: {facts['why']}; so none of them counts as private"


def audit_rows(details: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return of every cut that a decoder was tried on: name ("–": not kept), work before it, likeness, verdict, tensors.

    In order of depth, so that one sees where privacy begins. Empty where no audit was made.
    """
    if "control" not in details.get("privacy_audit", {}):
        return []
    considered = details.get("considered", ())
    kept = iter(range(1, len(considered) + 1))
    rows: list[tuple[str, ...]] = []
    for one in considered:
        name = f"c{next(kept)}" if one["kept"] else "–"
        if leak := one.get("leak"):
            likeness = f"{leak['value']:.2f}"
            rows.append((name, f"{one['work_before']:.0%}", likeness, leak["verdict"], ", ".join(one["tensors"])))
    return rows


def audit_heads(details: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what stands above `audit_rows`: the likeness has the audit's own measure."""
    return "cut", "work before", details["privacy_audit"]["measure"].replace("ssim", "SSIM"), "verdict", "tensor"


def _leaked(found: Leak, limit: float) -> str:
    """Say what an audit found of one cut, with the value beside its limit: a narrow pass must look like one."""
    value = f"the decoder reached {found.value:.2f} {found.measure}, the limit is {limit:.2f}"
    if found.verdict == "private":
        return f"kept private{', but just under the limit' if found.value > limit * 2 / 3 else ''}: {value}"
    if found.verdict == "recoverable":
        return f"recoverable, inputs that the decoder had never seen were rebuilt: {value}"
    return f"inconclusive, and so not used: {value}"


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
    return [text for text in (warning(plan), unsized(plan), not_audited(details), doubt(details.get("live"))) if text]


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
    gap, local = details.get("max_abs_difference", 0), readable_ms(plan.cut("local").device_ms.p50)
    charts = "".join(f"<h2>{say(str(verdict.link))}</h2>{_chart(plan, verdict.link)}" for verdict in plan.verdicts)
    facts = (
        f"{say(_device(plan, details.get('live')))} Staying local takes {local} there{_memory(plan)}. "
        f"{say(_sentence(proof(plan)))} "
        f"A coding that loses more than {points(plan.max_drop)} is refused. {_answers(plan)}The segments in a row differ "
        f"from the whole by at most {f'{gap:.1e}' if gap else '0'}, and take "
        f"{readable_ms(details['chain_ms_here']['p50'])} here against "
        f"{readable_ms(details['whole_ms_here']['p50'])} for the whole."
    )
    warned = "".join(f"<p><b>Warning.</b> {say(_sentence(text))}</p>" for text in doubts(plan, details))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Split report {plan_hash(plan)}</title>
<style>{style}</style></head><body>
<h1>Split report</h1><p class="soft">plan {plan_hash(plan)} · model {plan.model_sha256[:12]}…</p>
<h2>What to do on each link</h2>{verdicts}{warned}<p>{facts}</p><p><b>Privacy.</b> {say(_sentence(privacy(plan, details)))}</p>
{_audits(details)}
<p class="key soft"><span style="background:var(--split)"></span>split<span style="background:var(--input)"></span>compressed
input<span style="background:var(--local)"></span>local<span style="background:var(--refused)"></span>refused, with the
reason</p>
{charts}
<h2>Every candidate, as measured</h2><div class="wide">{_table(plan)}</div>
<h2>Where the cuts lie</h2><div class="wide">{_places(plan, details)}</div>
<p class="soft">Device and tail times are medians of {details.get("rounds", "?")} interleaved warm runs of whole heads and tails.
Predicted time = device + coding + round trip + bytes / rate + tail. docs/splitting.md has the formulas.</p>
</body></html>
"""


def _chart(plan: Plan, link: Any) -> str:
    allowed = set(map(_key, options(plan, link)))
    shown = _best_of_each(options(plan, link, every=True))
    longest = max(one.ms for one in shown) or 1.0
    rows = []
    for at, one in enumerate(shown):
        y, width = at * 24, max(2.0, one.ms / longest * CHART_WIDTH)
        colour = _group(one.cut.name) if _key(one) in allowed else "refused"
        why = refusal(plan, one.cut, one.coding)
        note = f"{readable_ms(one.ms)}{_size(plan, one)}" + (f", {why}" if why else "")
        rows.append(
            f'<text x="110" y="{y + 16}" text-anchor="end">{html.escape(_label(one))}</text>'
            f'<rect x="118" y="{y + 4}" width="{width:.1f}" height="16" rx="2" fill="var(--{colour})"/>'
            f'<text x="{126 + width:.1f}" y="{y + 16}" class="soft">{html.escape(note)}</text>'
        )
    return f'<svg viewBox="0 0 900 {len(shown) * 24 + 4}" role="img" aria-label="time per option">{"".join(rows)}</svg>'


def _best_of_each(ranked: tuple[Choice, ...]) -> list[Choice]:
    """Return the fastest coding of each cut (within the budget, if any is), every coding of the input, fastest first."""
    found: dict[object, Choice] = {}
    for one in sorted(ranked, key=lambda one: (one.coding is not None and not one.coding.admitted, one.ms)):
        found.setdefault(_key(one) if one.cut.name == "input" else one.cut.name, one)
    return sorted(found.values(), key=lambda one: one.ms)


def _places(plan: Plan, details: Mapping[str, Any]) -> str:
    """Return a row for each cut with its tensors, whose names are long and would push the measurements out of sight."""
    rows = []
    for cut in plan.cuts:
        share = details.get("shares", {}).get(cut.name)
        where = html.escape(", ".join(tensor.name for tensor in cut.tensors)) or "nothing leaves"
        before = "" if share is None else f"{share:.0%}"
        rows.append(f'<tr><td>{cut.name}</td><td>{before}</td><td class="l where">{where}</td></tr>')
    return f'<table><tr><th>cut</th><th>work before</th><th class="l">tensor</th></tr>{"".join(rows)}</table>'


def _table(plan: Plan) -> str:
    rows = []
    for cut in plan.cuts:
        for coding in cut.codings or (None,):
            why = refusal(plan, cut, coding)
            mine = f'<tr class="{"no" if why else ""}"><td>{cut.name}</td><td class="l">{coding.name if coding else ""}</td>'
            mine += f'<td class="l state">{_status(plan, cut, why)}</td>'
            tail = "" if cut.name == "local" else _ms(cut.tail_ms.p50)
            costs = f"<td>{_ms(cut.device_ms.p50)}</td><td>{tail}</td>"
            if coding is None:
                rows.append(f"{mine}<td></td><td></td>{costs}{'<td></td>' * 5}</tr>")
                continue
            interval = f"{coding.drop_ci95[0]:.1f} … {coding.drop_ci95[1]:.1f}" if coding.drop_ci95 else ""
            rows.append(
                f"{mine}<td>{_drop(coding.drop, plan.max_drop)}</td><td>{interval}</td>{costs}"
                f"<td>{readable(coding.bytes_p50)}</td><td>{readable(coding.bytes_p95)}</td>"
                f"<td>{_ms(coding.encode_ms)}</td><td>{_ms(coding.decode_ms)}</td>"
                f'<td class="l">{coding.reply or "raw"}</td></tr>'
            )
    head = (
        '<tr><th>cut</th><th class="l">coding</th><th class="l">status</th>'
        f"<th>drop ({html.escape(plan.metric)}, points)</th><th>95 %</th><th>device ms</th><th>tail ms</th>"
        "<th>sent p50</th><th>p95</th><th>encode ms</th><th>decode ms</th>"
        '<th class="l">answer</th></tr>'
    )
    return f"<table>{head}{''.join(rows)}</table>"


def _audits(details: Mapping[str, Any]) -> str:
    if not (rows := audit_rows(details)):
        return ""
    head = "".join(f'<th class="l">{html.escape(name)}</th>' for name in audit_heads(details))
    body = ""
    for *cells, where in rows:
        mine = "".join(f'<td class="l">{html.escape(cell)}</td>' for cell in cells)
        body += f'<tr>{mine}<td class="l where">{html.escape(where)}</td></tr>'
    return (
        '<h2>Every cut that was audited</h2><p class="soft">In order of depth; – was not kept.</p>'
        f'<div class="wide"><table>{head}{body}</table></div>'
    )


def _drop(drop: float, budget: float) -> str:
    """Return a drop with as many digits as tell it from the budget: 1.01 is over 1, and 1.0 would not say so."""
    found = (f"{drop:.{digits}f}" for digits in (1, 2, 3))
    return next((text for text in found if (float(text) > budget) == (drop > budget)), f"{drop:g}")


def _status(plan: Plan, cut: Cut, why: str | None) -> str:
    if why is not None:
        return why if why in ("recoverable", "inconclusive") else f"refused: {why}"
    if not plan.private or cut.name == "local":
        return "admitted"
    return "admitted, private" if cut.leak is not None else "admitted, not audited"


def _ms(ms: float) -> str:
    return readable_ms(ms).removesuffix(" ms")


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
    there = one.coding.bytes_p50
    return f", {readable(there)} there, {readable(moved_bytes(plan, one) - there)} back"


def _group(cut: str) -> str:
    return cut if cut in ("local", "input") else "split"
