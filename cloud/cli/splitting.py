"""`skerry split …`: plan a split, and check a plan that a person edited."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cloud.cli.command import Ordered, command
from cloud.cli.connection import Ca, Token, Url, connect
from cloud.cli.screen import Screen
from skills.errors import FormatError, NotFound, Refused, Unreachable, UsageError

if TYPE_CHECKING:
    from cloud.client import Client
    from cloud.split.check import Checked
    from cloud.split.live import LiveDevice
    from skills.profile import Profile

PANEL = "Models"
DEFAULT_SLOWDOWN = 10.0
DATA_HELP = "An .npz with x and, if known, y; or a folder of images with a data.yaml."
Objective = Annotated[
    str, typer.Option("--objective", metavar="latency|bytes", help="What the best answer has least of.")
]
SloMs = Annotated[
    float | None,
    typer.Option("--slo-ms", metavar="MS", help="The slowest answer allowed; --objective bytes needs it."),
]
MaxDrop = Annotated[
    float, typer.Option("--max-drop", metavar="POINTS", help="How much a coding may cost, in percentage points.")
]


class ModelOrCommand(Ordered):
    """A group that does its own work on `skerry split MODEL …`, and hands on `skerry split check …`."""

    order = ("check", "joint", "stages")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take MODEL and the options here, unless the first word is a command."""
        below = bool(args) and args[0] in self.commands
        ctx.meta[self._key(ctx)] = below
        ctx.allow_interspersed_args = not below
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters; none of them is asked for, or part of the path, where a command follows."""
        every, below = super().get_params(ctx), ctx.command is not self or ctx.meta.get(self._key(ctx))
        return [one for one in every if one.name == "help"] if below else every

    def _key(self, ctx: Any) -> str:
        """Name this context in `meta`, which all of them share; `command_path` would ask `get_params` for the answer."""
        words = []
        while ctx is not None:
            words.append(ctx.info_name or "")
            ctx = ctx.parent
        return f"{__name__}.{' '.join(reversed(words))}"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    split_app = typer.Typer(
        cls=ModelOrCommand,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        no_args_is_help=True,
    )
    app.add_typer(split_app, name="split", rich_help_panel=PANEL)
    command(
        split_app,
        "",
        examples=(
            "skerry split photos.onnx --data photos.npz --device-slowdown 10 --link 20mbit/30ms -o plan",
            "skerry split photos.onnx --data photos.npz --device cam-1 --link 20mbit/30ms -o plan",
            "skerry split photos.onnx --data photos.npz -o plan --private",
            "skerry split photos.onnx --data photos.npz -o plan --objective bytes --slo-ms 200",
        ),
    )(split)
    command(
        split_app,
        "check",
        examples=("skerry split check plan", "skerry split check plan/split.yaml --model photos.onnx"),
    )(check)
    command(
        split_app,
        "joint",
        examples=(
            "skerry split joint plan --small small.onnx --data photos.npz",
            "skerry split joint plan --small small.onnx --data photos.npz --target 0.9",
        ),
    )(joint)
    command(
        split_app,
        "stages",
        examples=("skerry split stages my-skill --device-slowdown 10 --link 20mbit/30ms -o placement",),
    )(stages)


def split(
    screen: Screen,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx file.")],
    data: Annotated[Path, typer.Option("--data", metavar="DATA", help=DATA_HELP)],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FOLDER", help="Where split.yaml and the segments go.")],
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="NAME",
            help="Profile (.yaml or name) of the device, or an enrolled device that is to measure itself.",
        ),
    ] = None,
    slowdown: Annotated[
        float | None,
        typer.Option(
            "--device-slowdown",
            metavar="TIMES",
            help="How many times slower than this machine the device is.",
            show_default="10",
        ),
    ] = None,
    link: Annotated[
        list[str] | None,
        typer.Option(
            "--link",
            metavar="RATE/RTT",
            help="A network to judge, like 20mbit/30ms; may be repeated.",
            show_default="1, 5, 20, 100mbit/30ms",
        ),
    ] = None,
    objective: Objective = "latency",
    slo_ms: SloMs = None,
    private: Annotated[
        bool, typer.Option("--private", help="The input may not leave the device, not even compressed or rebuilt.")
    ] = False,
    min_cut: Annotated[
        str | None,
        typer.Option(
            "--min-cut",
            metavar="TENSOR",
            help="With --private: nothing before this tensor (not a cut's name) may leave.",
        ),
    ] = None,
    max_drop: MaxDrop = 1.0,
    head_tail: Annotated[
        bool, typer.Option("--head-tail", help="Also write head.onnx and tail.onnx of the best true cut.")
    ] = False,
    url: Url = None,
    token: Token = None,
    ca: Ca = None,
) -> None:
    """Find out whether and where to cut a model between device and cloud.

    Staying local and sending the compressed input are candidates beside every true cut; the verdict says plainly when
    splitting does not pay. With --private, a decoder is trained for each cut (20 s of processor time at most); a cut from
    which it rebuilds inputs is not used, nor is one on fewer than 200 inputs.

    A device profile declares how slow a device is. An enrolled device is sent the segments and eight of the inputs, and its
    own agent measures them, which may take some minutes; the plan and the report say which of the two it was.
    """
    from cloud.split import LINKS
    from cloud.split import split as run
    from skills.network import ASSUMED, parse_link

    links = tuple(parse_link(text) for text in link) if link else LINKS
    network = links[0] if link else ASSUMED  # what the device assumes until it has measured its own
    with contextlib.ExitStack() as open_until_done, screen.progress("splitting") as step:
        live = None
        if device is not None and not _is_profile(device):
            live = live_device(device, slowdown, lambda: open_until_done.enter_context(connect(url, token, ca)))
            factor, memory_mb = 1.0, live.memory_mb
        else:
            factor, memory_mb = device_limits(device, slowdown)
        report = run(
            model, data, slowdown=factor, links=links, private=private, min_cut=min_cut, max_drop=max_drop, out=out,
            objective=objective, slo_ms=slo_ms, memory_mb=memory_mb, head_tail=head_tail, audit=private, device=live,
            network=network, progress=lambda stage, done, of: step(stage, done / of if of else 0.0),
        )  # fmt: skip
    from cloud.cli import findings

    screen.result(findings.split_json(report), lambda: findings.split_table(report.plan, links, report.details))
    if head_tail and "head_tail" not in report.details:
        screen.say("the model has no place to cut it, so there is no head.onnx and no tail.onnx")
    screen.say(f"[dim]{out / 'report.html'} shows every cut[/dim]")


def check(
    screen: Screen,
    plan: Annotated[Path, typer.Argument(metavar="FOLDER", help="A plan's folder, or its split.yaml.")],
    model: Annotated[
        Path | None, typer.Option("--model", metavar="MODEL", help="The .onnx file that the plan was made from.")
    ] = None,
) -> None:
    """Check a split plan, edited by hand or not: one sentence for each fault.

    Looks at split.yaml, at the hashes, ends and loading of every segment, and at whether the device can do what was
    pinned; with a model also at whether the segments in a row answer as it does. Ends with 65 when there is a fault.
    """
    from cloud.split.check import check_plan

    found = check_plan(plan, model)
    screen.result(_plain(found), lambda: "\n".join(found.faults) or f"{found.file} is in order")
    for text in found.remarks:
        screen.say(text.replace("[", "\\["))
    if found.faults:
        count = f"{len(found.faults)} faults" if len(found.faults) > 1 else "one fault"
        cure = "skerry split makes the plan anew" if found.stale else "correct what was edited"
        raise FormatError(f"{found.file} has {count}: {cure}")


def joint(
    screen: Screen,
    plan: Annotated[Path, typer.Argument(metavar="FOLDER", help="The split plan of the big model.")],
    small: Annotated[Path, typer.Option("--small", metavar="MODEL", help="The small model, an .onnx file.")],
    data: Annotated[Path, typer.Option("--data", metavar="DATA", help=DATA_HELP)],
    target: Annotated[
        float | None,
        typer.Option(
            "--target",
            metavar="SHARE",
            help="How often both together shall be right, above 0 and at most 1.",
            show_default="the big model's share less the plan's max_drop",
        ),
    ] = None,
) -> None:
    """Put a small model before the big one of a split plan: it answers easy inputs on the device, and asks about hard ones.

    The plan is changed in place: the model is put into FOLDER/small, and split.yaml is written anew with it.

    Temperature and threshold are chosen on one half of the data, and what both reach together is told of the other half.
    Classifiers are marked by their answers; detectors, whose first output has scores from 0 to 1, by how close theirs are.
    Every question has a deadline, and the small model's answer stands when none comes. Ends with 3 when no threshold
    reaches the target.
    """
    from cloud.split.joint import join

    with screen.progress("joining") as step:
        step("running both models", 0.5)
        found = join(plan, small, data, target)
    facts = {
        "small": found.small, "accuracy_small": found.alone, "accuracy_big": found.big,
        "accuracy_together": found.together, "samples": found.inputs, "text": found.text,
    }  # fmt: skip
    screen.result(facts, f"{found.text} (judged on {found.inputs} inputs that chose nothing)")


def stages(
    screen: Screen,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder that holds skill.yaml.")],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="FILE", help="An .npz with the skill's inputs.", show_default="its probe's inputs"
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="PROFILE", help="Profile (.yaml or name) of the device.")
    ] = None,
    slowdown: Annotated[
        float | None,
        typer.Option(
            "--device-slowdown",
            metavar="TIMES",
            help="How many times slower than this machine the device is.",
            show_default="10",
        ),
    ] = None,
    link: Annotated[
        list[str] | None,
        typer.Option(
            "--link", metavar="RATE/RTT", help="A network to judge; may be repeated.", show_default="four of them"
        ),
    ] = None,
    objective: Objective = "latency",
    slo_ms: SloMs = None,
    private: Annotated[bool, typer.Option("--private", help="The skill's input may not leave the device.")] = False,
    min_cut: Annotated[
        str | None,
        typer.Option("--min-cut", metavar="CUT", help="With --private: what leaves from there on (c1, …) may be seen."),
    ] = None,
    max_drop: MaxDrop = 1.0,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FOLDER", help="Where split.yaml with the placement goes.")
    ] = None,
) -> None:
    """Find out which stages of a skill belong on the device and which in the cloud: the first ones here, the rest there.

    Every placement is measured as a whole, with the messages between the stages in every coding. The result is a table to
    decide by, and with -o a plan. In the skill's folder, with `placement: split.yaml` in skill.yaml, the skill runs by it.

    The device keeps the models of all stages loaded: a profile whose memory_mb they do not fit is refused (79).
    """
    from cloud.cli import findings
    from cloud.split import LINKS
    from cloud.split.check import unaudited
    from cloud.split.stages import plan_stages
    from skills.network import ASSUMED, parse_link

    links = tuple(parse_link(text) for text in link) if link else LINKS
    network = links[0] if link else ASSUMED  # what the device assumes until it has measured its own
    factor, memory_mb = device_limits(device, slowdown)
    with screen.progress("placing") as step:
        plan = plan_stages(
            folder, data, slowdown=factor, links=links, private=private, min_cut=min_cut, max_drop=max_drop, out=out,
            objective=objective, slo_ms=slo_ms, memory_mb=memory_mb, network=network,
            progress=lambda stage, done, of: step(stage, done / of if of else 0.0),
        )  # fmt: skip
    facts = {
        "stages": [{"name": one.name, "place": one.place} for one in plan.stages],
        "verdicts": [
            {"link": str(one.link), "cut": one.cut, "coding": one.coding, "ms": one.ms, "text": one.text}
            for one in plan.verdicts
        ],
        "remarks": list(unaudited(plan)),
    }
    screen.result(facts, lambda: findings.split_table(plan, links))
    for remark in unaudited(plan):
        screen.say(remark)
    screen.say(", ".join(f"{one.name}: {one.place}" for one in plan.stages) + f" on {plan.network}")


def _plain(found: "Checked") -> dict[str, Any]:
    from skills.split_plan import plan_hash

    return {
        "file": str(found.file),
        "plan_hash": None if found.plan is None else plan_hash(found.plan),
        "faults": list(found.faults),
        "remarks": list(found.remarks),
    }


def device_limits(device: str | None, slowdown: float | None) -> tuple[float, float | None]:
    """Return how many times slower the device is, from the option or else its profile, and its memory in MiB.

    Raises:
        NotFound: there is no such profile.
        FormatError: neither says how fast the device is.
    """
    if device is None:
        return DEFAULT_SLOWDOWN if slowdown is None else slowdown, None
    profile = _profile(device)
    factor = profile.slowdown if slowdown is None else slowdown
    if factor is None:
        raise FormatError(f"the profile {device} does not say how fast the device is: give --device-slowdown as well")
    return factor, profile.memory_mb


def _is_profile(device: str) -> bool:
    from compress import profiles

    return device == "auto" or device.endswith((".yaml", ".yml")) or device in profiles.names()


def live_device(device: str, slowdown: float | None, connected: "Callable[[], Client]") -> "LiveDevice":
    """Return an enrolled device that can measure now, as its controller says.

    Raises:
        UsageError: a slowdown was given as well, which only a profile can have.
        NotFound: no controller is known, or it knows no such device.
        Unreachable: the device is not connected.
        Refused: it offers no onnxruntime.
    """
    from cloud.split.live import LiveDevice
    from compress import profiles
    from skills.measurement import RUNTIME

    try:
        client = connected()
        known = client.device(device)
    except NotFound as error:
        names = f"auto, a .yaml file, or one of {', '.join(profiles.names())}"
        raise NotFound(
            f"there is no device profile '{device}' ({names}), and no enrolled device either: {error}"
        ) from None
    if slowdown is not None:
        raise UsageError(f"{device} is an enrolled device and measures how slow it is: leave --device-slowdown away")
    if not known.online:
        raise Unreachable(f"the device {device} is not connected, so it cannot measure: try again when it is")
    runtimes = (known.capabilities or {}).get("runtimes", {})
    if RUNTIME not in runtimes:
        raise Refused(
            f"{device} cannot measure a model: it offers {', '.join(runtimes) or 'no runtime'}, not {RUNTIME}"
        )
    return LiveDevice(device, client, float((known.capabilities or {}).get("ram_mb", 0)) or None)


def _profile(device: str) -> "Profile":
    from compress import profiles

    return profiles.find(device)
