"""`skerry demo` as a person would run it, its output going to a file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SKERRY = [sys.executable, "-P", "-c", "from cloud.cli import main; main()"]


@pytest.mark.timeout(900)
def test_the_story_holds_and_leaves_nothing_but_its_folder(tmp_path: Path) -> None:
    home, scratch, data = tmp_path / "h", tmp_path / "t", tmp_path / "story"
    home.mkdir()
    scratch.mkdir()
    environment = {**os.environ, "HOME": str(home), "TMPDIR": str(scratch)}
    done = subprocess.run(
        [*SKERRY, "demo", "--keep", "--data", str(data)], capture_output=True, env=environment, timeout=880, check=False
    )
    assert done.returncode == 0, done.stdout.decode()[-3000:] + done.stderr.decode()[-3000:]
    assert b"\x1b" not in done.stdout + done.stderr  # no control codes where no terminal is
    story = json.loads((data / "demo.json").read_text())
    assert all(claim["holds"] for claim in story["claims"])
    assert story["together"]["sent"] == story["together"]["answered"]
    assert story["seconds"]["all"] < 300
    assert not list(home.iterdir())
    assert not list(scratch.iterdir())
    assert not _processes_on(data)


@pytest.mark.timeout(60)
def test_a_folder_that_is_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("do not touch")
    done = subprocess.run(
        [*SKERRY, "demo", "--data", str(tmp_path)], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 2
    assert "is not empty" in done.stderr
    assert (tmp_path / "mine").read_text() == "do not touch"


def _processes_on(folder: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(folder) in line:
                found.append(line)
    return found
