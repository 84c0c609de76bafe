"""`skerry split --device NAME` with real processes: a controller with its broker, and an agent that measures for it."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

AGENT = [sys.executable, "-P", "-m", "edge_agent"]
SLOWER = 20


@pytest.fixture
def workplace(person_with_controller: Any, planned_net: Any) -> Any:
    """A person with a model, its data, and an enrolled device that is not running."""
    person = person_with_controller
    (person.home / "net.onnx").write_bytes(planned_net.model)
    np.savez(person.home / "data.npz", x=planned_net.x[:60])
    token = person.json("skerry", "devices", "invite")["token"]
    person.run(*AGENT, "enroll", token, "--name", "cam-1", "--data", "board")
    return person


def device_is(person: Any, **settings: object) -> None:
    lines = ["listen: 127.0.0.1:0", *(f"{name}: {value}" for name, value in settings.items())]
    (person.home / "board" / "agent.yaml").write_text("\n".join(lines) + "\n")


def words(device: str, out: str) -> list[str]:
    return ["skerry", "split", "net.onnx", "--data", "data.npz", "--device", device, "--link", "20mbit/30ms", "-o", out]


@pytest.mark.timeout(300)
def test_an_enrolled_device_measures_its_side_of_the_plan_and_both_sides_are_clean_afterwards(workplace: Any) -> None:
    device_is(workplace, timer=f"dilated({SLOWER})")
    with workplace.running([*AGENT, "run", "--data", "board"], "skills at"):
        plan = workplace.json(*words("cam-1", "plan"), timeout=200)
        workplace.run("skerry", "split", "check", "plan")
    assert plan["device"] == "cam-1"
    assert SLOWER / 4 < plan["slowdown"] < SLOWER * 4  # other processes use the same cores
    report = json.loads((workplace.home / "plan" / "report.json").read_text())
    assert report["device"]["measured"] == "the enrolled device cam-1, by its own agent"
    assert report["device"]["memory_mb"] == 512
    assert "cam-1" in (workplace.home / "plan" / "report.html").read_text()
    controller = Path(workplace.json("skerry", "status")["data"])
    assert list((controller / "lent").iterdir()) == []
    assert not (workplace.home / "board" / "measure").exists()


@pytest.mark.timeout(300)
def test_a_device_that_cannot_measure_is_one_sentence_and_its_exit_code_and_leaves_no_plan(workplace: Any) -> None:
    device_is(workplace, memory_mb=1)
    refusals = [
        ("cam-9", [], 66, "there is no device profile 'cam-9'"),
        ("cam-1", [], 69, "the device cam-1 is not connected, so it cannot measure"),
        ("cam-1", ["--device-slowdown", "3"], 2, "leave --device-slowdown away"),
    ]
    for device, more, code, sentence in refusals:
        assert sentence in flat(workplace.run(*words(device, "plan"), *more, code=code))
    with workplace.running([*AGENT, "run", "--data", "board"], "skills at"):
        said = flat(workplace.run(*words("cam-1", "plan"), code=79, timeout=200))
    assert "cam-1 could not measure: the segments need more memory than the 1 MiB that the device has left" in said
    assert not (workplace.home / "plan").exists()


def flat(text: str) -> str:
    return " ".join(text.split())
