"""How every command that talks to a controller finds it: three options, then the environment, then the config file."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cloud.client import Client

PANEL = "Controller"
Url = Annotated[
    str | None,
    typer.Option(
        "--url", metavar="URL", help="The controller, https://HOST:PORT.", envvar="SKERRY_URL", rich_help_panel=PANEL
    ),
]
Token = Annotated[
    str | None,
    typer.Option("--token", help="Token of its API.", envvar="SKERRY_TOKEN", show_envvar=True, rich_help_panel=PANEL),
]
Ca = Annotated[
    str | None,
    typer.Option("--ca", metavar="FILE", help="PEM file of its CA.", envvar="SKERRY_CA", rich_help_panel=PANEL),
]


def connect(url: str | None, token: str | None, ca: str | None) -> "Client":
    """Return a client of the controller that was meant.

    Raises:
        NotFound, UsageError: nothing says which one, or no token is known for it.
    """
    from cloud.access import Flags, find_access
    from cloud.client import Client

    return Client(find_access(Flags(url, token, ca)))
