"""What is asked of a controller that runs already."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from cloud import supervise
from cloud.config import Run, Settings
from skills.errors import StorageError, UsageError

OURS = Run(
    7, 0.0, "https://127.0.0.1:1", "mqtts://127.0.0.1:2", "grpcs://127.0.0.1:3", "amqtt", "", "", "", "127.0.0.1"
)
THEIRS = Run(7, 0.0, "https://10.0.0.1:1", "mqtts://b:8883", "grpcs://10.0.0.1:3", "external", "", "", "", "0.0.0.0")  # noqa: S104


def ask(run: Run, **asked: Any) -> None:
    supervise.check_same(run, Settings(Path("/d"), **asked), listen_given="listen" in asked)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"listen": "0.0.0.0"}, "--listen 127.0.0.1, not 0.0.0.0"),  # noqa: S104
        ({"api_port": 9}, "--api-port 1, not 9"),
        ({"mqtt_port": 9}, "--mqtt-port 2, not 9"),
        ({"tail_port": 9, "api_port": 1}, "--tail-port 3, not 9"),
        ({"broker": "mqtts://b"}, "the broker its own amqtt, not mqtts://b:8883"),
    ],
)
def test_settings_that_the_running_controller_does_not_have_are_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match="runs with other settings .*: skerry down first") as caught:
        ask(OURS, **asked)
    assert f"({said})" in str(caught.value)


def test_another_broker_than_the_running_one_is_refused() -> None:
    with pytest.raises(UsageError, match="the broker mqtts://b:8883, not mqtts://c:1"):
        ask(THEIRS, broker="mqtts://c:1")


def test_settings_that_it_has_and_those_that_nobody_gave_are_fine() -> None:
    ask(OURS)
    ask(THEIRS)
    ask(OURS, listen="127.0.0.1", api_port=1, mqtt_port=2, tail_port=3)
    ask(OURS, api_port=0, mqtt_port=0, tail_port=0)
    ask(THEIRS, listen="0.0.0.0", broker="mqtts://b")  # noqa: S104


def test_a_controller_that_said_nothing_on_a_full_disk_ended_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "start.log").touch()
    assert "it said nothing" in str(supervise._why(tmp_path, 1))

    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("cloud.config.tempfile.TemporaryFile", full)
    with pytest.raises(StorageError, match=f"no space left to write {tmp_path}: free some"):
        supervise._why(tmp_path, 1)
