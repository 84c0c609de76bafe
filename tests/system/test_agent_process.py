"""The real agent with real workers: a zygote, forked workers, a real ONNX model, the local endpoint, a real controller."""

import json
import os
import signal
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SKILL = """\
name: {name}
version: {version}
inputs: [{{name: x, dtype: FP32, shape: [-1, 4]}}]
outputs: [{{name: y, dtype: FP32, shape: [-1, 4]}}, {{name: confidence, dtype: FP32, shape: [-1]}}]
models:
  net:
    variants:
      - {{name: plain, runtime: onnxruntime, file: models/net.onnx, ram_mb: 8}}
stages: [{{name: twice, model: net, code: twice.py}}]
"""
CODE = """\
import numpy as np

def twice(inputs, model):
    if inputs["x"].size and inputs["x"].flat[0] == -666:
        import os
        print("about to fall over", flush=True)
        os.abort()
    y = model(x=inputs["x"])["y"]
    return {"y": y, "confidence": np.full(len(y), 0.5, np.float32)}
"""


@pytest.fixture
def tiny_skill(tmp_path: Path) -> Callable[..., Path]:
    """Write the folder of a real skill whose ONNX model multiplies by `factor`; the probe expects `golden`."""

    def write(version: str = "1.0.0", *, factor: float = 2.0, golden: float | None = None, code: str = CODE) -> Path:
        import numpy as np
        import onnx
        from onnx import TensorProto, helper

        folder = tmp_path / f"tiny-{version}"
        (folder / "models").mkdir(parents=True)
        node = helper.make_node("Mul", ["x", "k"], ["y"])
        graph = helper.make_graph(
            [node],
            "tiny",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
            [helper.make_tensor("k", TensorProto.FLOAT, [1], [factor])],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, folder / "models/net.onnx")
        (folder / "twice.py").write_text(code)
        (folder / "skill.yaml").write_text(SKILL.format(name="tiny", version=version))
        x = np.arange(8, dtype=np.float32).reshape(2, 4)
        np.savez(folder / "probe.npz", **{"in.x": x, "out.y": x * (factor if golden is None else golden)})
        return folder

    return write


class Board:
    """One agent process with a data directory of its own."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.process: subprocess.Popen[str] | None = None
        self.port = 0
        data.mkdir(exist_ok=True)
        (data / "agent.yaml").write_text("listen: 127.0.0.1:0\ntrial_s: 3\n")

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "edge_agent", *arguments, "--data", str(self.data)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    def start(self) -> None:
        command = [sys.executable, "-m", "edge_agent", "run", "--data", str(self.data)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "skills at http://" in line:
                self.port = int(line.split(":")[-1].split("/")[0])
                return
        raise AssertionError(f"the agent ended: {(self.data / 'agent.log').read_text()[-2000:]}")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        code = self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process = None
        return code

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return json.load(answer)

    def ask(self, x: list[list[float]]) -> Any:
        tensor = {"name": "x", "datatype": "FP32", "shape": [len(x), 4], "data": x}
        body = json.dumps({"id": "7", "inputs": [tensor]}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v2/models/tiny/infer", body)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)
