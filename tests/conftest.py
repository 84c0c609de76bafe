"""What all tests share: where the reference models are, and a clean environment."""

import os
import socket
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IN_CI = os.environ.get("CI") == "true"


def reference_folder() -> Path:
    return Path(os.environ.get("SKERRY_REFERENCE", ROOT.parent / "shared" / "data"))


@pytest.fixture
def reference() -> Path:
    """The folder of reference models and data; where it is absent a test is listed as not run, and fails in CI."""
    folder = reference_folder()
    if not folder.is_dir():
        message = f"the reference models are not at {folder} (set SKERRY_REFERENCE)"
        if IN_CI:
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the home of the person who runs it."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "SKERRY_URL", "SKERRY_TOKEN", "SKERRY_CA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "1")


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
