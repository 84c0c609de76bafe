"""The command line's tree of commands."""

from typing import Annotated

import typer

import skills
from cloud.cli import fleet, host, skill, splitting, story, workshop
from cloud.cli.command import group

HELP = """Take trained models to fleets of small devices and keep them right there.

Begin with [cyan]skerry demo[/cyan], or with [cyan]skerry up[/cyan] and the walk-through in docs/start.md.
Every command explains itself with --help and prints JSON with --json; exit codes are in docs/exit-codes.md."""

ORDER = (
    "demo",
    "compress",
    "split",
    "skill",
    "up",
    "down",
    "status",
    "login",
    "push",
    "rollback",
    "devices",
    "releases",
    "rollouts",
    "infer",
    "logs",
)


def build() -> typer.Typer:
    """Return all commands."""
    app = group(HELP, order=ORDER)
    app.callback()(_options)
    for part in (story, workshop, splitting, skill, host, fleet):
        part.register(app)
    return app


def _version(given: bool) -> None:
    if given:
        typer.echo(f"skerry {skills.__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and end.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    pass
