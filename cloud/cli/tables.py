"""Tables for people. Pure: checked values in, rich renderables out."""

import time
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.style import StyleType
from rich.table import Table
from rich.text import Text

from cloud.views import DeviceView, MemberView, ReleaseView, RolloutView
from skills.units import readable

STYLES = {
    "serving": "green", "done": "green", "online": "green",
    "running": "cyan", "fetching": "cyan", "staging": "cyan", "probing": "cyan", "assigned": "cyan",
    "refused": "yellow", "paused": "yellow", "waiting": "dim", "superseded": "dim", "offline": "dim",
    "failed": "red", "halted": "red", "aborted": "red", "stalled": "red",
}  # fmt: skip


REASON_CHARACTERS = 100  # of a reason in a table; the whole of it stands below the table, or in JSON


class PlainTable(Table):
    """A table whose cells are text as it stands: what a device or a file says is never taken for markup."""

    def add_row(self, *cells: RenderableType | None, style: StyleType | None = None, end_section: bool = False) -> None:
        """Add a row."""
        plain = (Text(cell) if isinstance(cell, str) else cell for cell in cells)
        super().add_row(*plain, style=style, end_section=end_section)


def table(*columns: str, title: str | None = None, right: Sequence[str] = ()) -> PlainTable:
    """Return an empty table in the house style; the columns in `right` are numbers."""
    made = PlainTable(
        title=None if title is None else Text(title),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        pad_edge=False,
        show_edge=False,
    )
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def state(word: str | None) -> Text:
    """Return a state's word in its colour."""
    return Text(word or "–", STYLES.get(word or "", ""))


def ago(then: float | None, now: float) -> str:
    """Return how long ago a moment was: 12 s, 5 min, 3 h, 2 d."""
    if then is None:
        return "never"
    gone = max(0.0, now - then)
    for unit, seconds in (("d", 86_400), ("h", 3600), ("min", 60)):
        if gone >= 2 * seconds:
            return f"{gone / seconds:.0f} {unit} ago"
    return f"{gone:.0f} s ago"


def pairs(values: Mapping[str, str]) -> str:
    """Return labels or variants in one line."""
    return ", ".join(f"{key}={value}" for key, value in values.items())


def short(reason: str) -> str:
    """Return a reason as a table shows it: its beginning."""
    line = " ".join(reason.split())
    return line if len(line) <= REASON_CHARACTERS else line[: REASON_CHARACTERS - 1].rstrip() + "…"


def devices(views: Iterable[DeviceView], now: float | None = None) -> Table:
    """Return the fleet at a glance."""
    moment = time.time() if now is None else now
    made = table("device", "state", "arch", "labels", "runtimes", "serving", "seen")
    for view in views:
        capabilities = view.capabilities or {}
        serving = ", ".join(f"{entry.skill} {entry.version}" for entry in view.skills if entry.phase == "serving")
        runtimes = pairs(capabilities.get("runtimes") or {}).replace("=", " ")
        word = "online" if view.online else "offline"
        made.add_row(
            view.id,
            state(word),
            view.arch or "–",
            pairs(view.labels) or "–",
            runtimes or "–",
            serving or "–",
            ago(view.seen, moment),
        )
    return made


def device_skills(view: DeviceView) -> Group:
    """Return what one device runs and was offered, and below it the reasons that are too long for a table."""
    made = table("skill", "version", "state", "variant", "received", "reused", "reason", right=("received", "reused"))
    for entry in view.skills:
        variants = ", ".join(entry.variants.values())
        made.add_row(
            entry.skill,
            entry.version,
            state(entry.phase),
            variants or "–",
            readable(entry.received_bytes),
            readable(entry.reused_bytes),
            short(entry.reason),
        )
    return Group(made, *_whole((f"{entry.skill} {entry.version}", entry.reason) for entry in view.skills))


def releases(views: Iterable[ReleaseView], now: float | None = None) -> Table:
    """Return the releases, newest first."""
    moment = time.time() if now is None else now
    made = table("skill", "version", "bundle", "released")
    for view in views:
        made.add_row(view.skill, view.version, f"{view.manifest_sha256[:16]}…", ago(view.time, moment))
    return made


def rollouts(views: Iterable[RolloutView], now: float | None = None) -> Table:
    """Return the rollouts, newest first."""
    moment = time.time() if now is None else now
    made = table("#", "skill", "version", "to", "state", "devices", "began", "reason", right=("#",))
    for view in views:
        counts = ", ".join(f"{count} {stage}" for stage, count in view.counts.items())
        made.add_row(
            str(view.id),
            view.skill,
            view.version or "previous",
            view.selector,
            state(view.state),
            counts,
            ago(view.time, moment),
            short(view.reason),
        )
    return made


def rollout_whole(view: RolloutView) -> Group:
    """Return one rollout: its state and why, its devices, and the reasons that are too long for a table."""
    head = Text.assemble((f"rollout {view.id}", "bold"), ": ", state(view.state))
    if view.reason:
        head.append(f": {view.reason}")
    return Group(head, rollout(view), *_whole((member.device, member.reason) for member in view.devices))


def _whole(reasons: Iterable[tuple[str, str]]) -> list[Text]:
    return [Text(f"{name}: {reason}") for name, reason in reasons if short(reason) != reason]


def rollout(view: RolloutView) -> Table:
    """Return a rollout's devices; the same table is shown live while it runs."""
    title = f"{view.skill} {view.version or 'back to the previous version'} → {view.selector}"
    made = table(
        "device", "state", "variant", "received", "reused", "remarks", title=title, right=("received", "reused")
    )
    for member in view.devices:
        name = Text(member.device)
        if member.canary:
            name.append(" canary", "dim italic")
        variants = ", ".join(member.variants.values())
        made.add_row(
            name,
            _progress(member),
            variants or "–",
            readable(member.received_bytes),
            readable(member.reused_bytes),
            _remark(member),
        )
    return made


def _progress(member: MemberView) -> Text:
    if member.stage != "assigned":
        return state(member.stage)
    text = state(member.phase if member.phase not in (None, "serving") else "assigned")
    if member.phase == "fetching" and member.progress:
        text.append(f" {member.progress:.0%}")
    return text


def _remark(member: MemberView) -> str:
    if member.reason:
        return short(member.reason)
    return "" if member.online else "offline"
