"""The stage: one folder, one controller, some boards; whatever the story starts is stopped when it leaves."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cloud.access import Access
from cloud.cli.screen import Screen, Step
from cloud.demo.board import Board
from cloud.demo.claims import Claims
from cloud.demo.facts import Arrival
from cloud.views import RolloutView
from skills.errors import DeadlineExceeded

if TYPE_CHECKING:
    from rich.console import RenderableType

    from cloud.client import Client
    from cloud.supervise import Running

ONLINE_DEADLINE_S = 30.0
ROLLOUT_DEADLINE_S = 90.0
LOOK_EVERY_S = 0.2


class Scene:
    """Use it as a context manager: its end stops every process that it started."""

    def __init__(self, folder: Path, screen: Screen) -> None:
        self.folder, self.screen, self.claims = folder, screen, Claims()
        self.boards: dict[str, Board] = {}
        self.controller: Running | None = None
        self._client: Client | None = None
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()
        for board in self.boards.values():
            board.stop()
        self.stop_controller()

    # --- processes --------------------------------------------------------------------------------

    def start_controller(self) -> "Running":
        """Start the controller with its broker and tail server on free ports; it ends with us at the latest."""
        from cloud import supervise
        from cloud.client import Client
        from cloud.config import Settings

        settings = Settings(self.folder / "controller", api_port=0, mqtt_port=0, tail_port=0)
        self.controller = supervise.start(settings, detach=False)
        self._client = Client(Access(self.controller.run.url, self.controller.token, str(self.controller.ca)))
        return self.controller

    def stop_controller(self) -> None:
        """Stop the controller with its children."""
        from cloud import supervise

        if self._client is not None:
            self._client.__exit__(None, None, None)
            self._client = None
        if self.controller is not None:
            self.controller = None
            supervise.stop(self.folder / "controller")

    @property
    def client(self) -> "Client":
        """The API of the running controller."""
        if self._client is None:
            raise DeadlineExceeded("the controller is not running")
        return self._client

    @property
    def publisher_key(self) -> Path:
        return self.folder / "controller" / "keys" / "publisher.pem"

    def add_board(
        self, name: str, config: str, labels: Mapping[str, str], change: Callable[[Board], None] = lambda board: None
    ) -> Board:
        """Enrol and start one more device; `change` may touch its folder in between."""
        board = Board(name, self.folder / "devices" / name, config)
        self.boards[name] = board
        board.enroll(self.client.invite(labels, 600.0).token)
        change(board)
        board.start()
        return board

    def wait_online(self, *names: str) -> None:
        """Wait until the controller has heard these devices.

        Raises:
            DeadlineExceeded: which one it has not.
        """
        end = time.monotonic() + ONLINE_DEADLINE_S
        while time.monotonic() < end:
            online = {device.id for device in self.client.devices() if device.online}
            if online >= set(names):
                return
            time.sleep(LOOK_EVERY_S)
        raise DeadlineExceeded(
            f"{', '.join(sorted(set(names) - online))} did not come online within {ONLINE_DEADLINE_S:.0f} s"
        )

    def keep(self, closing: contextlib.AbstractContextManager[Any]) -> Any:
        """Enter something that shall be left at the end of the story."""
        return self._exit.enter_context(closing)

    # --- telling ----------------------------------------------------------------------------------

    @property
    def silent(self) -> bool:
        return self.screen.manner.json or self.screen.manner.quiet

    def show(self, *views: "RenderableType") -> None:
        """Show a part of the story."""
        if not self.silent:
            self.screen.out.print(*views, sep="\n")

    def table(self, view: "RenderableType") -> None:
        """Show a table with some air around it."""
        self.show("", view, "")

    def chapter(self, letter: str, title: str, text: str) -> None:
        """Begin a chapter."""
        from rich.rule import Rule
        from rich.text import Text

        self.show(
            Text(),
            Rule(Text.assemble((f" {letter} ", "bold reverse"), " ", (title, "bold")), align="left", style="dim"),
            Text(text),
        )

    def say(self, text: str) -> None:
        """Say one line of the story (rich markup)."""
        from rich.text import Text

        self.show(Text.from_markup(text))

    def claim(self, text: str, holds: object, found: str = "") -> bool:
        """Check a claim and show how it went."""
        from rich.text import Text

        claim = self.claims.check(text, holds, found)
        mark, style = ("✓", "green") if claim.holds else ("✗", "bold red")
        line = Text.assemble((f"{mark} ", style), (text, "" if claim.holds else "bold red"))
        self.show(line.append(f"  {found}", "dim") if found else line)
        return claim.holds

    @contextlib.contextmanager
    def working(self, title: str) -> Iterator[Step]:
        """Show that something takes its time; what does not move (a file, a pipe) gets one line."""
        if not self.screen.lively and not self.silent:
            self.say(f"… {title}")
        with self.screen.progress(title) as step:
            yield step

    # --- rollouts ---------------------------------------------------------------------------------

    def follow(self, started: RolloutView) -> tuple[RolloutView, float]:
        """Show a rollout live until it ends; return its last state and the seconds that it took."""
        from cloud import watch
        from cloud.cli import tables

        begin = time.monotonic()
        with self.screen.live(tables.rollout(started)) as show:
            ended = watch.follow(self.client, started.id, ROLLOUT_DEADLINE_S, lambda look: show(tables.rollout(look)))
        self.table(tables.rollout(ended))
        return ended, time.monotonic() - begin


def arrivals(rollout: RolloutView) -> tuple[Arrival, ...]:
    """Return what became of each device."""
    return tuple(
        Arrival(
            member.device,
            member.stage,
            ", ".join(member.variants.values()),
            member.received_bytes,
            member.reused_bytes,
            member.reason,
        )
        for member in rollout.devices
    )


def replaced(folder: Path, copy: Path, **texts: tuple[str, str]) -> None:
    """Copy a skill's folder and replace one text by another in some of its files (`skill_yaml=("1.0.0", "1.1.0")`)."""
    import shutil

    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("reports", "heldout.npz", "__pycache__"))
    for name, (old, new) in texts.items():
        path = copy / ".".join(name.rsplit("_", 1))
        text = path.read_text()
        if old not in text:
            raise ValueError(f"{path.name} does not say {old!r}")
        path.write_text(text.replace(old, new, 1))


def machine() -> dict[str, Any]:
    """Return what the numbers were measured on."""
    import os
    import platform

    model = ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                model = line.partition(":")[2].strip()
                break
    return {"cpu": model or platform.machine(), "cores": len(os.sched_getaffinity(0)), "arch": platform.machine(),
            "python": platform.python_version(), "system": platform.platform(terse=True)}  # fmt: skip
