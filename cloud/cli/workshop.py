"""`skerry compress`: the workshop from the command line."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from cloud.cli.command import command
from cloud.cli.screen import Screen
from skills.errors import Interrupted, UsageError
from skills.units import parse_duration

PANEL = "Models"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(
        app,
        "compress",
        panel=PANEL,
        examples=(
            "skerry compress digits.onnx --data digits.npz -o small",
            "skerry compress net.py:make --data photos/ -o small --device arm64-onnxruntime --max-drop 0.5",
            "skerry compress small.onnx --data data.npz -o tiny --teacher large.onnx --time-budget 1h30m",
            "skerry compress retrained.onnx --data data.npz -o small --recipe small/recipe.yaml",
        ),
    )(compress)


def compress(
    screen: Screen,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="An .onnx or .pt2 file, or FILE.py:FACTORY or MODULE:FACTORY that returns a torch module.",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FOLDER", help="Where the result goes.")],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DATA",
            help="An .npz with x and, if known, y (and x_train, y_train), a folder of class folders with a data.yaml, or "
            "FILE.py:FUNCTION. Without it only the weights are compressed.",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="PROFILE",
            help="What it shall run on: auto (like this machine), a profile's name or .yaml file.",
        ),
    ] = "auto",
    max_drop: Annotated[
        float, typer.Option("--max-drop", metavar="POINTS", help="How much accuracy may be lost, in percentage points.")
    ] = 1.0,
    goal: Annotated[str, typer.Option("--goal", metavar="size|latency|both", help="What counts most.")] = "both",
    weights: Annotated[
        Path | None,
        typer.Option("--weights", metavar="FILE", help="State dict for the module that the factory returns."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            metavar="NAME",
            help="What accuracy means: top1, macro_f1, mse, psnr, roc_auc, cosine or agreement.",
            show_default="fits the data",
        ),
    ] = None,
    time_budget: Annotated[
        str | None,
        typer.Option(
            "--time-budget",
            metavar="TIME",
            help="How long it may take, like 90s, 30m or 1h30m. Where it is short, judging and timing at the end come on top.",
            show_default="30m",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher", metavar="MODEL", help="A more accurate model to learn from in place of the original."
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="FILE", help="The recipe.yaml of an earlier result: done again, no search."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run into the same folder stopped.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything random.")] = 0,
) -> None:
    """Make a model smaller and faster within a budget of lost accuracy.

    Everything is measured on the runtime that will serve it, where this machine has the target's architecture, and on
    samples that nothing was fitted to: only which finished candidate is the result was read off them. The folder
    holds model.onnx, report.json, report.html, recipe.yaml and lineage.json. Ends with 3 when the budget was missed.
    """
    from compress import Goal
    from compress import compress as run
    from compress.folder import workdir

    if goal not in get_args(Goal):
        raise UsageError(f"--goal is {goal!r}, expected size, latency or both")
    aim = cast(Goal, goal)
    budget_s = None if time_budget is None else parse_duration(time_budget)
    if data is None:
        screen.say("no --data: only the weights are compressed")
    if resume and not workdir(out).is_dir():
        screen.say(f"nothing to resume in {out}: starting anew".replace("[", "\\["))
    try:
        with screen.progress("compressing") as step:

            def tell(stage: str, share: float, best: str) -> None:
                step(f"{short(best)} · {stage}" if best else stage, share)

            report = run(
                model, data, out, device, max_drop, aim, seed, tell, weights,
                time_budget=budget_s, teacher=teacher, recipe=recipe, resume=resume, metric=metric,
            )  # fmt: skip
    except KeyboardInterrupt:
        raise Interrupted(interrupted(out)) from None
    except SystemExit:  # what the command line makes of SIGTERM; its exit code stays
        with contextlib.suppress(OSError):  # at SIGHUP nobody may read it any more
            print(f"skerry: {interrupted(out)}", file=sys.stderr, flush=True)
        raise
    from cloud.cli import findings

    screen.result(report.to_json(), lambda: findings.compressed(report))
    screen.say(f"[dim]{out / 'report.html'} shows it layer by layer[/dim]")
    report.reached()


def short(best: str) -> str:
    """Return the best so far in a few characters, for a line that has to say more: `best 3.9x, +0.00`."""
    ratio, _, drop = best.partition(" smaller, ")
    return " ".join(("best", f"{ratio}, {drop.split()[0]}" if drop else best))


def interrupted(out: Path) -> str:
    """Return what lies on the disk after an interrupt, and how to go on."""
    from compress.folder import best_folder, workdir

    if not workdir(out).is_dir():
        return "interrupted; nothing is left half-written"
    kept = f"the best model so far is in {best_folder(out)}" if best_folder(out).is_dir() else f"{out} is as it was"
    return f"interrupted; {kept}; the same command with --resume goes on from here, rm -r {workdir(out)} forgets it"
