"""The agent on the emulated 64-bit Arm: joins, takes the skill, and reads one digit as x86 does."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent.parent
ARM = ROOT / ".venv-aarch64"
# Under user-mode emulation a child is started through the emulator's wrapper, not through the Arm binary itself.
DRIVER = "import sys; sys.executable = {python!r}; from edge_agent.__main__ import main; main()"


@pytest.fixture(scope="module")
def arm_python() -> Path:
    """The emulated Python with this checkout's wheel in it."""
    missing = [name for name in ("qemu-aarch64-static", "mmdebstrap") if shutil.which(name) is None]
    wheels = sorted((ROOT / "build" / "wheel").glob("skerry-*.whl"))
    if missing or not wheels:
        message = f"not run: {', '.join(missing) or 'a wheel in build/wheel (scripts/test makes one)'} is missing"
        if os.environ.get("SKERRY_REQUIRE_AARCH64"):
            pytest.fail(message)
        pytest.skip(message)
    done = subprocess.run(
        [ROOT / "scripts" / "aarch64", wheels[-1]], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return ARM / "python"


@pytest.mark.aarch64
@pytest.mark.timeout(400)
def test_an_arm_board_takes_the_skill_and_answers_as_x86_does(arm_python, built_digits, person_with_controller) -> None:
    person, (folder, _) = person_with_controller, built_digits
    person.run("skerry", "skill", "build", folder, "-o", "digits.skb")
    person.run("skerry", "skill", "publish", "digits.skb")
    token = person.json("skerry", "devices", "invite")["token"]
    agent = [arm_python, "-P", "-c", DRIVER.format(python=str(arm_python))]
    person.run(*agent, "enroll", token, "--name", "board", "--data", "board")
    (person.home / "board" / "agent.yaml").write_text("listen: 127.0.0.1:0\n")
    with person.running([*agent, "run", "--data", "board"], "skills at"):
        person.run("skerry", "push", "digits", "--to", "arch=aarch64", "--wait", timeout=200)
        golden = np.load(folder / "probe.npz")
        np.save(person.home / "digit.npy", golden["in.image"][:1])
        answer = person.json("skerry", "infer", "digits", "--device", "board", "digit.npy", timeout=100)
    assert answer["outputs"]["digit"]["data"] == golden["out.digit"][:1].tolist()
