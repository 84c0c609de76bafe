"""The walk-through of docs/start.md, run as it stands: every sh block, in order, in a home of its own."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

START = Path(__file__).parent.parent.parent / "docs" / "start.md"


@pytest.mark.timeout(300)
def test_every_command_of_the_walk_through_works(tmp_path: Path) -> None:
    home = tmp_path / "walk"
    home.mkdir()
    blocks = re.findall(r"^```sh\n(.*?)^```", START.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 8
    script = "\n".join(["set -ex", "trap 'kill $AGENT || true; skerry down || true' EXIT", *blocks])
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
            code = process.wait(280)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, log.read_text()[-4000:]
