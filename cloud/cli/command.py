"""How a command is declared: a plain function whose first parameter is the screen, plus its examples."""

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperGroup

from cloud.cli.screen import Manner, Screen

KEYWORD = inspect.Parameter.KEYWORD_ONLY
OUTPUT = "Output"

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.", rich_help_panel=OUTPUT)]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="Print the result only, and warnings: no remarks, no progress.", rich_help_panel=OUTPUT
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=OUTPUT)]


class Ordered(TyperGroup):
    """Commands in the order in which a person meets them, groups among them."""

    order: ClassVar[tuple[str, ...]] = ()

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands; the ones that nobody ordered come last."""
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: self.order.index(name) if name in self.order else len(self.order))


def group(help_text: str, *, order: Sequence[str] = ()) -> typer.Typer:
    """Return an empty group of commands."""
    return typer.Typer(
        cls=type("Ordered", (Ordered,), {"order": tuple(order)}),
        help=unwrapped(help_text),
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def command(
    app: typer.Typer, name: str, *, examples: Sequence[str], panel: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command; `--json`, `--quiet` and `--debug` come by themselves.

    The function stays callable as it is: `function(screen, **arguments)`. Its docstring is the help, `examples` follow it.
    Without a name it is what the group itself does when no command follows.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        own = [parameter.replace(kind=KEYWORD) for parameter in list(signature.parameters.values())[1:]]
        context = inspect.Parameter("ctx", KEYWORD, annotation=typer.Context)
        common = [
            inspect.Parameter("json", KEYWORD, default=False, annotation=Json),
            inspect.Parameter("quiet", KEYWORD, default=False, annotation=Quiet),
            inspect.Parameter("debug", KEYWORD, default=False, annotation=Debug),
        ]

        def run(*, ctx: typer.Context, json: bool, quiet: bool, debug: bool, **arguments: Any) -> None:
            if ctx.invoked_subcommand is None:
                function(Screen(Manner(json, quiet, debug)), **arguments)

        run.__name__ = function.__name__
        run.__doc__ = unwrapped(inspect.getdoc(function) or "")
        parameters = [context, *own, *common]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        epilog = "[bold]Examples[/bold]\n\n" + "\n\n".join(f"  [cyan]{_escape(example)}[/cyan]" for example in examples)
        if name:
            app.command(name, epilog=epilog, rich_help_panel=panel)(run)
        else:
            app.callback(epilog=epilog, invoke_without_command=True, no_args_is_help=False)(run)
        return function

    return register


def unwrapped(text: str) -> str:
    """Return a text with one line a paragraph: the terminal's width decides where lines break."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _escape(text: str) -> str:
    return text.replace("[", "\\[")
