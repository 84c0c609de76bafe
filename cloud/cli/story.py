"""`skerry demo`: the whole story on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from cloud.cli.command import command
from cloud.cli.screen import Screen


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "demo", panel="Begin here", examples=("skerry demo", "skerry demo --keep --data story"))(demo)


def demo(
    screen: Screen,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FOLDER",
            help="Where everything goes; must not exist or be empty.",
            show_default="a temporary folder",
        ),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave that folder there at the end.")] = False,
) -> None:
    """Tell the whole story on this machine, in less than five minutes, with numbers measured here.

    Trains and compresses a model, builds and signs a skill, starts a controller, a broker and three agents, brings the
    skill to them, asks them, updates, breaks and tampers with it, splits a photo classifier between device and cloud
    and kills the cloud's part. Every claim is checked; a claim that does not hold ends it with 3.
    """
    from cloud.demo import tell

    tell(screen, data, keep=keep)
