"""Run by test_plain_mode.py in Triton's environment: becomes a real Triton that serves the tails of a split plan.

    python serve.py MODELS.json GRPC_PORT FOLDER

MODELS.json: {model: {"files": [segment…], "inputs": [[name, type, shape]…], "outputs": […]}}, types in Triton's words. Writes
a model repository into FOLDER and replaces itself by NVIDIA's own server binary, which the package nvidia-pytriton carries.
Nothing of Skerry is here: the models are ONNX files, run by onnxruntime in Triton's Python backend (MODEL below).
"""

import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

MODEL = """
import json
import sys
sys.path.append({packages!r})  # the backend starts with a path of its own
import onnxruntime
import triton_python_backend_utils as triton

class TritonPythonModel:
    def initialize(self, arguments):
        config = json.loads(arguments["model_config"])
        self.inputs, self.outputs = ([one["name"] for one in config[key]] for key in ("input", "output"))
        files = json.loads(config["parameters"]["files"]["string_value"])
        self.sessions = [onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]) for file in files]

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        values = {name: triton.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
        for session in self.sessions:
            names = [one.name for one in session.get_outputs()]
            feeds = {one.name: values[one.name] for one in session.get_inputs()}
            values.update(zip(names, session.run(names, feeds)))
        return triton.InferenceResponse([triton.Tensor(name, values[name]) for name in self.outputs])
"""
CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: 0
instance_group [ {{ kind: KIND_CPU, count: 1 }} ]
parameters {{ key: "files" value {{ string_value: {files} }} }}
"""


def main(models: str, port: str, folder: str) -> None:
    found = find_spec("pytriton")
    assert found is not None
    assert found.origin is not None
    package = Path(found.origin).parent
    repository, backends = Path(folder, "models"), Path(folder, "backends")
    for name, one in json.loads(Path(models).read_text()).items():
        (repository / name / "1").mkdir(parents=True)
        (repository / name / "1" / "model.py").write_text(MODEL.replace("{packages!r}", repr(str(package.parent))))
        text = CONFIG.format(name=name, files=json.dumps(json.dumps(one["files"])))
        for key in ("inputs", "outputs"):
            for tensor, kind, shape in one[key]:
                text += f"{key[:-1]} {{ name: {json.dumps(tensor)} data_type: TYPE_{kind} dims: {shape} }}\n"
        (repository / name / "config.pbtxt").write_text(text)
    shutil.copytree(package / "tritonserver" / "backends" / "python", backends / "python")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = package / "tritonserver" / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python")
    libraries = package.parent / "nvidia_pytriton.libs"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    server = str(package / "tritonserver" / "bin" / "tritonserver")
    options = {
        "model-repository": repository, "backend-directory": backends, "grpc-address": "127.0.0.1", "grpc-port": port,
        "allow-http": "false", "allow-metrics": "false", "exit-timeout-secs": "5",
    }  # fmt: skip
    os.execve(server, [server, *(f"--{key}={value}" for key, value in options.items())], environment)  # noqa: S606


if __name__ == "__main__":
    main(*sys.argv[1:])
