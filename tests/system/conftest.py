"""What the tests with real processes share: the digits skill, built once by its own recipe, and a controller."""

import contextlib
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import skills

DIGITS = Path(skills.__file__).parent / "library" / "digits"
SCRIPTS = Path(sysconfig.get_path("scripts"))


@pytest.fixture(scope="session")
def built_digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of the digits skill as its recipe builds it, and what the recipe says about it."""
    out = tmp_path_factory.mktemp("digits") / "skill"
    command = [sys.executable, str(DIGITS / "recipe.py"), "--out", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


class Person:
    """Somebody at a terminal, with a home of their own: calls the console scripts and reads what they print."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {**os.environ, "HOME": str(home), "COLUMNS": "120", "NO_COLOR": "1"}

    def run(self, *command: str | Path, code: int = 0, timeout: float = 100) -> str:
        """Run a command to its end; it must exit with `code`. Returns what it printed, both streams."""
        words = [str(word) for word in command]
        if (SCRIPTS / words[0]).exists():
            words[0] = str(SCRIPTS / words[0])
        done = subprocess.run(
            words, env=self.environment, cwd=self.home, capture_output=True, text=True, timeout=timeout, check=False
        )
        assert done.returncode == code, f"{words} gave {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def json(self, *command: str | Path, timeout: float = 100) -> Any:
        """Run a command with --json and return what it printed."""
        return json.loads(self.run(*command, "--json", timeout=timeout))

    @contextlib.contextmanager
    def running(self, command: Sequence[str | Path], ready: str) -> Iterator[subprocess.Popen[str]]:
        """Run a daemon inside the block, from the moment it printed `ready` on."""
        words = [str(word) for word in command]
        if (SCRIPTS / words[0]).exists():
            words[0] = str(SCRIPTS / words[0])
        process = subprocess.Popen(
            words, env=self.environment, cwd=self.home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            said = []
            assert process.stdout is not None
            for line in process.stdout:
                said.append(line)
                if ready in line:
                    break
            else:
                raise AssertionError(f"{words} ended before it was ready:\n{''.join(said)}")
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=30)


@pytest.fixture
def person(tmp_path: Path) -> Person:
    """A person in an empty home."""
    return Person(tmp_path / "home")


@pytest.fixture
def person_with_controller(person: Person) -> Iterator[Person]:
    """A person whose controller runs on this machine, on free ports."""
    person.run("skerry", "up", "--api-port", "0", "--mqtt-port", "0", "--tail-port", "0")
    try:
        yield person
    finally:
        person.run("skerry", "down")
