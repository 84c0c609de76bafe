"""`skerry demo`: the whole story on one machine, with real processes and numbers measured on the spot.

One module a chapter: `smaller` (a), `delivered` (b), `answers` (c), `trouble` (d), `together` (e). `scene` holds folder and
processes, `claims` what must hold, `facts` what ends up in demo.json.
"""

import os
import shutil
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from cloud.cli.screen import Screen, to_json
from cloud.demo.facts import Story
from cloud.demo.scene import Scene, machine
from skills.errors import UsageError
from skills.files import storage_errors, write_atomic


def tell(screen: Screen, data: Path | None, *, keep: bool) -> Story:
    """Tell the story; everything it writes lies in one folder, every process it starts has ended when it returns.

    Raises:
        NotReached: a claim does not hold on this machine.
        UsageError: the folder is in use.
        SkerryError: something broke; the folder is kept and its logs say more.
    """
    folder = _folder(data)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "torch")  # torch makes it even where nothing is compiled
    try:
        with Scene(folder, screen) as scene:
            story = _chapters(scene)
        if not story.claims:
            raise UsageError("the story has no claims")
        write_atomic(folder / "demo.json", to_json(story).encode())
        _close(scene, story, folder, keep=keep)
        scene.claims.judge()
    except KeyboardInterrupt:
        _tidy(folder, keep=keep)
        raise
    except BaseException:
        screen.say(f"everything so far, logs too, is in {folder}")
        raise
    _tidy(folder, keep=keep)
    return story


def _chapters(scene: Scene) -> Story:
    from cloud.demo import answers, delivered, smaller, together, trouble

    seconds: dict[str, float] = {}
    begin = last = time.monotonic()

    def lap(letter: str) -> None:
        nonlocal last
        now = time.monotonic()
        seconds[letter], last = round(now - last, 1), now

    import skills

    facts = machine()
    scene.say(
        f"[bold]Skerry {skills.__version__}[/bold]  {facts['cpu']}, {facts['cores']} cores, Python {facts['python']}; "
        f"everything lies in {scene.folder}"
    )
    small, piece = smaller.tell(scene)
    lap("a")
    first = delivered.tell(scene, piece.folder)
    lap("b")
    asked = answers.tell(scene, piece)
    lap("c")
    update, refusals, back = trouble.tell(scene, piece)
    lap("d")
    both = together.tell(scene)
    lap("e")
    seconds["all"] = round(last - begin, 1)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return Story(
        skills.__version__,
        date,
        facts,
        seconds,
        tuple(scene.claims.all),
        small,
        first,
        asked,
        update,
        refusals,
        back,
        both,
    )


def _close(scene: Scene, story: Story, folder: Path, *, keep: bool) -> None:
    from rich.text import Text

    if scene.screen.manner.json:
        scene.screen.result(story, "")
        return
    held = sum(claim.holds for claim in story.claims)
    whole = f"{story.seconds['all']:.0f} s"
    text = Text.assemble(
        (f"{held} of {len(story.claims)} claims hold", "bold green" if held == len(story.claims) else "bold red"),
        f"  {whole}",
    )
    scene.screen.out.print(text)
    scene.say(
        f"kept in {folder}, the numbers in demo.json"
        if keep
        else "every process has ended; nothing is left behind (--keep leaves the folder)"
    )


def _folder(data: Path | None) -> Path:
    if data is None:
        return Path(tempfile.mkdtemp(prefix="skerry-demo-"))
    if data.exists() and (not data.is_dir() or any(data.iterdir())):
        raise UsageError(f"{data} is not empty: name a folder that does not exist yet")
    with storage_errors(data):
        data.mkdir(parents=True, exist_ok=True)
    return data.absolute()


def _tidy(folder: Path, *, keep: bool) -> None:
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
