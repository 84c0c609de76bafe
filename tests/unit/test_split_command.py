"""`skerry split …` from the command line: the group that is also a command, the device's limits, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloud.cli import run, splitting
from skills.errors import FormatError, NotFound


def profile(folder: Path, **more: float) -> str:
    lines = ["format: profile/v1", "name: board", "runtime: onnxruntime", "arch: aarch64"]
    path = folder / "board.yaml"
    path.write_text("\n".join([*lines, *(f"{key}: {value}" for key, value in more.items())]) + "\n")
    return str(path)


def test_slowness_comes_from_the_option_then_the_profile_and_memory_from_the_profile(tmp_path: Path) -> None:
    assert splitting.device_limits(None, None) == (10.0, None)
    assert splitting.device_limits(profile(tmp_path, slowdown=6, memory_mb=128), None) == (6.0, 128.0)
    assert splitting.device_limits(profile(tmp_path, slowdown=6), 3.0) == (3.0, None)
    with pytest.raises(FormatError, match="does not say how fast the device is: give --device-slowdown as well"):
        splitting.device_limits(profile(tmp_path), None)
    with pytest.raises(NotFound, match="no device profile 'toaster'"):
        splitting.device_limits("toaster", None)


def answer(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    code = run([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_model_and_a_command_are_told_apart_by_the_first_word(
    planned_net: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = answer(capsys, "split", "check", planned_net.folder, "--json")
    assert (code, json.loads(out)["faults"]) == (0, [])
    code, _, err = answer(capsys, "split", "absent.onnx", "--data", "absent.npz", "-o", "plan")
    assert (code, "there is no model file absent.onnx" in err) == (66, True)
    code, out, _ = answer(capsys, "split", "--help")
    assert code == 0
    assert "--slo-ms" in out
    assert "check" in out


def test_bytes_without_a_limit_on_time_are_refused(
    planned_net: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = tmp_path / "m.onnx", tmp_path / "d.npz"
    model.write_bytes(planned_net.model)
    np.savez(data, x=planned_net.x[:4])
    words = ("split", model, "--data", data, "-o", tmp_path / "out", "--objective")
    code, _, err = answer(capsys, *words, "bytes")
    assert code == 2
    assert "--slo-ms" in err
    assert answer(capsys, *words, "energy")[0] == 2
    assert not (tmp_path / "out").exists()


def test_a_faulty_line_is_to_be_corrected_and_only_a_missing_segment_takes_a_new_plan(
    planned_net: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited = tmp_path / "edited"
    shutil.copytree(planned_net.folder, edited)
    file = edited / "split.yaml"
    file.write_text(file.read_text().replace("  pin: null", "  pin: c77"))
    code, _, err = answer(capsys, "split", "check", edited)
    assert (code, "has one fault: correct what was edited" in " ".join(err.split())) == (65, True)
    (edited / "segments/0.onnx").unlink()
    _, _, err = answer(capsys, "split", "check", edited)
    assert "has 2 faults: skerry split makes the plan anew" in " ".join(err.split())
