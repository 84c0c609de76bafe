"""What a command shows: results on stdout, everything said on the way on stderr, both quiet when they should be.

| stream | what | `--json` | `--quiet` | not a terminal |
|---|---|---|---|---|
| stdout | the result | one JSON document | the result only | no colours, 120 columns |
| stderr | remarks and progress | nothing | nothing | remarks, no progress bars |
| stderr | warnings | nothing: the document has them | as ever | as ever |
"""

import contextlib
import dataclasses
import datetime as dt
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

ROOMY_COLUMNS = 110  # from here on the progress line has its title and a longer bar
PLAIN_COLUMNS = 120  # a file or a pipe has no width; tables of this width stay readable

Step = Callable[[str, float], None]
"""Called with what is being done now and the share that is done, 0..1."""


@dataclasses.dataclass(frozen=True, slots=True)
class Manner:
    """How a command was asked to speak."""

    json: bool = False
    quiet: bool = False
    debug: bool = False


class Screen:
    """The two streams of one command."""

    def __init__(self, manner: Manner, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.manner = manner
        self._out = sys.stdout if out is None else out
        self._err = sys.stderr if err is None else err

    @property
    def out(self) -> "Console":
        return _console(self._out)

    @property
    def err(self) -> "Console":
        return _console(self._err)

    @property
    def lively(self) -> bool:
        """Whether something that moves (bars, live tables) is welcome."""
        return _is_terminal(self._err) and not self.manner.quiet and not self.manner.json

    def result(self, value: object, view: "RenderableType | Callable[[], RenderableType]") -> None:
        """Show a command's result: `value` as JSON, or `view` (made only then) for people."""
        if self.manner.json:
            self._out.write(to_json(value) + "\n")
            return
        made = view() if callable(view) else view
        self.out.print(made, markup=False)

    def plain(self, line: str) -> None:
        """Show one line of the result as it is: never wrapped, never coloured."""
        self._out.write(line + "\n")

    def say(self, text: str) -> None:
        """Remark on what is happening (rich markup); never part of the result."""
        if self.manner.quiet or self.manner.json:
            return
        from rich.errors import MarkupError
        from rich.text import Text

        try:
            self.err.print(Text.from_markup(text))
        except MarkupError:  # a path or a name with brackets in it
            self.err.print(Text(text))

    def warn(self, text: str) -> None:
        """Say what may be wrong with the result (plain text), also when asked to be quiet; a JSON result has it in itself."""
        if not self.manner.json:
            from rich.text import Text

            self.err.print(Text.assemble(("warning:", "yellow"), " ", text))

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Step]:
        """Show a progress bar while the block runs, with the time since it began; nothing where nobody would see it."""
        if not self.lively:
            yield lambda text, share: None
            return
        from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
        from rich.table import Column

        class Clock(ProgressColumn):  # rich's own stops for good at the first step that is done
            def render(self, task: Task) -> "RenderableType":
                return str(dt.timedelta(seconds=int(task.elapsed or 0)))

        def fixed(wide: int) -> Column:
            return Column(width=wide, no_wrap=True)

        console = self.err
        roomy = console.width >= ROOMY_COLUMNS
        bar_width = 28 if roomy else 10
        columns = (
            *([TextColumn("[bold]{task.fields[title]}")] if roomy else []),
            BarColumn(bar_width=bar_width, table_column=fixed(bar_width)),
            TextColumn("{task.percentage:>3.0f} %", table_column=fixed(5)),
            Clock(table_column=fixed(8)),
            TextColumn("[dim]{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        )  # what is too long for the line is shortened in the text, never in the numbers
        with Progress(*columns, console=console, transient=True, expand=True) as bar:
            task = bar.add_task("", total=1.0, title=title)
            yield lambda text, share: bar.update(task, description=text, completed=min(max(share, 0.0), 1.0))

    @contextlib.contextmanager
    def live(self, view: "RenderableType") -> Iterator["Callable[[RenderableType], None]"]:
        """Show something that changes in place while the block runs; where nobody would see it, nothing."""
        if not self.lively:
            yield lambda changed: None
            return
        from rich.live import Live

        with Live(view, console=self.err, transient=True, auto_refresh=False) as shown:
            yield lambda changed: shown.update(changed, refresh=True)


def to_json(value: object) -> str:
    """Return `value` (dataclasses, mappings, sequences, paths) as readable JSON."""
    return json.dumps(value, default=_plain, indent=2, ensure_ascii=False)


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def _console(stream: TextIO) -> "Console":
    from rich.console import Console

    terminal = _is_terminal(stream)
    columns = None if terminal or os.environ.get("COLUMNS") else PLAIN_COLUMNS
    return Console(file=stream, force_terminal=terminal, width=columns, highlight=False, soft_wrap=False)
