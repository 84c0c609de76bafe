"""Ctrl-C in a long command: exit code 130, one line, and nothing half-written beside what was there."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

SKERRY = [sys.executable, "-P", "-c", "from cloud.cli import main; main()"]
DEADLINE_S = 60.0


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with a model that takes its time, data for it, and a skill without its models."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    work = tmp_path / "work"
    work.mkdir()
    chance = np.random.default_rng(0)
    nodes, weights, live, channels = [], [], "x", 3
    for at in range(6):
        kernel = chance.normal(0, 0.1, (48, channels, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(kernel, f"w{at}"))
        nodes.append(helper.make_node("Conv", [live, f"w{at}"], [f"c{at}"], f"conv{at}", pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{at}"], [f"r{at}"], f"relu{at}"))
        live, channels = f"r{at}", 48
    nodes.append(helper.make_node("ReduceMean", [live], ["y"], "mean", axes=[2, 3], keepdims=0))
    graph = helper.make_graph(
        nodes,
        "slow",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 48])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), work / "slow.onnx")
    np.savez(work / "data.npz", x=chance.normal(0, 1, (400, 3, 32, 32)).astype(np.float32))
    subprocess.run([*SKERRY, "skill", "new", "mine", "-q"], cwd=work, check=True, timeout=60, capture_output=True)
    return work


@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    "arguments",
    [
        ["compress", "slow.onnx", "--data", "data.npz", "-o", "out"],
        ["split", "slow.onnx", "--data", "data.npz", "-o", "out"],
        ["skill", "build", "mine", "-o", "mine.skb"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_an_interrupted_command_leaves_what_was_there(workplace: Path, arguments: list[str]) -> None:
    before = sorted(path.relative_to(workplace) for path in workplace.rglob("*"))
    process = subprocess.Popen(
        [*SKERRY, *arguments],
        cwd=workplace,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + DEADLINE_S
    while process.poll() is None and time.monotonic() < end:
        begun = [path for path in workplace.iterdir() if path.relative_to(workplace) not in before]
        if begun or b"onnxruntime_pybind" in Path(f"/proc/{process.pid}/maps").read_bytes():
            break  # its hidden working folder is there, or it runs the model: now it is in the middle of it
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    resumable = workplace / ".out.work"  # what a long compression has found so far: announced, and there to go on from
    last = said.strip().splitlines()[-1]
    if resumable.is_dir():
        assert last.startswith("skerry: interrupted; ")
        assert "--resume goes on" in last
    else:
        assert last == "skerry: interrupted; nothing is left half-written"
    left = [
        path
        for path in workplace.rglob("*")
        if path.relative_to(workplace) not in before and not {"__pycache__", ".out.work"} & set(path.parts)
    ]
    assert left == []
