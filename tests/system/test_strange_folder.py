"""A folder of the person's own may be called like a package of ours: it must never be imported for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SKERRY = [sys.executable, "-P", "-c", "from cloud.cli import main; main()"]


@pytest.mark.timeout(120)
def test_a_controller_starts_in_a_folder_with_a_folder_called_skills(tmp_path: Path) -> None:
    for name in ("skills", "cloud", "edge_agent", "amqtt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong package')")
    data = ["--data", str(tmp_path / "controller")]

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*SKERRY, *arguments, *data],
            cwd=tmp_path,
            env=os.environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    started = call("up", "--api-port", "0", "--mqtt-port", "0", "--tail-port", "0")
    stopped = call("down")
    assert started.returncode == 0, started.stderr
    assert stopped.stdout.strip() == "stopped"
