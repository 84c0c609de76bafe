"""README.md, docs/start.md and docs/skills.md, run as they stand: every sh block, in order, in a home of its own."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("page", "least"), [("README.md", 25), ("docs/start.md", 25), ("docs/skills.md", 80)])
def test_every_command_of_the_page_works(
    page: str, least: int, built_digits: tuple[Path, object], tmp_path: Path
) -> None:
    home = tmp_path / "walk"
    home.mkdir()
    blocks = commands(page)
    assert "".join(blocks).count("\n") >= least
    if page == "docs/skills.md":  # it begins with the controller and the device of the walk-through
        blocks = [*commands("docs/start.md")[:2], *blocks]
    if page == "README.md":  # docs/start.md trains the same skill by the same commands: one of the two is enough
        made = " ".join(str(built_digits[0] / name) for name in ("models", "probe.npz", "heldout.npz"))
        trained = f"\\g<0>\ncp -r {made} my-digits"
        blocks = [re.sub(r"^skerry skill new my-digits.*", trained, block, flags=re.MULTILINE) for block in blocks]
        assert "".join(blocks).count("heldout.npz my-digits\n") == 1
    script = "\n".join(["set -ex", "trap 'kill $(jobs -p) || true; skerry down || true' EXIT", *blocks])
    environment = {**os.environ, "HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    log = tmp_path / "walk.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            ["bash", "-c", script],
            cwd=home,
            env=environment,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(880)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, log.read_text()[-4000:]


def commands(page: str) -> list[str]:
    """Return the sh blocks of a page."""
    return re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
