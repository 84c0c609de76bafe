"""Commands about the fleet: bring skills to devices, watch, go back, look, ask."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cloud.cli.command import command, group
from cloud.cli.connection import Ca, Token, Url, connect
from cloud.cli.screen import Screen
from skills.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from cloud.client import Client
    from cloud.views import RolloutView

PANEL = "Fleet"
WAIT_S = 600.0
To = Annotated[
    str, typer.Option("--to", metavar="SELECTOR", help="Which devices: all, name=NAME, or label=value,arch=aarch64.")
]
Wait = Annotated[bool, typer.Option("--wait", help="Watch until it is done; end with its verdict.")]
Timeout = Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="How long to wait at the most.")]
DeviceName = Annotated[str, typer.Argument(metavar="DEVICE", help="A device's name.")]
Number = Annotated[int, typer.Argument(metavar="NUMBER", help="A rollout's number.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(
        app,
        "push",
        panel=PANEL,
        examples=(
            "skerry push digits --to all --canary 1 --wait",
            "skerry push digits@1.1.0 --to site=harbour,arch=aarch64 --canary 10%",
        ),
    )(push)
    command(app, "rollback", panel=PANEL, examples=("skerry rollback digits --to all --wait",))(rollback)
    command(
        app,
        "infer",
        panel=PANEL,
        examples=(
            "skerry infer digits --device porch digit.npy",
            "skerry infer digits --device porch batch.npz --json",
        ),
    )(infer)
    command(app, "logs", panel=PANEL, examples=("skerry logs porch", "skerry logs porch --lines 500"))(logs)

    fleet = group("The devices: who is there, what they run; join and remove them.")
    app.add_typer(fleet, name="devices", rich_help_panel=PANEL)
    command(fleet, "", examples=("skerry devices", "skerry devices invite --label site=harbour"))(devices_list)
    command(fleet, "list", examples=("skerry devices list", "skerry devices list --json"))(devices_list)
    command(fleet, "invite", examples=("skerry devices invite", "skerry devices invite --label site=harbour"))(
        devices_invite
    )
    command(fleet, "show", examples=("skerry devices show porch",))(devices_show)
    command(fleet, "remove", examples=("skerry devices remove porch",))(devices_remove)

    command(app, "releases", panel=PANEL, examples=("skerry releases",))(releases)

    course = group("The rollouts: how releases reach devices.")
    app.add_typer(course, name="rollouts", rich_help_panel=PANEL)
    command(course, "", examples=("skerry rollouts", "skerry rollouts show 3"))(rollouts_list)
    command(course, "list", examples=("skerry rollouts list",))(rollouts_list)
    command(course, "show", examples=("skerry rollouts show 3",))(rollouts_show)
    command(course, "pause", examples=("skerry rollouts pause 3",))(rollouts_pause)
    command(course, "resume", examples=("skerry rollouts resume 3",))(rollouts_resume)
    command(course, "abort", examples=("skerry rollouts abort 3",))(rollouts_abort)


def push(
    screen: Screen,
    skill: Annotated[
        str, typer.Argument(metavar="SKILL[@VERSION]", help="A released skill; without a version its newest release.")
    ],
    to: To,
    canary: Annotated[
        str | None, typer.Option("--canary", metavar="COUNT|SHARE", help="How many devices go first: 1 or 10%.")
    ] = None,
    wait: Wait = False,
    timeout: Timeout = WAIT_S,
    url: Url = None,
    token: Token = None,
    ca: Ca = None,
) -> None:
    """Bring a release to devices.

    With --canary a few go first and the rest follow when all of those serve it; a canary that fails halts the rollout
    and goes back to what it had. Devices that no variant fits refuse, say why, and stop nobody.
    """
    name, version = release_name(skill)
    with connect(url, token, ca) as client:
        started = client.push(name, version, to, canary)
        _finish(screen, client, started, wait=wait, timeout=timeout)


def rollback(screen: Screen, skill: Annotated[str, typer.Argument(metavar="SKILL", help="A skill.")], to: To, wait: Wait = False,
             timeout: Timeout = WAIT_S, url: Url = None, token: Token = None, ca: Ca = None) -> None:  # fmt: skip
    """Bring devices back to the version that each of them served before."""
    with connect(url, token, ca) as client:
        started = client.rollback(skill, to)
        _finish(screen, client, started, wait=wait, timeout=timeout)


def _finish(screen: Screen, client: "Client", started: "RolloutView", *, wait: bool, timeout: float) -> None:
    from cloud import watch
    from cloud.cli import tables

    if not wait:
        screen.result(started, lambda: tables.rollout_whole(started))
        screen.say(f"Watch it: [cyan]skerry rollouts show {started.id}[/cyan]")
        return
    try:
        with screen.live(tables.rollout(started)) as show:
            ended = watch.follow(client, started.id, timeout, lambda look: show(tables.rollout(look)))
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; the rollout {started.id} goes on without you: "
            f"skerry rollouts show {started.id} shows it, skerry rollouts abort {started.id} stops it"
        ) from None
    screen.result(ended, lambda: tables.rollout_whole(ended))
    watch.judge(ended)


def release_name(text: str) -> tuple[str, str | None]:
    """Split SKILL[@VERSION].

    Raises:
        UsageError: not of that form.
    """
    name, at, version = text.partition("@")
    if not name or (at and not version):
        raise UsageError(f"{text!r} is not understood: write SKILL or SKILL@VERSION, like digits@1.0.0")
    return name, version or None


def infer(
    screen: Screen,
    skill: Annotated[str, typer.Argument(metavar="SKILL", help="A skill that the device serves.")],
    file: Annotated[Path, typer.Argument(metavar="INPUT", help="An .npz (arrays by name), an .npy, or an image.")],
    device: Annotated[str, typer.Option("--device", metavar="DEVICE", help="Which device to ask.")],
    deadline: Annotated[
        float, typer.Option("--deadline", metavar="SECONDS", help="How long the answer may take.")
    ] = 10.0,
    url: Url = None,
    token: Token = None,
    ca: Ca = None,
) -> None:
    """Ask a skill on one device, over the device's own connection: it works behind NAT.

    Request and answer travel through the broker, at most 256 KiB each, within the deadline.
    """
    import time

    from cloud.questions import answer_json, read_question

    with connect(url, token, ca) as client:
        call = read_question(file, client.interface(skill, _serving(client, device, skill)).inputs)
        begin = time.perf_counter()
        answer = client.infer(device, skill, call, deadline)
    took_ms = (time.perf_counter() - begin) * 1000
    found = answer_json(answer)
    from cloud.cli import tables

    def view() -> Any:
        made = tables.table("output", "shape", "values")
        for name, array in answer.arrays.items():
            values = " ".join(str(value) for value in array.reshape(-1)[:12].tolist())
            made.add_row(name, "×".join(map(str, array.shape)), values + (" …" if array.size > 12 else ""))
        return made

    screen.result(
        {"device": device, "skill": skill, "version": answer.version, "ms": round(took_ms, 1), "outputs": found}, view
    )
    screen.say(f"[dim]{skill} {answer.version} on {device}, {took_ms:.0f} ms there and back[/dim]")


def _serving(client: "Client", device: str, skill: str) -> str | None:
    entry = client.device(device).serving(skill)
    return None if entry is None else entry.version


def logs(
    screen: Screen,
    device: DeviceName,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, max=2000, help="How many of the last lines.")] = 100,
    url: Url = None,
    token: Token = None,
    ca: Ca = None,
) -> None:
    """Show the last lines of a device's own log, asked for over its connection."""
    with connect(url, token, ca) as client:
        found = client.logs(device, lines)
    if screen.manner.json:
        screen.result({"device": device, "lines": list(found)}, "")
        return
    for line in found:
        screen.plain(line)


def devices_list(screen: Screen, url: Url = None, token: Token = None, ca: Ca = None) -> None:
    """List the devices: which are online, what they can do, what they serve."""
    from cloud.cli import tables

    with connect(url, token, ca) as client:
        found = client.devices()
    screen.result(found, lambda: tables.devices(found))
    if not found:
        screen.say("No device has joined yet: [cyan]skerry devices invite[/cyan] prints the line to paste on one.")


def devices_invite(
    screen: Screen,
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="A label for the device; may be repeated.")
    ] = None,
    ttl: Annotated[float, typer.Option("--ttl", metavar="HOURS", help="How long the invitation is good for.")] = 24.0,
    url: Url = None,
    token: Token = None,
    ca: Ca = None,
) -> None:
    """Print the one line to paste on a device, good for one device and once.

    The line carries the controller's address and the fingerprint of its CA, so the device needs nothing else.
    """
    with connect(url, token, ca) as client:
        invite = client.invite(parse_labels(label or []), ttl * 3600)
    if screen.manner.json:
        screen.result(invite, "")
        return
    # One unbroken line, whatever the terminal's width: it is made to be copied.
    screen.plain(invite.command)
    screen.say("[dim]then, on the device:[/dim] [cyan]skerry-agent run[/cyan]")


def parse_labels(texts: list[str]) -> dict[str, str]:
    """Read KEY=VALUE labels.

    Raises:
        UsageError: not of that form.
    """
    labels = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key or not value:
            raise UsageError(f"the label {text!r} is not understood: write KEY=VALUE, like site=harbour")
        labels[key] = value
    return labels


def devices_show(screen: Screen, device: DeviceName, url: Url = None, token: Token = None, ca: Ca = None) -> None:
    """Show one device: what it can do, what it runs, and why it refused what it refused."""
    from rich.console import Group
    from rich.text import Text

    from cloud.cli import tables

    with connect(url, token, ca) as client:
        found = client.device(device)

    def view() -> Group:
        capabilities = found.capabilities or {}
        runtimes = tables.pairs(capabilities.get("runtimes") or {}).replace("=", " ") or "–"
        head = Text.assemble(
            (found.id, "bold"),
            "  ",
            tables.state("online" if found.online else "offline"),
            f"  {found.arch or '–'}  {tables.pairs(found.labels)}",
        )
        isa = " ".join(capabilities.get("isa") or []) or "–"
        can = f"runtimes {runtimes}; isa {isa}; {capabilities.get('ram_mb', '–')} MiB for skills"
        return Group(head, Text(can, "dim"), tables.device_skills(found))

    screen.result(found, view)


def devices_remove(screen: Screen, device: DeviceName, url: Url = None, token: Token = None, ca: Ca = None) -> None:
    """Remove a device and revoke its certificate: it cannot come back without a new invitation."""
    with connect(url, token, ca) as client:
        client.remove(device)
    screen.result({"removed": device}, f"{device} is removed and its certificate revoked")


def releases(screen: Screen, url: Url = None, token: Token = None, ca: Ca = None) -> None:
    """List the releases in the signed repository, newest first."""
    from cloud.cli import tables

    with connect(url, token, ca) as client:
        found = client.releases()
    screen.result(found, lambda: tables.releases(found))
    if not found:
        screen.say("No release yet: [cyan]skerry skill publish FILE.skb[/cyan] makes one.")


def rollouts_list(screen: Screen, url: Url = None, token: Token = None, ca: Ca = None) -> None:
    """List the rollouts, newest first."""
    from cloud.cli import tables

    with connect(url, token, ca) as client:
        found = client.rollouts()
    screen.result(found, lambda: tables.rollouts(found))


def rollouts_show(screen: Screen, number: Number, url: Url = None, token: Token = None, ca: Ca = None) -> None:
    """Show one rollout with its devices."""
    from cloud.cli import tables

    with connect(url, token, ca) as client:
        found = client.rollout(number)
    screen.result(found, lambda: tables.rollout_whole(found))


def rollouts_pause(screen: Screen, number: Number, url: Url = None, token: Token = None, ca: Ca = None) -> None:
    """Assign the release to no further devices until it is resumed."""
    _change(screen, number, "pause", url, token, ca)


def rollouts_resume(screen: Screen, number: Number, url: Url = None, token: Token = None, ca: Ca = None) -> None:
    """Go on with a paused rollout."""
    _change(screen, number, "resume", url, token, ca)


def rollouts_abort(screen: Screen, number: Number, url: Url = None, token: Token = None, ca: Ca = None) -> None:
    """Stop a rollout for good: what serves goes on serving, who was on the way goes back."""
    _change(screen, number, "abort", url, token, ca)


def _change(screen: Screen, number: int, verb: str, url: str | None, token: str | None, ca: str | None) -> None:
    from cloud.cli import tables

    with connect(url, token, ca) as client:
        found = client.change_rollout(number, verb)
    screen.result(found, lambda: tables.rollout_whole(found))
